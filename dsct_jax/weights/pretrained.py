"""Initial parameters from other weights: an ImageNet backbone, a Deformable DETR of COCO, the
authors' DSCT, or a model of our own.

The paper starts from a Deformable DETR trained on COCO: backbone, encoder, decoder and the 300
object queries, which become the context queries; its class and box heads are left out, and the
subject queries start at random (released main.py:248-251).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dsct_jax.batch import FlatParams
from dsct_jax.config import differences
from dsct_jax.errors import UserError
from dsct_jax.model.build import Network
from dsct_jax.weights.hub import local_path
from dsct_jax.weights.layouts import LAYOUTS, detect_layout, hugging_face_layout_of, layout_of
from dsct_jax.weights.modalities import without_modalities
from dsct_jax.weights.native import is_native, read_native
from dsct_jax.weights.rules import (
    TensorLayout,
    Translation,
    original_of,
    require_fit,
    torch_names,
    translate,
)
from dsct_jax.weights.tensor_files import read_tensors

_CLASS_HEAD = ("class_head/", "heads/classes/", "proposal_heads/classes/", "label_embed")
Shapes = Mapping[str, tuple[int, ...]]


def load_pretrained(
    path: Path | str,
    network: Network,
    params: FlatParams,
    norm_stats: FlatParams,
    *,
    class_names: Sequence[str],
    multi_label: bool,
    strict: bool = True,
) -> tuple[FlatParams, FlatParams, list[str]]:
    """(parameters, norm statistics, report) for the start of a training: `params` and `norm_stats`,
    with what the file has in their place. The names in the file say of which kind it is.

    A parameter that this kind of file never has keeps its value, and so does the class head where
    the classes are others: by name in models of our own, by number in a released DSCT.

    Args:
        class_names, multi_label: of the training, compared with those of a model of our own.
        strict: whether a tensor that is unknown, missing, doubled or of another shape is an error.
            If not, what does not fit is left as it was and reported.

    Raises:
        UserError: the file cannot be read, is of no known kind, or (strict) does not fit.
    """
    # the frozen networks have files of their own
    shapes = network.param_shapes | without_modalities(network.norm_stats_shapes)
    path = local_path(path)
    if is_native(path):
        found, lines = _from_native(path, network, shapes, tuple(class_names), multi_label)
    else:
        tensors = read_tensors(path)
        if all(name.startswith("module.") for name in tensors):  # DistributedDataParallel's
            tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
        own = layout_of(network.config), hugging_face_layout_of(network.config)
        layout = detect_layout(tensors, *own)
        if layout is None:
            names, known = list(tensors)[:3], [one.title for one in reversed(LAYOUTS)]
            raise UserError(
                f"{path}: the names in it ({', '.join(names)}, ...) are not those of a "
                f"{', '.join(known)}"
            )
        found, lines = _from_third_party(path, tensors, shapes, layout)
        if found.problems and strict:
            layout.require_fields(network.config, str(path))
    if strict:
        require_fit(found.problems, where=str(path))
    taken, kept = (
        {name: found.arrays.get(name, value) for name, value in flat.items()}
        for flat in (params, norm_stats)
    )
    return taken, kept, lines + describe(found, shapes)


def describe(found: Translation, shapes: Shapes) -> list[str]:
    """Four lines: what was taken, re-initialized, left out, and unknown or unfit."""
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    taken = sum(sizes[name] for name in found.arrays)
    return [
        f"  taken: {len(found.arrays)} of {len(shapes)} arrays, {taken:,} of "
        f"{sum(sizes.values()):,} numbers, from {len(found.taken)} tensors",
        f"  re-initialized: {_summary(name for name in shapes if name not in found.arrays)}",
        f"  left out: {_summary(found.left_out)}",
        f"  unknown: {'; '.join(found.problems) or 'none'}",
    ]


_NUMBER_OR_LEAF = re.compile(
    r"[./](?=\d)|[./](?=(?:weight|bias|kernel|scale|mean|var|num_batches_tracked)$)"
)


def _summary(names: Iterable[str]) -> str:
    """Names by their telling part, with the number of each: 'class_embed (12), level_embed'."""
    counts = Counter(_NUMBER_OR_LEAF.split(name)[0] for name in names)
    parts = (name if count == 1 else f"{name} ({count})" for name, count in counts.items())
    return ", ".join(parts) or "none"


def _without_class_head(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(_CLASS_HEAD)}


def _from_third_party(
    path: Path, tensors: dict[str, np.ndarray], shapes: Shapes, layout: TensorLayout
) -> tuple[Translation, list[str]]:
    lines = [f"{path}: {layout.title}, {len(tensors)} tensors"]
    paths = [path for path in shapes if path.startswith(_CLASS_HEAD)]
    heads = {name: shapes[path] for path in paths for name, *_ in torch_names(path, layout)}
    biases = [name for name in heads if name.endswith("bias") and name in tensors]
    changed = [name for name in biases if tensors[name].shape != tuple(heads[name])]
    if not changed:
        return translate(tensors, shapes, layout=layout), lines
    left_out = [name for name in tensors if original_of(name, layout) in heads]
    rest = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    found = translate(rest, _without_class_head(shapes), layout=layout)
    outputs, wanted = len(tensors[changed[0]]), heads[changed[0]][0]
    sizes = f"  its class head has {outputs} outputs, this run's {wanted}"
    lines.append(f"{sizes}: the class head is re-initialized")
    return dataclasses.replace(found, left_out=found.left_out + left_out), lines


def _from_native(
    path: Path, network: Network, shapes: Shapes, class_names: tuple[str, ...], multi_label: bool
) -> tuple[Translation, list[str]]:
    params, norm_stats, stored, *_ = read_native(path)
    values = {**params, **without_modalities(norm_stats)}
    arrays = {name: np.asarray(value) for name, value in values.items()}
    lines = [f"{path}: a model of ours, {len(arrays)} arrays"]
    wanted, left_out = shapes, []
    if (stored.get("class_names"), stored.get("multi_label")) != (class_names, multi_label):
        lines.append("  other classes than this run's: the class head is re-initialized")
        wanted = _without_class_head(shapes)
        left_out = [name for name in arrays if name.startswith(_CLASS_HEAD)]
    fitting, problems = {}, []
    for name, shape in wanted.items():
        if name not in arrays:
            problems.append(f"{name} is missing")
        elif arrays[name].shape == tuple(shape):
            fitting[name] = arrays[name]
        else:
            found = arrays[name].shape
            problems.append(f"{name} has shape {found} where the model has {tuple(shape)}")
    problems += [f"{name} is unknown to this model" for name in arrays if name not in shapes]
    model = dataclasses.asdict(network.config)
    if changed := differences({"model": stored.get("model", {})}, {"model": model}):
        lines.append(f"  it was trained with other settings: config.{'; config.'.join(changed)}")
    unmatched = [name for name in shapes if name not in wanted]
    return Translation(fitting, list(fitting), left_out, unmatched, problems), lines
