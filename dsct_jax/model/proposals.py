"""First stage of a two-stage network: each token of the memory proposes a box, and the best become
the decoder's queries (Zhu et al. 2020).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsct_jax.boxes import cxcywh_to_xyxy, iou_and_giou
from dsct_jax.config import cannot_be_used
from dsct_jax.model.attention import Memory, SpatialShapes
from dsct_jax.model.encoder import token_centers
from dsct_jax.model.heads import Heads
from dsct_jax.model.layers import LayerNorm, Linear, torch_uniform

SIZE = 0.05  # of the boxes of the first level; doubles from level to level


class NormedLinear(nnx.Module):
    """A dense layer and a norm."""

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.linear = Linear(d_in, d_out, bias_init=torch_uniform(d_in), rngs=rngs)
        self.norm = LayerNorm(d_out, rngs=rngs)

    def __call__(self, x: Float[Array, "*n a"]) -> Float[Array, "*n b"]:
        return self.norm(self.linear(x))


class Proposals(NamedTuple):
    """What every token proposes, or the chosen ones."""

    features: Float[Array, "b s d"]
    anchors: Float[Array, "b s 4"]  # the box that a token starts from
    logits: Float[Array, "b s k+1"]
    boxes: Float[Array, "b s 4"]

    def take(self, index: Int[Array, "b q"]) -> "Proposals":
        """Those of these tokens, in this order."""
        return Proposals(*(jnp.take_along_axis(x, index[..., None], 1) for x in self))


def propose(memory: Memory, project: NormedLinear, heads: Heads) -> Proposals:
    """Proposals of all tokens, by the last of the `heads`. One whose anchor is not well inside the
    image has the whole image as its anchor and its box, and the features of nothing.
    """
    anchors, valid = _anchors(memory)
    features = project(jnp.where(valid, memory.tokens, 0)).astype(jnp.float32)
    start = jnp.where(valid, jnp.log(anchors / (1 - anchors)), jnp.inf)
    boxes = jax.nn.sigmoid(heads.boxes[-1].deltas(features) + start)
    return Proposals(features, jax.nn.sigmoid(start), heads.classes[-1](features), boxes)


def _anchors(memory: Memory) -> tuple[Float[Array, "b s 4"], Bool[Array, "b s 1"]]:
    centers = token_centers(memory.spatial_shapes, memory.valid_ratios)
    tokens = [h * w for h, w in memory.spatial_shapes]
    sizes = np.repeat(np.float32(SIZE) * 2 ** np.arange(len(tokens)), tokens).astype(np.float32)
    anchors = jnp.concatenate(
        [centers, jnp.broadcast_to(sizes.reshape(1, -1, 1), centers.shape)], -1
    )
    inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1)
    valid = (inside & ~memory.padding)[..., None]
    return jnp.where(valid, anchors, 0.5), valid


def best_tokens(scores: Float[Array, "b s"], k: int) -> Int[Array, "b k"]:
    """The `k` tokens with the highest scores, best first: logits of class 0, which a first stage is
    trained to give to everybody, or of the subject (DINO).
    """
    if k > scores.shape[1]:
        wanted = f"at most {scores.shape[1]}, the tokens of an image of this size"
        raise cannot_be_used("model.num_queries", k, wanted)
    return jax.lax.top_k(scores, k)[1]


def per_level_nms(
    proposals: Proposals,
    k: int,
    *,
    spatial_shapes: SpatialShapes,
    num_candidates: int = 1000,
    threshold: float = 0.9,
) -> Int[Array, "b k"]:
    """`best_tokens` by class 0 without near duplicates, and with a quota for every level (DETA).

    Of each level the best `num_candidates` pass greedy suppression. Of what is left, the best k /
    levels of each level are chosen, then the best of the others. An image with fewer than k left is
    chosen from without suppression.
    """
    scores = jax.lax.stop_gradient(proposals.logits[..., 0])
    boxes = jnp.clip(cxcywh_to_xyxy(jax.lax.stop_gradient(proposals.boxes)), 0, 1)
    plain = best_tokens(proposals.logits[..., 0], k)
    index, kept, start = [], [], 0
    for h, w in spatial_shapes:
        best = jax.lax.top_k(scores[:, start : start + h * w], min(num_candidates, h * w))[1]
        index.append(best + start)
        kept.append(survivors(jnp.take_along_axis(boxes, index[-1][..., None], 1), threshold))
        start += h * w
    if sum(x.shape[1] for x in index) < k:
        return plain
    level = np.repeat(np.arange(len(index)), [x.shape[1] for x in index])
    every, keep = jnp.concatenate(index, 1), jnp.concatenate(kept, 1)
    # From here on in the order of scores, those that were suppressed last.
    score = jnp.where(keep, jnp.take_along_axis(scores, every, 1), -jnp.inf)
    order = jnp.argsort(-score, axis=1)
    every, keep = (jnp.take_along_axis(x, order, 1) for x in (every, keep))
    ranks = (jnp.asarray(level)[order][..., None] == np.arange(len(index))) & keep[..., None]
    within = (ranks & (jnp.cumsum(ranks, 1) <= k // len(index))).any(-1)
    rank = jnp.where(within, 0, jnp.where(keep, 1, 2))
    chosen = jnp.sort(jnp.argsort(rank, axis=1)[:, :k], axis=1)
    enough = keep.sum(1, keepdims=True) >= k
    return jnp.where(enough, jnp.take_along_axis(every, chosen, 1), plain)


def survivors(boxes: Float[Array, "b n 4"], threshold: float) -> Bool[Array, "b n"]:
    """Which (x1, y1, x2, y2) boxes greedy suppression keeps; the best come first.

    A box goes when a kept one before it overlaps it by more than `threshold`. Repeated for all at
    once until nothing changes, it gives what one after another gives: after round i the first i
    are final, and mostly all are after a few.
    """
    overlap = iou_and_giou(boxes[:, :, None], boxes[:, None])[0] > threshold
    earlier = np.tri(boxes.shape[1], k=-1, dtype=bool)[None]  # row: the later one
    removes = overlap & earlier

    def once_more(state):
        _, kept = state
        return kept, ~(removes & kept[:, None]).any(-1)

    kept = jnp.ones(boxes.shape[:2], bool)
    return jax.lax.while_loop(lambda s: (s[0] != s[1]).any(), once_more, (~kept, kept))[1]
