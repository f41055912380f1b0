"""Conditional DETR, 300 queries. Paper: 90.07 % accuracy."""

from configs import table10


def get_config():
    return table10.detrex("conditional_detr")
