"""The registry of networks, and a network's values as one flat dictionary 'a/b/c' -> array."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsct_jax.batch import Batch, FlatParams, padding_mask
from dsct_jax.config import cannot_be_used, dataclass_from_dict
from dsct_jax.crops import CropConfig, normalize_crops
from dsct_jax.model.anchor_detr import AnchorDETR, AnchorDetrConfig
from dsct_jax.model.conditional_detr import ConditionalDETR, ConditionalDetrConfig
from dsct_jax.model.dab_deformable_detr import DabDeformableDetr, DabDeformableDetrConfig
from dsct_jax.model.dab_detr import DabDETR, DabDetrConfig
from dsct_jax.model.deformable_detr import DeformableDetr, DeformableDetrConfig
from dsct_jax.model.deta import Deta, DetaConfig
from dsct_jax.model.detr import DETR, DetrConfig
from dsct_jax.model.dino import Dino, DinoConfig
from dsct_jax.model.dsct import DSCT, DSCTConfig
from dsct_jax.model.dsct_dino import DsctDino, DsctDinoConfig
from dsct_jax.model.layers import MovingStatistic, NormStatistic
from dsct_jax.model.two_stage import TwoStage, TwoStageConfig
from dsct_jax.preprocess import Size, normalize


class Entry(NamedTuple):
    """A network that `config.model.name` can choose."""

    config: type  # frozen dataclass of `setting`s: `num_classes` (shared), `name`, and its own
    network: Callable[..., nnx.Module]  # (config, rngs) -> module; see docs/architecture.md
    objective: str  # what training minimizes


NETWORKS: dict[str, Entry] = {
    "dsct": Entry(DSCTConfig, DSCT, "set_prediction"),
    "dsct_dino": Entry(DsctDinoConfig, DsctDino, "set_prediction"),
    "detr": Entry(DetrConfig, DETR, "set_prediction"),
    "conditional_detr": Entry(ConditionalDetrConfig, ConditionalDETR, "set_prediction"),
    "dab_detr": Entry(DabDetrConfig, DabDETR, "set_prediction"),
    "anchor_detr": Entry(AnchorDetrConfig, AnchorDETR, "set_prediction"),
    "deformable_detr": Entry(DeformableDetrConfig, DeformableDetr, "set_prediction"),
    "dab_deformable_detr": Entry(DabDeformableDetrConfig, DabDeformableDetr, "set_prediction"),
    "dino": Entry(DinoConfig, Dino, "set_prediction"),
    "deta": Entry(DetaConfig, Deta, "set_prediction"),
    "two_stage": Entry(TwoStageConfig, TwoStage, "classification"),
}


def network_entry(section: Mapping[str, Any]) -> Entry:
    """The network that a `model` section names; sections older than `name` mean dsct."""
    name = section.get("name", "dsct")
    if name not in NETWORKS:
        raise cannot_be_used("model.name", name, f"one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def network_config(section: Mapping[str, Any], num_classes: int) -> Any:
    """The `model` section of a configuration as its network's dataclass. Raises UserError."""
    config = network_entry(section).config
    return dataclass_from_dict(config, "model", section, num_classes=num_classes)


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
    """A model's static half: turns flat values into a network. Hashable by identity, for jit."""

    def __init__(self, config: Any):
        self.config, self.entry = config, NETWORKS[config.name]
        abstract = nnx.eval_shape(lambda: self._make(0))
        self.graph, *states = nnx.split(abstract, nnx.Param, NormStatistic)
        self._abstract = states
        self.param_shapes, self.norm_stats_shapes = (
            {path: tuple(value.shape) for path, value in flatten(nnx.to_pure_dict(state)).items()}
            for state in states
        )

    def _make(self, seed: int) -> nnx.Module:
        return self.entry.network(self.config, rngs=nnx.Rngs(params=seed))

    def init(self, seed: int) -> tuple[FlatParams, FlatParams]:
        """Fresh values: (trainable parameters, norm statistics)."""
        _, params, norm_stats = nnx.split(self._make(seed), nnx.Param, NormStatistic)  # type: ignore[misc]
        return flatten(nnx.to_pure_dict(params)), flatten(nnx.to_pure_dict(norm_stats))

    def bind(self, params: FlatParams, norm_stats: FlatParams) -> Any:
        """The network with these values."""
        states = []
        for abstract, flat in zip(self._abstract, (params, norm_stats), strict=True):
            state = jax.tree.map(lambda x: x, abstract)
            nnx.replace_by_pure_dict(state, unflatten(flat))
            states.append(state)
        return nnx.merge(self.graph, *states, copy=True)

    def input_specs(self, b: Any, size: Size) -> dict[str, jax.ShapeDtypeStruct]:
        """What the network takes, by name: `b` normalized images of (height, width) and their
        padding mask, or the contexts and subjects of a two-stage network.
        """
        images = jax.ShapeDtypeStruct((b, *size, 3), jnp.float32)
        if isinstance(self.config, CropConfig):
            side = self.config.subject_size
            return {
                "images": images,
                "subjects": jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32),
            }
        return {"images": images, "padding_mask": jax.ShapeDtypeStruct((b, *size), jnp.bool_)}

    def inputs(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What the network takes of a batch, normalized; images that are floating point already
        count as normalized.
        """
        if batch.subjects is not None:
            return normalize_crops(batch.images, batch.subjects, self.config.pixels)
        mask = padding_mask(batch.sizes, *batch.images.shape[1:3])
        if jnp.issubdtype(batch.images.dtype, jnp.floating):
            return batch.images, mask
        return normalize(batch.images, mask), mask


def moving_statistics(network: nnx.Module) -> FlatParams:
    """The statistics that a forward pass in training has moved, by path."""
    return flatten(nnx.to_pure_dict(nnx.state(network, MovingStatistic)))
