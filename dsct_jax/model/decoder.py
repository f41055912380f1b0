"""The DSCT decoder: decoupled subject and context queries, fused in every layer (paper Fig. 4)."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.model.attention import (
    DeformableAttention,
    LayerShape,
    MultiHeadAttention,
    SpatialShapes,
)
from dsct_jax.model.encoder import FeedForward, Memory
from dsct_jax.model.heads import BoxHead
from dsct_jax.model.layers import DropoutNoise, LayerNorm, Linear, dropout, rematerialized


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """How a subject query takes in context queries; DSCTConfig explains the fields."""

    rule: str  # paper | released
    semantic_selection: str  # smallest | largest
    num_spatial_neighbors: int
    num_semantic_neighbors: int
    reweighting: str  # semantic | equal | spatial | attentive


def smallest_k_mask(scores: Float[Array, "*n m"], k: int) -> Bool[Array, "*n m"]:
    """True at the `k` smallest scores of each row, of equals the first; local to its shard."""
    if k == 0:
        return jnp.zeros(scores.shape, bool)
    values, indices = jax.lax.top_k(-scores, k)
    last_value, last_index = values[..., -1:], indices[..., -1:]
    before = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1) <= last_index
    return (-scores > last_value) | ((-scores == last_value) & before)


def weighted_softmax(
    logits: Float[Array, "b q m"], counts: Float[Array, "b q m"]
) -> Float[Array, "b q m"]:
    """Softmax in which entry m counts `counts` times (0: excluded); a row of zeros gives zeros."""
    peak = jnp.where(counts > 0, logits, -jnp.inf).max(-1, keepdims=True)
    peak = jax.lax.stop_gradient(peak)
    weights = counts * jnp.exp(jnp.where(counts > 0, logits - peak, 0))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def subject_context_fusion(
    subject: Float[Array, "b q d"],
    context: Float[Array, "b m d"],
    subject_points: Float[Array, "b q 2"],
    context_points: Float[Array, "b m 2"],
    *,
    config: FusionConfig,
    attentive_logits: Float[Array, "b q m"] | None = None,
) -> tuple[Float[Array, "b q d"], dict[str, jax.Array]]:
    """Spatial-semantic relational aggregation: the subject queries plus what they gather from
    context queries selected by distance (Eq. 6) and by dot product (Eq. 7, not scaled).

    "paper" adds one weighted sum over both selections (Eq. 8; a query selected twice counts twice),
    "released" one per selection and one over the subject queries (transformer.py:327-330). Points
    are in [0, 1] of the padded canvas. Returns also the selections and weights [b q m].
    """
    relevance = jnp.einsum("bqd,bmd->bqm", subject, context)
    distance = jnp.sqrt(jnp.square(subject_points[:, :, None] - context_points[:, None]).sum(-1))
    distance = jax.lax.stop_gradient(distance)
    rank = jax.lax.stop_gradient(relevance)
    rank = rank if config.semantic_selection == "smallest" else -rank
    spatial = smallest_k_mask(distance, config.num_spatial_neighbors).astype(jnp.float32)
    semantic = smallest_k_mask(rank, config.num_semantic_neighbors).astype(jnp.float32)
    choices: dict[str, Any] = {
        "semantic": relevance,
        "equal": jnp.zeros_like(relevance),
        "spatial": -distance,
        "attentive": attentive_logits,
    }
    logits = choices[config.reweighting]
    if config.rule == "paper":
        weights = weighted_softmax(logits, spatial + semantic)
    else:
        weights = weighted_softmax(logits, spatial) + weighted_softmax(logits, semantic)
    gathered = jnp.einsum("bqm,bmd->bqd", weights, context)
    if config.rule == "released":
        among_subjects = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", subject, subject))
        gathered += jnp.einsum("bqk,bkd->bqd", among_subjects, subject)
    return subject + gathered, {
        "spatial_selection": spatial > 0,
        "semantic_selection": semantic > 0,
        "context_weights": weights,
    }


class DecoderLayer(nnx.Module):
    """Self-attention of all queries, deformable cross-attention, fusion, feed-forward block; tokens
    are ordered as released: `num_context` context queries, then the subject queries.
    """

    def __init__(
        self, shape: LayerShape, *, num_context: int, fusion: FusionConfig | None, rngs: nnx.Rngs
    ):
        d, self.dropout_rate = shape.d, shape.dropout
        self.num_context, self.fusion = num_context, fusion
        self.self_attention = MultiHeadAttention(d, num_heads=shape.num_heads, rngs=rngs)
        self.norm2 = LayerNorm(d, rngs=rngs)  # numbered as in the released weights
        self.cross_attention = DeformableAttention(shape, rngs=rngs)
        self.norm1 = LayerNorm(d, rngs=rngs)
        attentive = fusion is not None and fusion.reweighting == "attentive"
        self.context_logits = Linear(d, num_context, rngs=rngs) if attentive else None
        self.feedforward = FeedForward(shape, rngs=rngs)
        self.norm3 = LayerNorm(d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        reference_points: Float[Array, "b q l 2"],
        memory: Float[Array, "b s d"],
        memory_padding: Bool[Array, "b s"],
        spatial_shapes: SpatialShapes,
        *,
        boxes: Float[Array, "b q l 2"] | None = None,
        hidden: Bool[Array, "#b #q q"] | None = None,
        noise: DropoutNoise | None,
        implementation: str | None,
    ) -> tuple[Float[Array, "b q d"], dict[str, jax.Array]]:
        """Returns the tokens and what the layer looked at; points and `boxes` are of each map;
        `hidden` queries are not seen by a query.
        """
        placed = tokens + positions
        attended, self_weights = self.self_attention(placed, placed, tokens, hidden=hidden)
        tokens = self.norm2(tokens + dropout(attended, self.dropout_rate, noise))
        where = (reference_points, memory, memory_padding, spatial_shapes)
        attended, details = self.cross_attention(
            tokens + positions, *where, boxes=boxes, implementation=implementation
        )
        tokens = self.norm1(tokens + dropout(attended, self.dropout_rate, noise))
        if self.fusion is not None:
            tokens, selected = self._fuse(tokens, reference_points[:, :, 0])
            details |= selected
        inner = dropout(self.feedforward(tokens, noise), self.dropout_rate, noise)
        tokens = self.norm3(tokens + inner)
        return tokens, details | {"self_attention_weights": self_weights}

    def _fuse(
        self, tokens: Float[Array, "b q d"], points: Float[Array, "b q 2"]
    ) -> tuple[Float[Array, "b q d"], dict[str, jax.Array]]:
        """In float32: few tokens, and a selection that rounding would change."""
        assert self.fusion is not None
        context, subject = jnp.split(tokens, [self.num_context], axis=1)
        context_points, subject_points = jnp.split(points, [self.num_context], axis=1)
        exact = subject.astype(jnp.float32), context.astype(jnp.float32)
        logits = self.context_logits(exact[0]) if self.context_logits else None
        fused, selected = subject_context_fusion(
            *exact, subject_points, context_points, config=self.fusion, attentive_logits=logits
        )
        return jnp.concatenate([context, fused.astype(tokens.dtype)], 1), selected


class Queries(NamedTuple):
    """Context queries, then subject queries, before the first layer."""

    tokens: Float[Array, "b q d"]
    positions: Float[Array, "b q d"]
    reference_points: Float[Array, "b q 2"]  # (x, y) in [0, 1] of the image


class Decoder(nnx.List):
    """The decoder's layers, in order, each with a box from the shared head."""

    def __init__(
        self,
        shape: LayerShape,
        *,
        num_context: int,
        fusions: Sequence[FusionConfig | None],
        rngs: nnx.Rngs,
    ):
        layer = partial(DecoderLayer, shape, num_context=num_context, rngs=rngs)
        super().__init__([layer(fusion=fusion) for fusion in fusions])

    def __call__(
        self, queries: Queries, memory: Memory, box_head: BoxHead, *, remat: str, **how: Any
    ) -> tuple[Float[Array, "layers b q d"], Float[Array, "layers b n 4"], list[dict[str, Any]]]:
        """Tokens after each layer, boxes of the subject queries (n), and what the layer looked at.

        `how`: `noise` and `implementation` of each layer. With box refinement a layer samples
        inside the box of the one before and moves it; no gradient flows through it.
        """
        tokens, num_context = queries.tokens, self[0].num_context
        references = box_head.references(queries.reference_points, num_context)
        states, boxes, details = [], [], []
        for layer in self:
            run = partial(layer, spatial_shapes=memory.spatial_shapes, **how)
            points, *sizes = in_each_map(references, memory.valid_ratios)
            with jax.named_scope("decoder"):
                where = (queries.positions, points, memory.tokens, memory.padding)
                tokens, seen = rematerialized(run, remat)(
                    tokens, *where, boxes=sizes[0] if sizes else None
                )
            context, subject = jnp.split(references, [num_context], 1)
            with jax.named_scope("heads"):
                boxes.append(box_head(tokens[:, num_context:].astype(jnp.float32), subject))
            if box_head.refines:
                references = jnp.concatenate([context, jax.lax.stop_gradient(boxes[-1])], 1)
            states.append(tokens)
            details.append(seen)
        return jnp.stack(states), jnp.stack(boxes), details


def in_each_map(
    references: Float[Array, "b q r"], valid_ratios: Float[Array, "b l 2"]
) -> list[Float[Array, "b q l 2"]]:
    """Points, or points and sizes, of the image -> of each level's padded map."""
    parts = references.shape[-1] // 2
    scaled = references[:, :, None] * jnp.tile(valid_ratios, parts)[:, None]
    return jnp.split(scaled, parts, -1)
