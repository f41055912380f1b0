"""The values of the frozen networks of `config.model.modalities`, from their published files. A
checkpoint names these by path and SHA-256 instead of holding a copy.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsct_jax.batch import FlatParams
from dsct_jax.config import expanded_path
from dsct_jax.errors import UserError
from dsct_jax.model.build import Network
from dsct_jax.model.layers import NORM_EPSILON
from dsct_jax.model.modalities import PREFIX
from dsct_jax.weights.rules import TensorLayout, from_torch, module, resnet_rules
from dsct_jax.weights.tensor_files import read_tensors

RANDOM = "random"  # instead of a file: values of the run's seed
_BATCHES = r".*\.num_batches_tracked"
_FPN = "backbone.fpn"
LAYOUTS = {
    "scene": TensorLayout(
        title="ResNet of Places365",
        marker=r"module\.layer1\.0\.conv1\.weight",
        rules=tuple(resnet_rules("module.", f"{PREFIX}scene/body")),
        spellings=((r"(?=(conv1|bn1|layer\d)\.)", "module."),),  # saved without DataParallel
        left_out=rf"(module\.)?fc\..*|{_BATCHES}",
    ),
    "semantic": TensorLayout(
        title="torchvision's DeepLabv3",
        marker=r"backbone\.layer1\.0\.conv1\.weight",
        rules=tuple(resnet_rules("backbone.", f"{PREFIX}semantic/body")),
        left_out=rf"(aux_)?classifier\..*|{_BATCHES}",
    ),
    "instance": TensorLayout(
        title="torchvision's Mask R-CNN",
        marker=r"backbone\.body\.layer1\.0\.conv1\.weight",
        rules=(
            *resnet_rules("backbone.body.", f"{PREFIX}instance/body"),
            *(
                rule
                for theirs, ours in (("inner_blocks", "inner"), ("layer_blocks", "outer"))
                for i in range(3)  # theirs begin with C2
                for rule in module(
                    "conv", f"{_FPN}.{theirs}.{i + 1}.0", f"{PREFIX}instance/pyramid/{ours}/{i}"
                )
            ),
        ),
        # older torchvision has no number behind that of the block
        spellings=((rf"{_FPN}\.(\w+)\.(\d)\.(?=weight|bias)", rf"{_FPN}.\1.\2.0."),),
        left_out=rf"{_FPN}\.(inner|layer)_blocks\.0\..*|(rpn|roi_heads)\..*|{_BATCHES}",
    ),
}
# where the published weights were trained with frozen norms that have no epsilon
_NO_EPSILON = ("instance",)


def without_modalities(norm_stats: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of these values."""
    return {name: value for name, value in norm_stats.items() if not name.startswith(PREFIX)}


class Modalities(NamedTuple):
    """The frozen values of a network."""

    values: FlatParams
    files: dict[str, dict[str, str]]  # what a checkpoint says of them: file and SHA-256 of each


def load_modalities(
    network: Network, *, seed: int, stored: Mapping[str, Any] | None = None
) -> Modalities:
    """Those of a network. `stored`: what a checkpoint said; the files are those, and unchanged.

    Raises:
        UserError: a modality without a file, or a file that is missing, changed, or does not fit.
    """
    names, field = getattr(network.config, "modalities", ()), "config.model.modality_weights"
    files = getattr(network.config, "modality_weights", ())
    if stored:
        files = [stored[name]["file"] for name in names]
    if len(files) != len(names):
        each = f"a file for each of {', '.join(names)}"
        raise UserError(f"{field} names {len(files)} files: name {each} ('{RANDOM}' for tests)")
    values: FlatParams = {}
    about: dict[str, dict[str, str]] = {}
    for name, file in zip(names, files, strict=True):
        start = f"{PREFIX}{name}/"
        shapes = {k: v for k, v in network.norm_stats_shapes.items() if k.startswith(start)}
        if file == RANDOM:
            drawn = network.init(seed)[1]
            values |= {key: np.asarray(drawn[key]) for key in shapes}
            about[name] = {"file": RANDOM, "sha256": f"seed {seed}"}
            continue
        path = expanded_path(file).absolute()
        if not path.is_file():
            raise UserError(f"{path}: no such file, which the {name} modality needs ({field})")
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        about[name] = {"file": str(path), "sha256": digest}
        values |= _read(path, name, shapes)
    require_same_modalities(stored or {}, about)
    return Modalities(values, about)


def require_same_modalities(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError unless the files are those that a checkpoint was trained with."""
    for name, was in stored.items():
        if was["sha256"] != now[name]["sha256"]:
            file = now[name]["file"]
            raise UserError(
                f"{file}: not the {name} network that the checkpoint was trained with, which was "
                f"{was['file']}; name that one in config.model.modality_weights"
            )


def _read(path: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> FlatParams:
    tensors, layout = read_tensors(path), LAYOUTS[name]
    if name == "instance" and not any("/pyramid/" in key for key in shapes):
        tensors = {key: value for key, value in tensors.items() if not key.startswith(_FPN)}
    arrays = from_torch(tensors, shapes, layout=layout, where=f"{path} as {layout.title}")
    if name in _NO_EPSILON:  # ours has one: the scale makes up for it
        for key in [key for key in arrays if key.endswith("/var")]:
            scale = key.removesuffix("var") + "scale"
            arrays[scale] = arrays[scale] * np.sqrt(1 + NORM_EPSILON / arrays[key])
    return arrays
