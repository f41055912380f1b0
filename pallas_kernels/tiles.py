"""Tile sizes of the GPU kernels: a frozen table by device and shape class, with a default that is
legal for every shape.

`python -m pallas_kernels.tuner` measures candidates and writes tile_table.py; nothing is measured
at import or while tracing.
"""

import dataclasses

from pallas_kernels.tile_table import TABLE

MANY_QUERIES = 4096  # from here on one program per query block fills any GPU, whatever the block


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program of a kernel works on."""

    queries: int  # power of two
    warps: int


def shape_class(direction: str, dtype: str, queries: int) -> str:
    """Key of a table entry: "forward" or "backward", type of the values, few or many queries."""
    return f"{direction} {dtype} {'many' if queries >= MANY_QUERIES else 'few'}"


def choose(device_kind: str, direction: str, dtype: str, queries: int) -> Tile:
    """The tuned tile where there is one, else the default."""
    key = shape_class(direction, dtype, queries)
    if key in TABLE.get(device_kind, {}):
        return Tile(*TABLE[device_kind][key])
    return Tile(16, 4) if queries >= MANY_QUERIES else Tile(8, 2)
