"""The training loss: classification, L1 and generalized IoU of every decoder layer, as named terms
and their weighted total (paper Eq. 3).

A plain function of global arrays: under `jax.jit` with the batch axis sharded, its sums are sums
    over the whole batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from dsct_jax.batch import Targets
from dsct_jax.boxes import cxcywh_to_xyxy, iou_and_giou
from dsct_jax.config import LossConfig as LossConfig
from dsct_jax.errors import UserError

_EXACT = jax.lax.Precision.HIGHEST  # a one-hot product must return the very number it selects


@dataclasses.dataclass(frozen=True)
class _Matched:
    """What each query is to answer: the target it was assigned to, zeros where there is none."""

    boxes: Float[Array, "layers b q 4"]
    labels: Float[Array, "layers b q k"]
    exists: Bool[Array, "layers b q"]


def count_boxes(valid: Bool[Array, "b t"]) -> Float[Array, ""]:
    """`num_boxes` of a batch: its people, those that no query is left for included, and at least 1
    (as released).
    """
    return jnp.maximum(valid.sum(), 1).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Losses and measurements that can be added up: over devices, and over the parts of a batch
    whose gradients are accumulated.
    """

    terms: dict[str, Any]
    # float32 []: `total` and the loss terms, already divided by the number of boxes of the
    # whole batch
    ratios: dict[
        str, tuple[Any, Any]
    ]  # float32 [] each: numerator and denominator of what is measured beside the loss

    def compute(self) -> dict[str, Float[Array, ""]]:
        """Everything under its name; `class_error`, in percent, is what lacks to the ratio of those
        called rightly (100 where nobody is labelled).
        """
        measured = {
            name: numerator / jnp.maximum(denominator, 1)
            for name, (numerator, denominator) in self.ratios.items()
        }
        if "class_accuracy" in measured:
            measured["class_error"] = 100 - 100 * measured.pop("class_accuracy")
        return self.terms | measured


def detection_losses(
    logits: Float[Array, "layers b q c"],
    boxes: Float[Array, "layers b q 4"],
    targets: Targets,
    assignment: Int[Array, "layers b q"],
    *,
    num_boxes: Num[Array, ""] | float,
    config: LossConfig,
    multi_label: bool,
) -> dict[str, Float[Array, ""]]:
    """`loss_sums` of a whole batch, finished."""
    sums = loss_sums(
        logits,
        boxes,
        targets,
        assignment,
        num_boxes=num_boxes,
        config=config,
        multi_label=multi_label,
    )
    return sums.compute()


