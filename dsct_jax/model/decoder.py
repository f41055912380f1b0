"""The decoder of all networks: every layer predicts, and where boxes are refined the next one looks
into those of the one before. DSCT's layers fuse subject and context queries (paper Fig. 4).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions
from dsct_jax.model.attention import DeformableAttention, LayerShape, Memory, MultiHeadAttention
from dsct_jax.model.encoder import Layer
from dsct_jax.model.heads import Heads, SharedHeads, refine
from dsct_jax.model.layers import DropoutNoise, LayerNorm, Linear, rematerialized
from dsct_jax.model.position import YXWH, sine_of
from dsct_jax.model.roi import RoIReading


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """How a subject query takes in context queries; DSCTConfig explains the fields."""

    rule: str  # paper | released
    semantic_selection: str  # smallest | largest
    num_spatial_neighbors: int
    num_semantic_neighbors: int
    reweighting: str  # semantic | equal | spatial | attentive | scaled
    gate: bool = False


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
    gate: Float[Array, " d"] | None = None,
) -> tuple[Float[Array, "b q d"], dict[str, jax.Array]]:
    """Spatial-semantic relational aggregation: the subject queries plus what they gather from
    context queries selected by distance (Eq. 6) and by dot product (Eq. 7, not scaled).

    "paper" adds one weighted sum over both selections (Eq. 8; a query selected twice counts twice),
    "released" one per selection and one over the subject queries (transformer.py:327-330). Points
    are in [0, 1] of the padded canvas; a `gate` scales the sum. Returns also the selections and
    weights [b q m].
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
        "scaled": relevance / subject.shape[-1] ** 0.5,
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
    if gate is not None:
        gathered *= gate.reshape(1, 1, -1)
    return subject + gathered, {
        "spatial_selection": spatial > 0,
        "semantic_selection": semantic > 0,
        "context_weights": weights,
    }


class DeformableLayer(Layer):
    """Self-attention of all queries, deformable cross-attention, and where there is a `fusion` that
    of the queries after the first `num_context`, the context, with these; and where there is a
    `reading` what the boxes of the others hold.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        num_context: int = 0,
        fusion: FusionConfig | None = None,
        reading: RoIReading | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_context, self.fusion = num_context, fusion
        self.reading = reading
        # norms are numbered as in the released weights
        kinds = MultiHeadAttention, DeformableAttention
        super().__init__(shape, *kinds, norms=(2, 1, 3), rngs=rngs)

    def make_fusion(self, shape: LayerShape, rngs: nnx.Rngs) -> None:
        """The layer that weighs context queries, where it is not their relevance that does."""
        attentive = self.fusion is not None and self.fusion.reweighting == "attentive"
        self.context_logits = Linear(shape.d, self.num_context, rngs=rngs) if attentive else None
        gated = self.fusion is not None and self.fusion.gate
        self.context_gate = nnx.Param(jnp.zeros(shape.d)) if gated else None

    def fuse(
        self, tokens: Float[Array, "b q d"], looks: tuple[Any, ...], noise: DropoutNoise | None
    ) -> tuple[Float[Array, "b q d"], dict[str, jax.Array]]:
        """Context first, then what the boxes hold."""
        selected: dict[str, jax.Array] = {}
        if self.fusion is not None:
            tokens, selected = self.fuse_context(tokens, looks[1][1][:, :, 0], self.fusion)
        if self.reading is not None:
            _, points, memory, sizes = looks[1]
            context, subject = jnp.split(tokens, [self.num_context], axis=1)
            centers, sizes = (x[:, self.num_context :, 0] for x in (points, sizes))
            subject = self.reading(subject, memory.fine, centers, sizes, noise)
            tokens = jnp.concatenate([context, subject], 1)
        return tokens, selected

    def fuse_context(
        self, tokens: Float[Array, "b q d"], points: Float[Array, "b q 2"], fusion: FusionConfig
    ) -> tuple[Float[Array, "b q d"], dict[str, jax.Array]]:
        """In float32: few tokens, and a selection that rounding would change."""
        context, subject = jnp.split(tokens, [self.num_context], axis=1)
        context_points, subject_points = jnp.split(points, [self.num_context], axis=1)
        exact = subject.astype(jnp.float32), context.astype(jnp.float32)
        logits = self.context_logits(exact[0]) if self.context_logits else None
        gate = self.context_gate[...] if self.context_gate is not None else None
        weights: dict[str, Any] = {"attentive_logits": logits, "gate": gate}
        fused, selected = subject_context_fusion(
            *exact, subject_points, context_points, config=fusion, **weights
        )
        return jnp.concatenate([context, fused.astype(tokens.dtype)], 1), selected


# (number of the layer, its tokens, their references) -> what each attention takes beside the tokens
Look = Callable[[int, jax.Array, jax.Array], tuple[tuple[Any, ...], ...]]


def deformable_look(
    memory: Memory,
    positions: jax.Array | Callable[[int, jax.Array, jax.Array], jax.Array],
    hidden: Bool[Array, "#b #q q"] | None = None,
) -> Look:
    """That of a DeformableLayer, from where the queries are: [b q d], or anew for every layer."""

    def look(
        layer: int, tokens: jax.Array, references: jax.Array
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        place = positions(layer, tokens, references) if callable(positions) else positions
        place = place.astype(tokens.dtype)
        points, *boxes = in_each_map(references, memory.valid_ratios)
        return (place, hidden), (place, points, memory, *boxes)

    return look


def in_each_map(
    references: Float[Array, "b q r"], valid_ratios: Float[Array, "b l 2"]
) -> list[Float[Array, "b q l 2"]]:
    """Points, or points and sizes, of the image -> of each level's padded map."""
    parts = references.shape[-1] // 2
    scaled = references[:, :, None] * jnp.tile(valid_ratios, parts)[:, None]
    return jnp.split(scaled, parts, -1)


