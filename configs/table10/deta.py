"""DETA, 5 levels, 900 queries. Paper: 91.77 % accuracy."""

from configs import table10


def get_config():
    return table10.detrex("deta")
