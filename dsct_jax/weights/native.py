"""Weights of our own, with the configuration they were trained with: a run directory, one of its
checkpoints, or a .safetensors file of `Model.save`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsct_jax.batch import FlatParams
from dsct_jax.config import to_builtins
from dsct_jax.errors import UserError
from dsct_jax.weights.run_directory import DIRECTORY, load_weights, parse_run_path
from dsct_jax.weights.tensor_files import read_safetensors, read_safetensors_texts


class NativeWeights(NamedTuple):
    """Weights and what is stored with them."""

    params: FlatParams
    norm_stats: FlatParams
    config: dict[str, Any]
    metadata: Mapping[str, Any]  # of the checkpoint, or the texts of the file
    step: int | None  # of the checkpoint that was read; None for a file


def is_native(path: Path) -> bool:
    """Whether `path` is a run directory of ours or a .safetensors file of `Model.save`."""
    if path.is_dir():
        return path.name == DIRECTORY or (path / DIRECTORY).is_dir()
    is_file = path.suffix == ".safetensors" and path.is_file()
    return is_file and "config" in read_safetensors_texts(path)


def read_native(path: Path) -> NativeWeights:
    """RUN means its newest checkpoint, RUN/checkpoints/STEP that one.

    Raises:
        UserError: there is no such file or directory, it is damaged, or holds no configuration.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if path.is_dir():
        found = load_weights(*parse_run_path(path))
        config = to_builtins(found.metadata["config"])
        return NativeWeights(found.params, found.norm_stats, config, found.metadata, found.step)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: neither a run directory nor a .safetensors or .pth file")
    arrays, texts = read_safetensors(path)
    if "config" not in texts:
        reason = "only files written by this project's Model.save can be read"
        raise UserError(f"{path}: holds no configuration; {reason}")
    params, norm_stats = (
        {k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)}
        for p in ("params/", "frozen/")
    )
    return NativeWeights(params, norm_stats, parse_config(texts["config"], path), texts, None)


def parse_config(text: str, path: Path) -> dict[str, Any]:
    """The configuration that is kept as JSON in a file of weights."""
    try:
        return dict(to_builtins(json.loads(text)))
    except (TypeError, ValueError) as error:
        reason = f"the configuration in it is damaged ({error})"
        raise UserError(f"{path}: {reason}; copy the file again") from None