def loss_sums(
    logits: Float[Array, "layers b q c"],
    boxes: Float[Array, "layers b q 4"],
    targets: Targets,
    assignment: Int[Array, "layers b q"],
    *,
    num_boxes: Num[Array, ""] | float,
    config: LossConfig,
    multi_label: bool,
) -> LossSums:
    """Unweighted terms, their weighted total, and numbers for the log only.

    Args:
        logits: c = k + 1; the last one means "a subject" when `multi_label` (its target is 1 for
            every matched query, as released) and with `class_loss="softmax"`; otherwise it has no
            part in the loss.
        boxes: (cx, cy, w, h) in [0, 1].
        assignment: index of the target of each query, -1 = none (`matcher.assign_on_host`).
        num_boxes: `count_boxes` of the global batch, whatever part of it this is.

    Returns:
        `loss_class`, `loss_bbox`, `loss_giou` of the last layer, the same with "/0", "/1" ... for
        the layers before it, and `total`, the weighted sum of all of them. Not in the total:
        `cardinality_error` (mean over images of | queries whose highest logit is not the last -
        people |, every layer), and of the last layer `class_error` (percent of the matched queries
        whose highest logit, with the softmax loss of the classes alone, is not their class; 0 when
        `multi_label`, as released) and `matched_iou` (mean over the matched queries, 0 when there
        is none).
    """
    num_classes = logits.shape[-1] - 1
    if config.class_weights and len(config.class_weights) != num_classes:
        raise UserError(
            f"loss.class_weights has {len(config.class_weights)} values for {num_classes} "
            "classes: give one a class, or () for none"
        )
    if multi_label and config.class_loss == "softmax":
        raise UserError(
            "loss.class_loss='softmax' needs multi_label=False: a softmax has exactly one label a "
            "person"
        )
    matched = _gather_targets(targets, assignment)
    count = jnp.asarray(num_boxes, jnp.float32)

    class_sums = _softmax_class_sums if config.class_loss == "softmax" else _focal_class_sums
    bbox_sums, giou_sums, iou_sums = _box_sums(boxes, matched)
    terms = {
        "class": class_sums(logits, matched, config=config, multi_label=multi_label) / count,
        "bbox": bbox_sums / count,
        "giou": giou_sums / count,
    }
    weights = {"class": config.weight_class, "bbox": config.weight_bbox, "giou": config.weight_giou}
    losses = {
        "total": sum(
            (weights[name] * values.sum() for name, values in terms.items()), start=jnp.zeros(())
        )
    }
    for name, values in terms.items():
        losses |= _by_layer(f"loss_{name}", values)

    images = jnp.float32(logits.shape[1])
    ratios: dict[str, tuple[Any, Any]] = {
        name: (error, images)
        for name, error in _by_layer(
            "cardinality_error", _cardinality_errors(logits, targets.valid)
        ).items()
    }
    # Released: over all logits. With the softmax loss the last one is no class, and would hide the
    # error of the others.
    class_logits = logits[-1, ..., :-1] if config.class_loss == "softmax" else logits[-1]
    if multi_label:
        ratios["class_error"] = (jnp.zeros(()), images)
    else:
        ratios["class_accuracy"] = _count_correct(
            class_logits, matched.labels[-1], matched.exists[-1]
        )
    ratios["matched_iou"] = (iou_sums[-1], matched.exists[-1].sum().astype(jnp.float32))
    return LossSums(losses, ratios)


def _gather_targets(targets: Targets, assignment: Int[Array, "layers b q"]) -> _Matched:
    """The assigned target of each query as one-hot products, which stay local to a shard of the
    batch; a gather may not.
    """
    chosen = jax.nn.one_hot(
        assignment, targets.boxes.shape[-2], dtype=jnp.float32
    )  # -1 gives a row of zeros
    return _Matched(
        boxes=jnp.einsum("lbqt,btx->lbqx", chosen, targets.boxes, precision=_EXACT),
        labels=jnp.einsum("lbqt,btk->lbqk", chosen, targets.labels, precision=_EXACT),
        exists=assignment >= 0,
    )


def _by_layer(name: str, values: Float[Array, "layers"]) -> dict[str, Float[Array, ""]]:
    """The last layer under the bare name, the auxiliary ones numbered from 0."""
    auxiliary = {f"{name}/{layer}": values[layer] for layer in range(values.shape[0] - 1)}
    return {name: values[-1]} | auxiliary


def sigmoid_focal_loss(
    logits: Float[Array, "*n"],
    targets: Float[Array, "*n"],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Array, "*n"]:
    """Focal loss of each logit (Lin et al. 2017), targets in [0, 1]; a target in between mixes the
    two sides.

    (1 - p)^gamma is formed from the log-probability, so neither the value nor the gradient
    overflows, whatever the logit and gamma.
    """
    log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    positive = -alpha * jnp.exp(gamma * log_not_p) * log_p
    negative = -(1 - alpha) * jnp.exp(gamma * log_p) * log_not_p
    return targets * positive + (1 - targets) * negative


