"""The model's values as one flat dictionary 'a/b/c' -> array, and back: what is trained, saved and
exchanged.
"""

from typing import Any

import jax
from flax import nnx

from dsct_jax.model.dsct import DSCT, DSCTConfig
from dsct_jax.model.layers import NormStatistic

FlatParams = dict[str, Any]  # path -> array, on the device or the host


def flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> {'a/b/c': leaf}, in the order of the tree."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}/") if isinstance(value, dict) else {path: value})
    return flat


def unflatten(flat: dict[str, Any]) -> dict[Any, Any]:
    """The inverse of `flatten`; a part that is a number becomes an int, as in Flax's lists."""
    tree: dict[Any, Any] = {}
    for path, leaf in flat.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


class Network:
    """A model's static half: what turns flat values into a callable network. Hashable by identity,
    so it may be closed over by jit.
    """

    def __init__(self, config: DSCTConfig):
        self.config = config
        abstract = nnx.eval_shape(lambda: DSCT(config, rngs=nnx.Rngs(params=0)))
        graph, params, norm_stats = nnx.split(abstract, nnx.Param, NormStatistic)  # type: ignore[misc]
        self.graph: nnx.GraphDef = graph
        self.param_shapes = {
            k: tuple(v.shape) for k, v in flatten(nnx.to_pure_dict(params)).items()
        }
        self.norm_stats_shapes = {
            k: tuple(v.shape) for k, v in flatten(nnx.to_pure_dict(norm_stats)).items()
        }
        self._abstract = (params, norm_stats)

    def init(self, seed: int) -> tuple[FlatParams, FlatParams]:
        """Fresh values: (trainable parameters, norm statistics)."""

        _, params, norm_stats = nnx.split(
            DSCT(self.config, rngs=nnx.Rngs(params=seed)), nnx.Param, NormStatistic
        )  # type: ignore[misc]
        return flatten(nnx.to_pure_dict(params)), flatten(nnx.to_pure_dict(norm_stats))

    def bind(self, params: FlatParams, norm_stats: FlatParams) -> DSCT:
        """The network with these values."""
        states = []
        for abstract, flat in zip(self._abstract, (params, norm_stats), strict=True):
            state = jax.tree.map(lambda x: x, abstract)
            nnx.replace_by_pure_dict(state, unflatten(flat))
            states.append(state)
        return nnx.merge(self.graph, *states, copy=True)
