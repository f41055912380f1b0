"""Flags that several commands share, each defined once, and what they mean."""

import argparse

from dsct_jax.cli import Parser, expanded_path
from dsct_jax.config import read_config
from dsct_jax.inference.load import Model, load
from dsct_jax.postprocess import Selection

CHECKPOINT = "run directory, .safetensors file, or released .pth (with --config)"
CONFIG = "configuration (.py or .json) that describes the weights; needed for .pth only"


def add_checkpoint(parser: Parser, *, required: bool = True) -> None:
    """--checkpoint and --config, which `load_model` reads."""
    parser.add_argument("--checkpoint", type=expanded_path, required=required, help=CHECKPOINT)
    parser.add_argument("--config", type=expanded_path, help=CONFIG)


def load_model(arguments: argparse.Namespace) -> Model:
    """The model of --checkpoint and --config."""
    config = None if arguments.config is None else read_config(arguments.config)
    return load(arguments.checkpoint, config)


def add_selection(parser: Parser) -> None:
    """--threshold, --min-confidence and --nms, which `selection` reads."""
    add = parser.add_argument
    threshold = "multi-label: probability that makes a class a label; default: as fitted, or 0.5"
    add("--threshold", type=float, help=threshold)
    confidence = "below which a query is nobody; default: as fitted on validation, or 0.3"
    add("--min-confidence", type=float, help=confidence)
    overlap = "IoU above which two boxes are the same person (default: %(default)s; 1 = keep all)"
    add("--nms", type=float, default=Selection.nms, help=overlap)


def selection(arguments: argparse.Namespace) -> Selection:
    """Which people and labels the flags ask for. Raises UserError for a number out of range."""
    return Selection(
        threshold=arguments.threshold, min_confidence=arguments.min_confidence, nms=arguments.nms
    )