def _focal_class_sums(
    logits: Float[Array, "layers b q c"],
    matched: _Matched,
    *,
    config: LossConfig,
    multi_label: bool,
) -> Float[Array, "layers"]:
    """Sum over images, queries and classes; every query without a target is a negative of every
    class.

    The emotions of a person who carries no label are unknown, not absent: they take no part. That
        the query is a subject is known.
    """
    num_classes = matched.labels.shape[-1]
    labelled = matched.labels.any(-1)
    targets, known = matched.labels, (labelled | ~matched.exists)[..., None]
    if config.label_smoothing:
        level = 1 / 2 if multi_label else 1 / num_classes
        targets = jnp.where(
            labelled[..., None],
            targets * (1 - config.label_smoothing) + config.label_smoothing * level,
            targets,
        )
    loss = sigmoid_focal_loss(
        logits[..., :-1], targets, alpha=config.focal_alpha, gamma=config.focal_gamma
    )
    if config.class_weights:
        loss = loss * jnp.asarray(config.class_weights, jnp.float32).reshape(1, 1, 1, -1)
    sums = jnp.where(known, loss, 0).sum((1, 2, 3))
    if multi_label:
        sums = sums + _subject_sums(logits, matched, config=config)
    if config.focal_normalization == "paper":
        sums = sums / (num_classes + multi_label)
    return sums


def _subject_sums(
    logits: Float[Array, "layers b q c"], matched: _Matched, *, config: LossConfig
) -> Float[Array, "layers"]:
    """Focal loss of the last logit: is this query a subject?"""
    exists = matched.exists.astype(jnp.float32)
    return sigmoid_focal_loss(
        logits[..., -1], exists, alpha=config.focal_alpha, gamma=config.focal_gamma
    ).sum((1, 2))


def _softmax_class_sums(
    logits: Float[Array, "layers b q c"],
    matched: _Matched,
    *,
    config: LossConfig,
    multi_label: bool,
) -> Float[Array, "layers"]:
    """Cross-entropy over the classes where a labelled person is matched, plus "a subject" on the
    last logit of every query.

    Not in the paper: it separates finding a person from naming the emotion, for training from
        scratch. `focal_normalization` does not apply.
    """
    del multi_label
    labels, smoothing = matched.labels, config.label_smoothing
    log_p = jax.nn.log_softmax(logits[..., :-1], axis=-1)
    smoothed = labels * (1 - smoothing) + smoothing / labels.shape[-1] * labels.sum(
        -1, keepdims=True
    )  # zeros stay zeros without a label
    entropy = -(smoothed * log_p).sum(-1)
    if config.class_weights:
        entropy = entropy * jnp.einsum(
            "lbqk,k->lbq", labels, jnp.asarray(config.class_weights, jnp.float32), precision=_EXACT
        )
    return entropy.sum((1, 2)) + _subject_sums(logits, matched, config=config)


def _box_sums(
    boxes: Float[Array, "layers b q 4"], matched: _Matched
) -> tuple[Float[Array, "layers"], Float[Array, "layers"], Float[Array, "layers"]]:
    """Sums over the matched queries of L1 in (cx, cy, w, h), of 1 - GIoU, and of IoU."""
    # Queries without a target are compared with themselves: finite values and gradients whatever
    # they predict, then masked.
    target_boxes = jnp.where(matched.exists[..., None], matched.boxes, jax.lax.stop_gradient(boxes))
    iou, giou = iou_and_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    difference = boxes - target_boxes
    distance = (difference * jax.lax.stop_gradient(jnp.sign(difference))).sum(
        -1
    )  # |.|, but with PyTorch's gradient 0 at 0; jnp.abs has 1 there
    distance, giou_loss, iou = (
        jnp.where(matched.exists, values, 0).sum((1, 2))
        for values in (distance, 1 - giou, jax.lax.stop_gradient(iou))
    )
    return distance, giou_loss, iou


def _cardinality_errors(
    logits: Float[Array, "layers b q c"], valid: Bool[Array, "b t"]
) -> Float[Array, "layers"]:
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)  # layers b
    return jnp.abs(predicted - valid.sum(-1)[None]).astype(jnp.float32).sum(-1)


def _count_correct(
    logits: Float[Array, "b q c"], labels: Float[Array, "b q k"], exists: Bool[Array, "b q"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many labelled people their query calls rightly, of how many."""
    labelled = exists & labels.any(-1)
    right = labelled & (logits.argmax(-1) == labels.argmax(-1))
    return right.sum().astype(jnp.float32), labelled.sum().astype(jnp.float32)
