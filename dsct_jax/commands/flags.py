"""What the flags that several commands share mean."""

import argparse

from dsct_jax.config import read_config
from dsct_jax.inference.finders import Finder, make_finder
from dsct_jax.inference.load import Model, load
from dsct_jax.postprocess import Selection


def load_model(arguments: argparse.Namespace) -> Model:
    """The model of --checkpoint and --config."""
    config = None if arguments.config is None else read_config(arguments.config)
    return load(arguments.checkpoint, config)


def finder_of(arguments: argparse.Namespace) -> Finder | None:
    """Who finds the people of a two-stage network: what --boxes names, if anything."""
    return None if arguments.boxes is None else make_finder(arguments.boxes)


def selection(arguments: argparse.Namespace) -> Selection:
    """Which people and labels the flags ask for. Raises UserError for a number out of range."""
    return Selection(
        threshold=arguments.threshold, min_confidence=arguments.min_confidence, nms=arguments.nms
    )
