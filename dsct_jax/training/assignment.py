"""Which queries answer for which people by the overlap of boxes alone, as in classical detectors
(DETA).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dsct_jax.batch import Overlap, Targets
from dsct_jax.boxes import cxcywh_to_xyxy, iou_and_giou


class Pairs(NamedTuple):
    """The queries of each target, best first: a query may answer for several."""

    queries: Int[Array, "b t k"]
    exist: Bool[Array, "b t k"]

    @property
    def flat(self) -> tuple[Int[Array, "b p"], Int[Array, "b p"]]:
        """The query of each pair, and its target, -1 where there is no pair."""
        b, t, k = self.exist.shape
        people = jnp.where(self.exist, np.arange(t)[None, :, None], -1)
        return self.queries.reshape(b, t * k), people.reshape(b, t * k)

    def of_queries(self, q: int) -> Int[Array, "b q"]:
        """Target of each query, -1 = none; of several the last."""
        queries, people = self.flat
        none = jnp.full(q, -1, jnp.int32)
        return jax.vmap(lambda i, person: none.at[i].max(person))(queries, people)


def assign_by_overlap(targets: Targets, rule: Overlap) -> Pairs:
    """The pairs of each image, as `Overlap` describes."""
    q, k = rule.anchors.shape[-2], min(rule.repeats, rule.anchors.shape[-2])
    valid = targets.valid[..., None]  # b t 1
    boxes, anchors = cxcywh_to_xyxy(targets.boxes), cxcywh_to_xyxy(rule.anchors)
    iou = jnp.where(valid, iou_and_giou(boxes[:, :, None], anchors[:, None])[0], -1.0)  # b t q
    if targets.valid.shape[-1] == 0:
        return Pairs(*(jnp.zeros((*valid.shape[:2], k), kind) for kind in (jnp.int32, bool)))
    best_of_someone = ((iou == iou.max(-1, keepdims=True)) & valid).any(1)
    positive = best_of_someone | (iou.max(1) >= rule.min_iou)
    if rule.max_positives < q:  # the authors draw them: here always in the same scattered order
        order = np.random.default_rng(0).permutation(q)
        rank = jnp.cumsum(positive[:, order], 1)[:, np.argsort(order)]
        positive &= rank <= rule.max_positives
    own = jnp.argmax(iou, 1)[:, None] == np.arange(iou.shape[1])[None, :, None]
    number = (own & positive[:, None] & valid).sum(-1, keepdims=True)
    return Pairs(jax.lax.top_k(iou, k)[1], np.arange(k)[None, None] < number)
