"""Many small arrays as a few long ones: how a checkpoint holds a state of a thousand arrays.

Writing an array costs orbax half a millisecond to two, however small it is, and about 1 KiB of
memory for good (docs/training.md, "Soak"). So what is whole on every device is laid end to end, one
vector per part of the state and type. Arrays that are spread over devices (FSDP) stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

PREFIX = "packed."
# name of a vector -> name and shape of what lies in it, in order
Layout = dict[str, dict[str, list[int]]]


def part_of(name: str) -> str:
    """The part of the state, such as 'params' or 'ema', that an array or a vector belongs to."""
    return name.removeprefix(PREFIX).split(".", 1)[0]


def pack(values: Mapping[str, jax.Array]) -> tuple[dict[str, Any], Layout]:
    """(arrays by name, where everything lies); 'packed.params.float32' and the like are vectors."""
    whole = {name: value for name, value in values.items() if value.is_fully_replicated}
    layout: Layout = {}
    for name, value in whole.items():
        vector = f"{PREFIX}{part_of(name)}.{value.dtype.name}"
        layout.setdefault(vector, {})[name] = list(value.shape)
    host = jax.device_get(whole)
    vectors = {
        vector: np.concatenate([host[name].ravel() for name in shapes])
        for vector, shapes in layout.items()
    }
    return vectors | {name: value for name, value in values.items() if name not in whole}, layout


def unpack(packed: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The inverse of `pack`; what was packed comes as numpy arrays of their own. Raises LookupError
    or ValueError when the two do not fit.
    """
    values: dict[str, Any] = {}
    for vector, array in packed.items():
        if not vector.startswith(PREFIX):
            values[vector] = array
            continue
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in layout[vector].values()])
        if ends[-1] != len(array):
            raise ValueError(f"{vector} has {len(array)} numbers instead of {ends[-1]}")
        pieces = np.split(array, ends[:-1])
        for (name, shape), piece in zip(layout[vector].items(), pieces, strict=True):
            values[name] = piece.reshape(shape).copy()
    return values
