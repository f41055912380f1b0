"""Deformable DETR, one stage, no refinement, 300 queries. Paper: 91.81 % accuracy."""

from configs import table10


def get_config():
    config = table10.detrex("deformable_detr")
    config.loss.weight_class = 1.0  # authors: 2
    return config
