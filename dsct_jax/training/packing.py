"""Many small arrays as a few long ones: how a checkpoint holds a state of a thousand arrays.

Writing an array costs tensorstore and orbax half a millisecond to two, however small it is, and
about 1 KiB of memory that they never give back (docs/training.md, "Soak"); a long array is written
and read in pieces, side by side. So what is whole on every device is laid end to end, one vector
for each part of the state and type. Arrays that are spread over devices (FSDP) stay as they are:
each device writes its own share.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

PREFIX = "packed."
Layout = dict[
    str, dict[str, list[int]]
]  # name of a vector -> name and shape of what lies in it, in order


def part_of(name: str) -> str:
    """The part of the state that an array, or a vector of them, belongs to, such as 'params' or
    'ema'.
    """
    return name.removeprefix(PREFIX).split(".", 1)[0]


def pack(values: Mapping[str, jax.Array]) -> tuple[dict[str, Any], Layout]:
    """({name: array}, where everything lies); 'packed.params.float32' and the like are numpy
    vectors, copies of `values`.
    """
    whole = {name: value for name, value in values.items() if value.is_fully_replicated}
    layout: Layout = {}
    for name, value in whole.items():
        layout.setdefault(f"{PREFIX}{part_of(name)}.{value.dtype.name}", {})[name] = list(
            value.shape
        )
    on_host = jax.device_get(whole)
    vectors = {
        vector: np.concatenate([on_host[name].ravel() for name in inside])
        for vector, inside in layout.items()
    }
    return vectors | {name: value for name, value in values.items() if name not in whole}, layout


def unpack(packed: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The inverse of `pack`; what was packed comes as numpy arrays of their own. Raises LookupError
    or ValueError when the two do not fit.
    """
    values = {name: value for name, value in packed.items() if not name.startswith(PREFIX)}
    for vector in packed.keys() - values.keys():
        shapes = layout[vector]
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
        if ends[-1] != len(packed[vector]):
            raise ValueError(f"{vector} has {len(packed[vector])} numbers instead of {ends[-1]}")
        pieces = np.split(packed[vector], ends[:-1])
        values |= {
            name: piece.reshape(shape).copy()
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
    return values


def shapes_of(packed: Mapping[str, Any], layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shape of everything in `packed`, which needs to have nothing but names and shapes. Raises
    LookupError for a vector without a layout.
    """
    inside = {
        name: tuple(shape)
        for vector in packed
        if vector.startswith(PREFIX)
        for name, shape in layout[vector].items()
    }
    return inside | {
        name: tuple(value.shape) for name, value in packed.items() if not name.startswith(PREFIX)
    }
