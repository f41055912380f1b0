"""Anchor DETR, 300 points x 3 patterns, C5 at stride 32 (detrex; authors: 16). Paper: 90.42 %."""

from configs import table10


def get_config():
    return table10.detrex("anchor_detr", dilation=False)
