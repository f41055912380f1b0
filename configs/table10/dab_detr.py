"""DAB-DETR, 300 queries. Paper: 87.49 % accuracy."""

from configs import table10


def get_config():
    return table10.detrex("dab_detr")
