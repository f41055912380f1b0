"""DSCT: one network from an image to the boxes and emotions of its people (paper Fig. 3)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsct_jax.batch import Predictions
from dsct_jax.config import cannot_be_used, setting
from dsct_jax.model.attention import Memory
from dsct_jax.model.decoder import Decoder, FusionConfig, deformable_look
from dsct_jax.model.family import Pyramid, PyramidConfig, for_images
from dsct_jax.model.heads import BoxHead, ClassHead
from dsct_jax.model.layers import Linear, standard_normal


@dataclasses.dataclass(frozen=True)
class ContextConfig:
    """Settings of context queries and of how subject queries take them in."""

    num_context_queries: int = setting(300, "M, as Deformable DETR; 0 = Table 6's baseline", low=0)
    num_spatial_neighbors: int = setting(100, "K_sp, 0 = off (Figure 11)", low=0)
    num_semantic_neighbors: int = setting(50, "K_sm, 0 = off (Figure 11)", low=0)
    fusion: str = setting(
        "paper",
        "paper: Eq. 8, one softmax over both selections; released: two, and a subject-subject term",
        choices=("paper", "released"),
    )
    semantic_selection: str = setting(
        "smallest", "the paper's text; largest: the released code", choices=("smallest", "largest")
    )
    reweighting: str = setting(
        "semantic",
        "Table 7; scaled (ours): semantic, by the dot product over the root of the width, so that "
        "no query takes all of the weight",
        choices=("semantic", "equal", "spatial", "attentive", "scaled"),
    )
    context_gate: bool = setting(
        False,
        "what is gathered counts by a factor per channel that is learned from 0 on, so that a "
        "subject begins as it would without context (ours)",
    )
    fusion_layers: tuple[int, ...] = setting(
        (), "decoder layers that fuse, from 0 (Table 8); () = all, late fusion = the last", low=0
    )

    def check_context(self, num_decoder_layers: int) -> None:
        """Raises UserError for numbers that do not go together."""
        last, enough = num_decoder_layers - 1, "at most config.model.num_context_queries"
        spatial, semantic = self.num_spatial_neighbors, self.num_semantic_neighbors
        most = self.num_context_queries or max(spatial, semantic)
        enough += f" ({most})"
        for field, fits, wanted in (
            ("num_spatial_neighbors", spatial <= most, enough),
            ("num_semantic_neighbors", semantic <= most, enough),
            ("fusion_layers", max(self.fusion_layers, default=0) <= last, f"of layers 0 to {last}"),
        ):
            if not fits:
                raise cannot_be_used(f"model.{field}", getattr(self, field), wanted)

    def fusion_of_layer(self, layer: int) -> FusionConfig | None:
        """How decoder layer `layer` fuses, None where it does not."""
        chosen = not self.fusion_layers or layer in self.fusion_layers
        neighbors = self.num_spatial_neighbors + self.num_semantic_neighbors
        if not (chosen and neighbors and self.num_context_queries):
            return None
        numbers = self.num_spatial_neighbors, self.num_semantic_neighbors
        rules = self.fusion, self.semantic_selection
        return FusionConfig(*rules, *numbers, self.reweighting, self.context_gate)


@dataclasses.dataclass(frozen=True)
class DSCTConfig(ContextConfig, PyramidConfig):
    """The model section of a configuration, and the number of classes."""

    name: str = setting("dsct", "a name of dsct_jax.model.build.NETWORKS", choices=("dsct",))
    num_subject_queries: int = setting(4, "N (Table 5: 4 for EMOTIC, 9 for CAER-S)", low=1)
    box_refinement: bool = setting(
        False,
        "each layer samples inside the box of the one before and refines it (Zhu et al. 2020)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_context(self.num_decoder_layers)


class DSCT(Pyramid):
    """Decoupled Subject-Context Transformer."""

    config: DSCTConfig

    def __init__(self, config: DSCTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d = config.hidden_dim
        m, q = config.num_context_queries, config.num_subject_queries
        if m:  # no array without elements: checkpoints cannot hold one
            self.context_queries = nnx.Param(standard_normal(rngs.params(), (m, 2 * d)))
        self.subject_queries = nnx.Param(standard_normal(rngs.params(), (q, 2 * d)))
        self.reference_points = Linear(d, 2, rngs=rngs)
        layer = partial(self.decoder_layer, num_context=m, rngs=rngs)
        self.decoder = Decoder(
            lambda i: layer(i, fusion=config.fusion_of_layer(i)), config.num_decoder_layers
        )
        self.class_head = ClassHead(d, config.num_classes, subject=True, rngs=rngs)
        self.box_head = BoxHead(d, refines=config.box_refinement, rngs=rngs)

    def decode(self, memory: Memory, people: Any, noise: Any) -> Predictions:
        """Memory -> predictions; `people` is not read."""
        m, context = self.config.num_context_queries, []
        if m:
            context = [self.context_queries[...]]
        embedding = jnp.concatenate([*context, self.subject_queries[...]])
        positions, tokens = jnp.split(for_images(embedding, memory.tokens.shape[0]), 2, -1)
        points = jax.nn.sigmoid(self.reference_points(positions))
        references = self.box_head.references(points, m)
        look, how = deformable_look(memory, positions), {"refines": self.box_head.refines}
        return self.run(tokens, references, memory, look, noise, num_context=m, **how)
