"""DETR, 100 queries, C5 at stride 32. Paper: 89.74 % accuracy."""

from configs import table10


def get_config():
    return table10.detrex("detr")
