"""Turns third-party weights into a model of ours: one .safetensors file with its configuration, and
an account of every tensor.

    python -m dsct_jax convert --input=FILE --output=DIR --config=configs/emotic_r50_released.py

FILE is a released DSCT (.pth), a Deformable DETR (.pth of the original code, .safetensors of
Hugging Face), a torchvision ResNet (.pth or .safetensors), or a run directory or .safetensors file
of ours, which needs no --config. What a file does not have starts as in a fresh training with the
configuration's seed. `--config.init_from=FILE` of train.py does the same at the start of a run.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsct_jax.cli import Parser, expanded_path
from dsct_jax.config import read_config, require
from dsct_jax.errors import UserError
from dsct_jax.inference.load import Model, model_config
from dsct_jax.model.build import Network
from dsct_jax.weights.native import is_native, read_native
from dsct_jax.weights.pretrained import load_pretrained

MODEL_FILE = "model.safetensors"
REPORT_FILE = "report.txt"


def convert(
    source: Path, output: Path, config: Mapping[str, Any] | None = None, *, strict: bool = True
) -> list[str]:
    """Writes `output`/model.safetensors and `output`/report.txt; returns the report. Raises
    UserError: see `load_pretrained`; or no `config` for a third-party file.
    """
    if config is None:
        if not is_native(source):
            remedy = "give --config, such as configs/emotic_r50_released.py"
            raise UserError(f"{source}: does not say which model it is for; {remedy}")
        config = read_native(source).config
    network = Network(model_config(config))
    params, norm_stats, report = load_pretrained(
        source,
        network,
        *network.init(require(config, "seed", int)),
        class_names=require(config, "class_names", tuple),
        multi_label=require(config, "multi_label", bool),
        strict=strict,
    )
    output.mkdir(parents=True, exist_ok=True)
    Model(network, params, norm_stats, config).save(output / MODEL_FILE)
    (output / REPORT_FILE).write_text("\n".join(report) + "\n")
    return report


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--input", type=expanded_path, required=True, help="third-party weights, or our own model")
    files = f"directory for {MODEL_FILE} and {REPORT_FILE}"
    parser.add_output("--output", folder=True, required=True, help=files)
    config = "configuration (.py or .json) of the model to make; a model of ours brings its own"
    add("--config", type=expanded_path, help=config)
    add("--lenient", action="store_true", help="skip and report what does not fit")
    return parser


def run(arguments: argparse.Namespace) -> None:
    config = None if arguments.config is None else read_config(arguments.config)
    report = convert(arguments.input, arguments.output, config, strict=not arguments.lenient)
    print("\n".join(report))
    print(f"written: {arguments.output / MODEL_FILE}")