def box_waves(boxes: Float[Array, "b q 4"], memory: Memory) -> Float[Array, "b q e"]:
    """Waves of boxes on the padded canvas; e is twice the width of the memory."""
    padded = boxes * jnp.tile(memory.valid_ratios[:, :1], 2)
    return sine_of(padded, memory.tokens.shape[-1] // 2, order=YXWH)


class References(NamedTuple):
    """Where the queries of a decoder layer stand."""

    seen: Float[Array, "b q r"]  # where they look
    start: Float[Array, "b q r"]  # the same values: what the predicted boxes are relative to

    def move(
        self, deltas: Float[Array, "b n 4"], *, epsilon: float, look_forward_twice: bool
    ) -> "References":
        """Those of the next layer, of which the last n moved. No gradient comes back through what
        it sees; through the start of its boxes it does if `look_forward_twice`, as far as `deltas`
        (Zhang et al. 2022).
        """
        still = self.seen.shape[1] - deltas.shape[1]
        moved = refine(deltas, self.seen[:, still:], epsilon=epsilon)
        seen = jax.lax.stop_gradient(moved)
        if still:
            seen, moved = (jnp.concatenate([self.seen[:, :still], x], 1) for x in (seen, moved))
        return References(seen, moved if look_forward_twice else seen)


class Decoder(nnx.List):
    """The decoder's layers, in order; `make` is given the number of each."""

    def __init__(self, make: Callable[[int], Layer], num_layers: int):
        super().__init__([make(i) for i in range(num_layers)])

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        references: Float[Array, "b q r"],
        memory: Memory,
        look: Look,
        noise: DropoutNoise | None,
        *,
        heads: SharedHeads | Heads,
        num_context: int = 0,
        refines: bool = False,
        look_forward_twice: bool = False,
        norm: LayerNorm | None = None,
        epsilon: float = 1e-5,
        remat: str,
    ) -> Predictions:
        """What every layer predicts for the queries after the first `num_context`, by the `heads`
        for classes and boxes: one for all layers, or one each.

        `references` are points or boxes in [0, 1] of the image, and `epsilon` that of their inverse
        sigmoid. Predictions are made of tokens behind the `norm`, where there is one; boxes move by
        what is before it.
        """
        tokens, at = tokens.astype(memory.tokens.dtype), References(references, references)
        states, boxes, seen, layers = [], [], [references], []
        for i, layer in enumerate(self):
            with jax.named_scope("decoder"):
                run = rematerialized(partial(layer, noise=noise), remat)
                tokens, looked_at = run(tokens, *look(i, tokens, at.seen))
            with jax.named_scope("heads"):
                box_head = heads.boxes[min(i, len(heads.boxes) - 1)]
                exact = tokens[:, num_context:].astype(jnp.float32)
                delta = box_head.deltas(exact if norm is None else norm(exact))
                boxes.append(refine(delta, at.start[:, num_context:], epsilon=epsilon))
                if refines:
                    step = delta if norm is None else box_head.deltas(exact)
                    at = at.move(step, epsilon=epsilon, look_forward_twice=look_forward_twice)
            states.append(tokens)
            seen.append(at.seen)
            layers.append(looked_at)
        with jax.named_scope("heads"):
            raw = jnp.stack(states)
            x = raw[:, :, num_context:].astype(jnp.float32)
            x = x if norm is None else norm(x)
            first, *others = heads.classes
            logits = first(x if not others else x[0])
            if others:
                more = (head(y) for head, y in zip(others, x[1:], strict=False))
                logits = jnp.stack([logits, *more])
        details = {
            "reference_points": references[..., :2],
            "references": seen,
            "valid_ratios": memory.valid_ratios,
            "memory": memory.tokens,
            "states": raw,
            "layers": layers,
        }
        return Predictions(logits, jnp.stack(boxes), details)
