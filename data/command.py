"""What the commands that run from a checkout share: a configuration named on the command line, and
changed there.

    python -m data check --config=configs/demo.py --config.data.train=100

The one module of `data` that knows ml_collections: train.py and the commands of `data` read their
    command lines the same way, here. Everything else
takes a DataConfig.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from data.config import DataConfig
from dsct_jax.cli import Parser
from dsct_jax.config import dataclass_from_dict, read_config, require, to_builtins, unknown_field
from dsct_jax.errors import UserError


def override(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`config` with each --config.section.field=value applied.

    Raises:
        UserError: an argument of another form, a field that does not exist, or a value of another
            type.
    """
    for argument in overrides:
        if not argument.startswith("--config."):
            raise UserError(
                f"{argument}: unexpected argument; a setting is written "
                "--config.section.field=value"
            )
        fields: Any = config
        prefix, *path = argument.removeprefix("--").split("=")[0].split(".")
        for key in path:
            if not isinstance(fields, Mapping) or key not in fields:
                raise unknown_field(
                    f"--{prefix}.", key, fields if isinstance(fields, Mapping) else ()
                )
            fields, prefix = fields[key], f"{prefix}.{key}"
    locked, values, arguments = (
        ConfigDict(config).lock(),
        flags.FlagValues(),
        ["command", *overrides],
    )
    try:
        config_flags.DEFINE_config_dict("config", locked, flag_values=values, sys_argv=arguments)
        values(arguments)
    except flags.Error as error:
        raise UserError(" ".join(str(error).removeprefix("flag ").split())) from error
    return to_builtins(locked)


def data_config(path: Path, overrides: Sequence[str] = ()) -> DataConfig:
    """The data section and the classes of a configuration file, changed by arguments such as
    --config.data.data_dir=DIR.

    Raises:
        UserError: the file or an argument cannot be used; the line names it.
    """
    config = override(read_config(path), overrides)
    classes = {
        "class_names": require(config, "class_names", tuple),
        "multi_label": require(config, "multi_label", bool),
    }
    return dataclass_from_dict(DataConfig, "data", require(config, "data", Mapping), **classes)


def config_parser(prog: str, description: str | None) -> Parser:
    """A parser with --config; a command adds its own flags and leaves what begins with --config. to
    `parse`.
    """
    parser = Parser(prog=prog, description=description)
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="such as configs/demo.py; --config.data.FIELD=VALUE changes a field",
    )
    return parser


def parse(
    parser: Parser, argv: Sequence[str] | None = None
) -> tuple[DataConfig, argparse.Namespace]:
    """(data configuration, the command's own flags) of a command line whose parser is a
    `config_parser`. Raises UserError.
    """
    arguments, overrides = parser.parse_known_args(argv)
    return data_config(arguments.config, overrides), arguments


T = TypeVar("T")


def progress(things: Iterable[T], *, total: int, what: str, unit: str = "image") -> Iterable[T]:
    """The same things, with a bar on a terminal and now and then a line of it elsewhere (stderr)."""
    terminal = sys.stderr.isatty()
    often = (
        {"mininterval": 0.2, "dynamic_ncols": True}
        if terminal
        else {"mininterval": 10, "delay": 10}
    )
    return tqdm(things, total=total, desc=what, unit=unit, leave=False, **often)
