"""What passes between the two halves of a training step, and the host's part between them.

Between the halves every array leads with an axis of one per device, along which shard_map puts the
devices' values together, whatever their shapes mean.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsct_jax.batch import FlatParams
from dsct_jax.parallel import BATCH


def add_axis(tree: Any) -> Any:
    """The leading axis, on the device that computed the values."""
    return jax.tree.map(lambda x: x[None], tree)


def drop_axis(tree: Any) -> Any:
    """The inverse of `add_axis`."""
    return jax.tree.map(lambda x: x[0], tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PullBack:
    """A pull-back between two compiled functions: without the parameters that it refers to, which
    both have, and without anything twice.
    """

    kept: list[Any]  # arbitrary shapes
    # of each leaf of the closure: in `kept`, or the parameter's path
    places: tuple[int | str, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def pack(cls, pull_back: Any, parameters: FlatParams) -> "PullBack":
        """Of what jax.vjp returned, in the function that called it."""
        leaves, structure = jax.tree.flatten(pull_back)
        places: dict[int, int | str] = {id(value): path for path, value in parameters.items()}
        kept: list[Any] = []
        for leaf in leaves:
            if id(leaf) not in places:
                places[id(leaf)] = len(kept)
                kept.append(leaf)
        return cls(kept, tuple(places[id(leaf)] for leaf in leaves), structure)

    def unpack(self, parameters: FlatParams) -> Any:
        """The pull-back again."""
        leaves = [
            parameters[place] if isinstance(place, str) else self.kept[place]
            for place in self.places
        ]
        return jax.tree.unflatten(self.structure, leaves)


def run_on_host(half: Callable[[Any], Any], problem: Any) -> Any:
    """`half` of each addressable device's part of `problem`; returns arrays on the same devices."""
    leaves, structure = jax.tree.flatten(problem)
    parts: dict[jax.Device, list[np.ndarray]] = {}
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            parts.setdefault(shard.device, []).append(np.asarray(shard.data)[0])
    solved = [
        jax.device_put(add_axis(half(jax.tree.unflatten(structure, part))), device)
        for device, part in parts.items()
    ]
    sharding = leaves[0].sharding
    return jax.tree.map(
        lambda *shards: jax.make_array_from_single_device_arrays(
            (sharding.mesh.size, *shards[0].shape[1:]), sharding, list(shards)
        ),
        *solved,
    )


def shapes_from_host(half: Callable[[Any], Any], problem: Any, mesh: Mesh) -> Any:
    """What `run_on_host` returns for a `problem` of ShapeDtypeStructs, as ShapeDtypeStructs."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype, sharding=sharding),
        half(jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), problem)),
    )
