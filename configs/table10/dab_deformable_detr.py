"""DAB-Deformable-DETR, 300 queries. Paper: 91.39 % accuracy."""

from configs import table10


def get_config():
    return table10.detrex("dab_deformable_detr")
