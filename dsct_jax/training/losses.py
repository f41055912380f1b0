"""The training loss: classification, L1 and generalized IoU of every decoder layer, as named terms
and their weighted total (paper Eq. 3).

A plain function of the images at hand: its sums can be added up over devices and parts of a batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from dsct_jax.batch import Targets
from dsct_jax.boxes import cxcywh_to_xyxy, iou_and_giou
from dsct_jax.config import cannot_be_used
from dsct_jax.errors import UserError
from dsct_jax.training.config import GIVEN_LOSSES, LossConfig

_SMALLEST_SHARE = 1e-4  # of a class that nobody has
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


def no_object_total(
    totals: dict[str, Any], num_queries: int, repeats: int, config: LossConfig
) -> Float[Array, ""]:
    """The weights of all queries of a batch, by which class_loss="no_object" is divided, as long as
    no image has more people than queries.
    """
    nobody = num_queries * totals["num_images"] - repeats * totals["num_people"]
    return repeats * totals["label_weight"] + config.no_object_weight * nobody


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Losses and measurements that can be added up: over devices, and over the parts of a batch
    whose gradients are accumulated.
    """

    # float32 []: `total` and the loss terms, already divided by a number of the whole batch
    terms: dict[str, Any]
    # float32 [] each: numerator and denominator of what is measured beside the loss
    ratios: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    # of norms that move, by path: their sum becomes a mean over devices and parts
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)

    def compute(self) -> dict[str, Float[Array, ""]]:
        """Everything under its name; `class_error` is 100 - accuracy, in percent (100 where nobody
        is labeled).
        """
        measured = {
            name: numerator / jnp.maximum(denominator, 1)
            for name, (numerator, denominator) in self.ratios.items()
        }
        if "class_accuracy" in measured:
            measured["class_error"] = 100 - 100 * measured.pop("class_accuracy")
        return self.terms | measured


def loss_sums(
    logits: Float[Array, "layers b q c"],
    boxes: Float[Array, "layers b p 4"],
    targets: Targets,
    assignment: Int[Array, "layers b q"],
    *,
    box_assignment: Int[Array, "layers b p"] | None = None,
    counted: Bool[Array, "b q"],
    num_boxes: Num[Array, ""] | float,
    class_total: Num[Array, ""] | float | None = None,
    config: LossConfig,
    multi_label: bool,
) -> LossSums:
    """Loss terms and measurements of these images; c = k + 1.

    Args:
        assignment: target of each query, -1 = none, as from `matching.assign_on_host`.
        box_assignment: that of each box, where the boxes are not one per query (p is q otherwise).
        counted: False = the query takes no part (a filler image); it must have no target.
        num_boxes: people of the whole batch, from `count_boxes`; every loss term is divided by it.
        class_total: what the class loss is divided by instead.

    Returns:
        Sums whose `compute()` holds `loss_class`, `loss_bbox`, `loss_giou` of the last layer, those
        of layer i before it as `loss_class/i` ..., and `total`, their weighted sum. Measured only,
        no gradient: `cardinality_error` (mean over images of |queries whose highest logit is not
        the last - people|, every layer), and of the last layer `class_error` (percent of the
        matched queries whose highest logit, with the softmax loss of the classes alone, is not
        their class; 0 when `multi_label`, as released) and `matched_iou` (mean over the matched
        queries, 0 when there is none).
    """
    require_classes(config, logits.shape[-1] - 1)
    _require_class_loss(config, multi_label=multi_label)
    # Logits this low cost nothing and learn nothing, so a query that is not counted is no negative.
    logits = jnp.where(counted[None, :, :, None], logits, -100.0)
    matched = _gather_targets(targets, assignment)
    class_sums = _focal_class_sums if config.class_loss == "focal" else _softmax_class_sums
    paired = matched if box_assignment is None else _gather_targets(targets, box_assignment)
    bbox_sums, giou_sums, iou_sums = _box_sums(boxes, paired, epsilon=config.giou_epsilon)
    sums = {
        "class": class_sums(logits, matched, config=config, multi_label=multi_label),
        "bbox": bbox_sums,
        "giou": giou_sums,
    }
    weights = {"class": config.weight_class, "bbox": config.weight_bbox, "giou": config.weight_giou}
    terms: dict[str, Any] = {"total": jnp.zeros(())}
    for name, values in sums.items():
        total = class_total if name == "class" and class_total is not None else num_boxes
        values = values / jnp.asarray(total, jnp.float32)
        terms["total"] += weights[name] * values.sum()
        terms |= _by_layer(f"loss_{name}", values)
    return LossSums(
        terms,
        _measure(logits, matched, targets.valid, counted, config=config, multi_label=multi_label)
        | {"matched_iou": (iou_sums[-1], paired.exists[-1].sum().astype(jnp.float32))},
    )


def require_classes(config: LossConfig, num_classes: int) -> None:
    """Raises UserError unless there is one weight and one share per class, or none."""
    for field in ("class_weights", "class_shares"):
        if (values := getattr(config, field)) and len(values) != num_classes:
            raise UserError(
                f"loss.{field} has {len(values)} values for {num_classes} classes: give one per "
                "class, or () for none"
            )


def _require_class_loss(config: LossConfig, *, multi_label: bool) -> None:
    if config.class_loss in GIVEN_LOSSES:
        wanted = "focal, softmax or no_object for a network that finds its people"
        raise cannot_be_used("loss.class_loss", config.class_loss, wanted)
    if multi_label and config.class_loss != "focal":
        raise UserError(
            f"loss.class_loss={config.class_loss!r} needs multi_label=False: a softmax has exactly "
            "one label per person"
        )


