"""Denoising: while training, further queries are made of the people themselves, with noise, and
have to say what they were made of (Li et al. 2022, "DN-DETR"; Zhang et al. 2022, "DINO").

Queries come in groups that do not see each other; a group has one slot per person of an image, up
to `Targets`' t. As with the authors, empty slots are seen by the others of their group: padding
people to another t changes what denoising learns, a little.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsct_jax.batch import Branch, Known, Predictions, Targets
from dsct_jax.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from dsct_jax.model.layers import DropoutNoise


class NoisyPeople(NamedTuple):
    """The slots of all groups, group after group (q): everybody of an image once per group, or
    twice with negatives, which follow the positives of their group.
    """

    labels: Float[Array, "b q k"]
    boxes: Float[Array, "b q 4"]
    people: Int[Array, "b q"]  # number of the person among the targets
    exists: Bool[Array, "b q"]
    negative: Bool[Array, "b q"]  # too far away to be called that person


# (boxes, negative, noise, how much) -> boxes
BoxNoise = Callable[[jax.Array, jax.Array, DropoutNoise, float], jax.Array]


def noisy_people(
    people: Targets,
    noise: DropoutNoise,
    *,
    num_groups: int,
    label_noise: float,
    box_noise: float,
    move: BoxNoise,
    negatives: bool = False,
) -> NoisyPeople:
    """Copies of the people, of whom a share `label_noise` gets other labels, and boxes that are
    moved by up to `box_noise` of their size.

    Other labels are the same number of labels, rolled along the classes by a random number of
    places. For one label that is the authors' uniformly random class; for several, a single random
    class would give the noise away by its number.
    """
    b, t, k = people.labels.shape
    sides = 1 + negatives
    labels, boxes = (jnp.tile(x, (1, num_groups * sides, 1)) for x in (people.labels, people.boxes))
    slots = np.arange(num_groups * sides * t)
    negative = jnp.broadcast_to(slots // max(t, 1) % sides == 1, (b, len(slots)))
    changed = noise.uniform(negative.shape) < label_noise
    places = jnp.where(changed, jnp.floor(noise.uniform(negative.shape) * k), 0).astype(jnp.int32)
    labels = jnp.take_along_axis(labels, (np.arange(k) - places[..., None]) % k, -1)
    return NoisyPeople(
        labels,
        move(boxes, negative, noise, box_noise),
        jnp.broadcast_to(slots % max(t, 1), negative.shape),
        jnp.tile(people.valid, (1, num_groups * sides)),
        negative,
    )


def move_center_and_size(
    boxes: Float[Array, "b q 4"], negative: Bool[Array, "b q"], noise: DropoutNoise, scale: float
) -> Float[Array, "b q 4"]:
    """DN-DETR's noise: the centre by up to half a box, the size by up to a whole one, x `scale`."""
    del negative
    size = boxes[..., 2:]
    step = 2 * noise.uniform(boxes.shape) - 1
    return jnp.clip(boxes + step * jnp.concatenate([size / 2, size], -1) * scale, 0, 1)


def move_corners(
    boxes: Float[Array, "b q 4"], negative: Bool[Array, "b q"], noise: DropoutNoise, scale: float
) -> Float[Array, "b q 4"]:
    """DINO's noise: each side by up to half a box x `scale`, that of negatives by one to two times
    as much.
    """
    half = jnp.tile(boxes[..., 2:] / 2, 2)
    sign = jnp.where(noise.uniform(boxes.shape) < 0.5, -1, 1)
    step = sign * (noise.uniform(boxes.shape) + negative[..., None])
    return xyxy_to_cxcywh(jnp.clip(cxcywh_to_xyxy(boxes) + step * half * scale, 0, 1))


def embed_labels(
    embeddings: Float[Array, "k1 e"], labels: Float[Array, "b q k"]
) -> Float[Array, "b q e"]:
    """The mean of the labels' embeddings, which for one label is its own; no label is the last row.

    Not the sum: it would grow with the number of labels, beyond what one label has taught.
    """
    k = labels.shape[-1]
    number = labels.sum(-1, keepdims=True)
    exact = jax.lax.Precision.HIGHEST
    mean = jnp.matmul(labels, embeddings[:k], precision=exact) / jnp.maximum(number, 1)
    return jnp.where(number > 0, mean, embeddings[k])


def hidden_queries(num_groups: int, group_size: int, num_queries: int) -> Bool[np.ndarray, "q q"]:
    """Which query (row) does not see which (column) in self-attention; denoising queries come
    first, then `num_queries` that have to find somebody. These are seen by all, a group only by
    itself.
    """
    group = np.concatenate(
        [np.arange(num_groups).repeat(group_size), np.full(num_queries, -1, int)]
    )
    return (group >= 0) & (group != group[:, None])


class Queries(NamedTuple):
    """The queries of a decoder, those of denoising first."""

    tokens: Float[Array, "b q d"]
    box_logits: Float[Array, "b q 4"]
    hidden: Bool[Array, "1 q2 q2"] | None = None  # of all queries
    known: Known | None = None  # those that were made of people


def denoising_queries(
    people: Targets,
    noise: DropoutNoise,
    embeddings: Float[Array, "k1 d"],
    *,
    num_groups: int,
    num_queries: int,
    epsilon: float,
    negatives: bool = False,
    **how: Any,
) -> Queries:
    """Noisy people as queries, before `num_queries` that have to find somebody; `how` as in
    `noisy_people`. Of empty slots contents and logits are 0.
    """
    noisy = noisy_people(people, noise, num_groups=num_groups, negatives=negatives, **how)
    exists, known = noisy.exists[..., None], noisy.people
    if negatives:  # which, like empty slots, have to say that nobody is there
        known = jnp.where(noisy.exists & ~noisy.negative, known, -1)
    hidden = hidden_queries(num_groups, known.shape[1] // num_groups, num_queries)
    return Queries(
        jnp.where(exists, embed_labels(embeddings, noisy.labels), 0),
        jnp.where(exists, inverse_sigmoid(noisy.boxes, eps=epsilon), 0),
        jnp.asarray(hidden)[None],
        Known(known, num_groups),
    )


def split_known(found: Predictions, known: Known | None) -> Predictions:
    """The predictions of the first queries, whose people are `known`, as a branch."""
    if known is None:
        return found
    n = known.targets.shape[1]
    logits, boxes = (jnp.split(x, [n], 2) for x in (found.logits, found.boxes))
    branches = (*found.branches, Branch(logits[0], boxes[0], known, "denoising"))
    return dataclasses.replace(found, logits=logits[1], boxes=boxes[1], branches=branches)
