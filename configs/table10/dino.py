"""DINO, 4 levels, 900 queries; positions and box noise as detrex. Paper: 89.27 % accuracy."""

from configs import table10


def get_config():
    return table10.detrex("dino", position_temperature=1e4, position_offset=0.5, box_noise=1.0)
