"""Starting values from other weights: an ImageNet backbone, a Deformable DETR of COCO, the authors'
DSCT, or a model of our own.

The paper starts from a Deformable DETR trained on COCO: backbone, encoder, decoder and the 300
    object queries, which become the context queries;
its class and box heads are left out, and the subject queries start at random (released
main.py:248-251).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsct_jax.config import differences, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.weights.native import read_native
from dsct_jax.model.build import FlatParams, Network
from dsct_jax.weights.rules import (
    DSCT,
    TORCHVISION,
    TensorLayout,
    Translation,
    detect_layout,
    require_fit,
    translate,
)
from dsct_jax.weights.run_directory import DIRECTORY
from dsct_jax.weights.tensor_files import read_safetensors, read_tensors

_CLASS_HEAD = re.compile(r"class_head/.*")
_RELEASED_CLASS_BIAS = "class_embed_dsct.0.bias"


def load_pretrained(
    path: Path | str,
    functions: Network,
    params: FlatParams,
    norm_stats: FlatParams,
    config: Mapping[str, Any],
    *,
    strict: bool = True,
) -> tuple[FlatParams, FlatParams, list[str]]:
    """(parameters, norm statistics, report) for the start of a training: `params` and `norm_stats`,
    with what the file has in their place.

    What the file is, is told by the names in it: a torchvision ResNet, a Deformable DETR (original
        or Hugging Face names), a released DSCT, or
    a run directory or .safetensors file of our own. A parameter that this kind of file never has
    keeps its value, and so does the class head where the classes are others: by name in models of
    our own, by number in a released DSCT. The lines of the report say what was taken,
    re-initialised, left out and unknown.

    Args:
        config: the configuration to train with; `class_names` and `model` are compared with those
            of a model of our own.
        strict: whether a tensor that is unknown, missing, doubled or of another shape is an error.
            If not, what does not fit is left as it was and reported.

    Raises:
        UserError: the file cannot be read, is of no known kind, or (strict) does not fit: the line
            names the tensors. Nothing is half-loaded.
    """
    path = Path(path)
    shapes = functions.param_shapes | functions.norm_stats_shapes
    if is_native(path):
        found, lines = _from_own(path, shapes, to_builtins(config))
    else:
        tensors = _strip_ddp_prefix(read_tensors(path))
        layout = detect_layout(tensors)
        if layout is None:
            known = "a torchvision ResNet, a Deformable DETR or a DSCT"
            raise UserError(
                f"{path}: the names in it ({', '.join(list(tensors)[:3])}, ...) are not those of "
                f"{known}"
            )
        found, lines = _from_others(path, tensors, shapes, layout)
        if found.problems and strict:
            _require_same_norm(path, functions, layout)
    if strict:
        _require_fit(path, found.problems)
    report = lines + describe(found, shapes)
    return tuple(
        {name: found.arrays.get(name, value) for name, value in flat.items()}
        for flat in (params, norm_stats)
    ) + (report,)  # type: ignore[return-value]


def is_native(path: Path) -> bool:
    """Whether `path` is a run directory of ours or a .safetensors file of `Model.save`."""
    if path.is_dir():
        return path.name == DIRECTORY or (path / DIRECTORY).is_dir()
    return (
        path.suffix == ".safetensors" and path.is_file() and "config" in read_safetensors(path)[1]
    )


def describe(found: Translation, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Four lines: what was taken, re-initialised, left out, and unknown or unfit."""
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    taken = sum(sizes[name] for name in found.arrays)
    share = (
        f"{len(found.arrays)} of {len(shapes)} arrays, {taken:,} of {sum(sizes.values()):,} numbers"
    )
    return [
        f"  taken: {share}, from {len(found.taken)} tensors",
        f"  re-initialised: {_summary(name for name in shapes if name not in found.arrays)}",
        f"  left out: {_summary(found.left_out)}",
        f"  unknown: {'; '.join(found.problems) or 'none'}",
    ]


def _summary(names: Iterable[str]) -> str:
    """Names by the part that says what they are, with the number of each: 'class_embed (12),
    subject_queries'.
    """
    counts = Counter(
        re.split(
            r"[./](?=\d)|[./](?=(?:weight|bias|kernel|scale|mean|var|num_batches_tracked)$)", name
        )[0]
        for name in names
    )
    return (
        ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
        or "none"
    )


def _strip_ddp_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names without the `module.` that PyTorch's DistributedDataParallel puts before all of them."""
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _from_others(
    path: Path,
    tensors: dict[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    layout: TensorLayout,
) -> tuple[Translation, list[str]]:
    lines = [f"{path}: {layout.title}, {len(tensors)} tensors"]
    found = tensors.get(_RELEASED_CLASS_BIAS)
    if found is None or found.shape == tuple(shapes["class_head/bias"]):
        return translate(tensors, shapes, layout=layout), lines
    heads = tuple(name for name in tensors if name.startswith(_RELEASED_CLASS_BIAS.split(".")[0]))
    rest = {name: tensor for name, tensor in tensors.items() if name not in heads}
    wanted = {name: shape for name, shape in shapes.items() if not _CLASS_HEAD.fullmatch(name)}
    without_head = translate(rest, wanted, layout=layout)
    lines.append(
        f"  its class head has {len(found)} outputs, this run's {shapes['class_head/bias'][0]}: "
        "the class head starts anew"
    )
    return dataclasses.replace(without_head, left_out=(*without_head.left_out, *heads)), lines


def _from_own(
    path: Path, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]
) -> tuple[Translation, list[str]]:
    params, norm_stats, stored, *_ = read_native(path)
    arrays: dict[str, np.ndarray] = {
        name: np.asarray(value) for name, value in {**params, **norm_stats}.items()
    }
    same_classes = stored.get("class_names") == config.get("class_names") and stored.get(
        "multi_label"
    ) == config.get("multi_label")
    left_out = [] if same_classes else [name for name in arrays if _CLASS_HEAD.fullmatch(name)]
    wanted = {
        name: shape
        for name, shape in shapes.items()
        if same_classes or not _CLASS_HEAD.fullmatch(name)
    }
    problems = [f"{name} is missing" for name in wanted if name not in arrays]
    problems += [f"{name} is unknown to this model" for name in arrays if name not in shapes]
    problems += [
        f"{name} has shape {arrays[name].shape} where the model has {tuple(shape)}"
        for name, shape in wanted.items()
        if name in arrays and arrays[name].shape != tuple(shape)
    ]
    fitting = {
        name: arrays[name]
        for name, shape in wanted.items()
        if name in arrays and arrays[name].shape == tuple(shape)
    }
    without = tuple(name for name in shapes if name not in wanted)
    lines = [f"{path}: a model of ours, {len(arrays)} arrays"]
    if not same_classes:
        lines.append("  other classes than this run's: the class head starts anew")
    if changed := differences(
        {"model": stored.get("model", {})}, {"model": config.get("model", {})}
    ):
        lines.append(f"  it was trained with other settings: config.{'; config.'.join(changed)}")
    return Translation(fitting, tuple(fitting), tuple(left_out), without, tuple(problems)), lines


def _require_fit(path: Path, problems: tuple[str, ...]) -> None:
    try:
        require_fit(problems)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _require_same_norm(path: Path, functions: Network, layout: TensorLayout) -> None:
    """The commonest misfit in words: these files hold a backbone with BatchNorm."""
    if functions.config.norm != "frozen_batch" and layout in (TORCHVISION, DSCT):
        raise UserError(
            f"{path}: its backbone has BatchNorm; set config.model.norm=frozen_batch instead of "
            f"{functions.config.norm}"
        )
