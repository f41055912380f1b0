"""Turns third-party weights into a model of ours: one .safetensors file with its configuration, and
an account of every tensor."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    (output / REPORT_FILE).write_text("\n".join(report) + "\n", encoding="utf-8")
    return report


def run(arguments: argparse.Namespace) -> None:
    config = None if arguments.config is None else read_config(arguments.config)
    report = convert(arguments.input, arguments.output, config, strict=not arguments.lenient)
    print("\n".join(report))
    print(f"written: {arguments.output / MODEL_FILE}")