def _measure(
    logits: Float[Array, "layers b q c"],
    matched: _Matched,
    valid: Bool[Array, "b t"],
    counted: Bool[Array, "b q"],
    *,
    config: LossConfig,
    multi_label: bool,
) -> dict[str, tuple[Any, Any]]:
    images = counted.any(-1).sum().astype(jnp.float32)
    errors = _by_layer("cardinality_error", _cardinality_errors(logits, valid, counted))
    ratios: dict[str, tuple[Any, Any]] = {name: (error, images) for name, error in errors.items()}
    if multi_label:
        return ratios | {"class_error": (jnp.zeros(()), images)}
    # Released: over all logits. With a softmax the last one is no class, and would hide the
    # error of the others.
    last = logits[-1] if config.class_loss == "focal" else logits[-1, ..., :-1]
    return ratios | {"class_accuracy": count_correct(last, matched.labels[-1], matched.exists[-1])}


def _gather_targets(targets: Targets, assignment: Int[Array, "layers b q"]) -> _Matched:
    """The assigned target of each query as one-hot products, which stay local to a shard of the
    batch; a gather may not.
    """
    # -1 gives a row of zeros
    chosen = jax.nn.one_hot(assignment, targets.boxes.shape[-2], dtype=jnp.float32)
    return _Matched(
        boxes=jnp.einsum("lbqt,btx->lbqx", chosen, targets.boxes, precision=_EXACT),
        labels=jnp.einsum("lbqt,btk->lbqk", chosen, targets.labels, precision=_EXACT),
        exists=assignment >= 0,
    )


def _by_layer(name: str, values: Float[Array, " layers"]) -> dict[str, Float[Array, ""]]:
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
) -> Float[Array, " layers"]:
    """Sum over images, queries and classes; every query without a target is a negative of every
    class.

    The emotions of a person who carries no label are unknown, not absent: they take no part. That
    the query is a subject is known.
    """
    num_classes = matched.labels.shape[-1]
    labeled = matched.labels.any(-1)
    targets, known = matched.labels, (labeled | ~matched.exists)[..., None]
    if config.label_smoothing:
        level = 1 / 2 if multi_label else 1 / num_classes
        targets = jnp.where(
            labeled[..., None],
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
) -> Float[Array, " layers"]:
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
) -> Float[Array, " layers"]:
    """Cross-entropy over the classes where a labeled person is matched, plus "a subject" on the
    last logit of every query: focal, which separates finding a person from naming the emotion, for
    training from scratch; or "no_object", DETR's, a factor of the classes' probabilities.
    `focal_normalization` does not apply.
    """
    del multi_label
    labels, smoothing = matched.labels, config.label_smoothing
    classes = logits[..., :-1]
    if config.logit_adjustment:
        shares = jnp.maximum(jnp.asarray(config.class_shares, jnp.float32), _SMALLEST_SHARE)
        classes += config.logit_adjustment * jnp.log(shares)
    log_p = jax.nn.log_softmax(classes, axis=-1)
    if config.class_loss == "no_object":
        log_p = log_p + jax.nn.log_sigmoid(logits[..., -1:])
        nobody = -config.no_object_weight * jax.nn.log_sigmoid(-logits[..., -1])
        subject_sums = jnp.where(matched.exists, 0, nobody).sum((1, 2))
    else:
        subject_sums = _subject_sums(logits, matched, config=config)
    # zeros stay zeros without a label
    level = smoothing / labels.shape[-1] * labels.sum(-1, keepdims=True)
    smoothed = labels * (1 - smoothing) + level
    entropy = -(smoothed * log_p).sum(-1)
    if config.class_weights:
        entropy = entropy * jnp.einsum(
            "lbqk,k->lbq", labels, jnp.asarray(config.class_weights, jnp.float32), precision=_EXACT
        )
    return entropy.sum((1, 2)) + subject_sums


def _box_sums(
    boxes: Float[Array, "layers b q 4"], matched: _Matched, *, epsilon: float
) -> tuple[Float[Array, " layers"], Float[Array, " layers"], Float[Array, " layers"]]:
    """Sums over the matched queries of L1 in (cx, cy, w, h), of 1 - GIoU, and of IoU."""
    # Queries without a target are compared with themselves: finite values and gradients whatever
    # they predict, then masked.
    target_boxes = jnp.where(matched.exists[..., None], matched.boxes, jax.lax.stop_gradient(boxes))
    corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes)
    iou, giou = iou_and_giou(*corners, epsilon=epsilon)
    difference = boxes - target_boxes
    # |.|, but with PyTorch's gradient 0 at 0; jnp.abs has 1 there
    distance = (difference * jax.lax.stop_gradient(jnp.sign(difference))).sum(-1)
    distance, giou_loss, iou = (
        jnp.where(matched.exists, values, 0).sum((1, 2))
        for values in (distance, 1 - giou, jax.lax.stop_gradient(iou))
    )
    return distance, giou_loss, iou


def _cardinality_errors(
    logits: Float[Array, "layers b q c"], valid: Bool[Array, "b t"], counted: Bool[Array, "b q"]
) -> Float[Array, " layers"]:
    subjects = counted & (logits.argmax(-1) != logits.shape[-1] - 1)  # layers b q
    return jnp.abs(subjects.sum(-1) - valid.sum(-1)[None]).astype(jnp.float32).sum(-1)


def count_correct(
    logits: Float[Array, "b q c"], labels: Float[Array, "b q k"], exists: Bool[Array, "b q"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many labeled people their query classifies correctly, of how many."""
    labeled = exists & labels.any(-1)
    right = labeled & (logits.argmax(-1) == labels.argmax(-1))
    return right.sum().astype(jnp.float32), labeled.sum().astype(jnp.float32)
