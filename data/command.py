"""How train.py and the commands of `data` read a configuration that is named and changed on the
command line. The one module of `data` that knows ml_collections; the rest takes a DataConfig.

    python -m data check --config=configs/demo.py --config.data.train=100
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.config import SPLITS, DataConfig
from dsct_jax.cli import Parser
from dsct_jax.config import (
    BOXES,
    dataclass_from_dict,
    expanded_path,
    read_config,
    require,
    to_builtins,
    unknown_field,
)
from dsct_jax.errors import UserError


def override(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`config` with each --config.section.field=value applied. Raises UserError."""
    from absl import flags  # of the `train` extra, like the next
    from ml_collections import ConfigDict, config_flags

    for argument in overrides:
        if not argument.startswith("--config."):
            remedy = "a setting is written --config.section.field=value"
            raise UserError(f"{argument}: unexpected argument; {remedy}")
        fields: Any = config
        prefix, *path = argument.removeprefix("--").split("=")[0].split(".")
        for key in path:
            if not isinstance(fields, Mapping) or key not in fields:
                known = fields if isinstance(fields, Mapping) else ()
                raise unknown_field(f"--{prefix}.", key, known)
            fields, prefix = fields[key], f"{prefix}.{key}"
    locked, values = ConfigDict(config).lock(), flags.FlagValues()
    arguments = ["command", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", locked, flag_values=values, sys_argv=arguments)
        values(arguments)
    except flags.Error as error:
        raise UserError(" ".join(str(error).removeprefix("flag ").split())) from error
    return _with_classes(to_builtins(locked))


def _with_classes(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with class_names "auto" taken from the annotations."""
    if config.get("class_names") not in ("auto", ("auto",)):
        return config
    from data.readers.coco import annotated_classes  # more than --help can wait for

    data = _data_section(config | {"class_names": ("auto",)})
    return config | {"class_names": annotated_classes(data)}


def data_config(path: Path, overrides: Sequence[str] = ()) -> DataConfig:
    """The data section and classes of a file, changed by --config.data.... Raises UserError."""
    return _data_section(override(read_config(path), overrides))


def _data_section(config: Mapping[str, Any]) -> DataConfig:
    kinds = {"class_names": tuple, "multi_label": bool}
    classes = {name: require(config, name, kind) for name, kind in kinds.items()}
    return dataclass_from_dict(DataConfig, "data", require(config, "data", Mapping), **classes)


class ConfigParser(Parser):
    """A parser with --config and --config.*; a command adds its own flags."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description)
        text = "such as configs/demo.py; --config.data.FIELD=VALUE changes a field"
        self.add_argument("--config", type=expanded_path, required=True, help=text)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The flags, the DataConfig as `data` and the section `model`. Raises UserError."""
        arguments, overrides = self.parse_known_args(args, namespace)
        config = override(read_config(arguments.config), overrides)
        arguments.data, arguments.model = _data_section(config), config.get("model", {})
        return arguments

    def add_workers(self, what: str) -> None:
        """--workers, by default one per core."""
        self.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=what)


def train_parser(description: str | None) -> Parser:
    """The flags of train.py itself; what begins with --config. is left to `override`."""
    parser = Parser(description=description)
    modes = "train, evaluating on the way; evaluate a checkpoint; or say what a run takes"
    several, path = "several processes:", {"type": expanded_path}
    for flag, text, options in (
        ("config", "such as configs/demo.py, or a run's config.json", path),
        ("workdir", "directory of the run: checkpoints, metrics, settings", path),
        ("mode", modes, {"choices": ["train", "eval", "plan"], "default": "train"}),
        ("split", "what --mode=eval evaluates", {"choices": SPLITS, "default": "test"}),
        ("checkpoint", "what --mode=eval evaluates: newest, best or a step", {"default": "newest"}),
        ("boxes", f"of a two-stage network that --mode=eval evaluates: {BOXES}", {}),
        ("coordinator", f"{several} HOST:PORT of process 0; auto: found by jax", {}),
        ("num_processes", f"{several} how many", {"type": int}),
        ("process_id", f"{several} which of them this is, from 0", {"type": int}),
        ("profile", "first of the steps to profile, and how many", {"metavar": "STEP:NUMBER"}),
    ):
        parser.add_argument(f"--{flag}", help=text, **options)
    return parser


def splits_argument(text: str) -> list[str]:
    """The type of a flag that takes splits, with commas between them."""
    splits = list(dict.fromkeys(text.split(",")))
    if unknown := [split for split in splits if split not in SPLITS]:
        must = f"must be one or more of {', '.join(SPLITS)}, with commas"
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no split; {must}")
    return splits


def require_at_least(arguments: argparse.Namespace, minimum: int, *names: str) -> None:
    """Raises UserError for the first of these flags that is given and smaller."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name}={value} cannot be used: must be at least {minimum}")
