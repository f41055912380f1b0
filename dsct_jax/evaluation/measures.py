"""The measures of an evaluation: counts of decisions, average precision, box AP and bootstrap
intervals; functions of counts or of ranks, for one evaluation and all its resamples at once.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from dsct_jax.boxes import elementwise_iou


@dataclasses.dataclass(frozen=True)
class Counts:
    """People of each class: who carry it, for whom it was decided, and both; numbers or weights."""

    support: Num[np.ndarray, "*r k"]
    predicted: Num[np.ndarray, "*r k"]
    true_positives: Num[np.ndarray, "*r k"]

    @property
    def recall(self) -> Float[np.ndarray, "*r k"]:
        """Share of a class's people that it was decided for; 0 for a class without people."""
        return self.true_positives / np.maximum(self.support, 1)

    @property
    def precision(self) -> Float[np.ndarray, "*r k"]:
        """Share of a class's decisions that are right; 0 for a class that was never decided."""
        return self.true_positives / np.maximum(self.predicted, 1)

    @property
    def f1(self) -> Float[np.ndarray, "*r k"]:
        """Harmonic mean of precision and recall."""
        return 2 * self.true_positives / np.maximum(self.support + self.predicted, 1)

    def macro(self, values: Float[np.ndarray, "*r k"]) -> Float[np.ndarray, "*r"]:
        """Mean of `values` over the classes that have people."""
        present = self.support > 0
        return np.asarray((values * present).sum(-1) / np.maximum(present.sum(-1), 1))


def count(
    decided: Bool[np.ndarray, "n k"],
    labels: Bool[np.ndarray, "n k"],
    *,
    weights: Shaped[np.ndarray, "*r n"] | None = None,
) -> Counts:
    """The counts of each class; with `weights` (times that a person stands) of each resample."""
    groups = (labels, decided, labels & decided)
    if weights is None:
        return Counts(*(group.sum(0) for group in groups))
    weights = weights.astype(np.float32)  # exact up to 2**24; the product takes milliseconds
    return Counts(*(weights @ group.astype(np.float32) for group in groups))


def confusion_matrix(
    decided: Bool[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"]
) -> Int[np.ndarray, "k k"]:
    """Multi-class: people by their class (row) and the class decided for them (column)."""
    num_classes = labels.shape[1]
    pairs = labels.argmax(-1) * num_classes + decided.argmax(-1)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


DEFINITIONS = ("step", "envelope", "eleven_point")
_RESAMPLES_AT_ONCE = 64  # bounds the memory: this many weights per person at a time


@dataclasses.dataclass(frozen=True)
class _Curve:
    """The precision-recall points by falling score; people of equal score share one point."""

    hits: Bool[np.ndarray, "n k"]  # True at a positive
    found: Int[np.ndarray, "n k"]  # positives up to and with this score
    precision: Float[np.ndarray, "n k"]

    @property
    def envelope(self) -> Float[np.ndarray, "n k"]:
        return np.maximum.accumulate(self.precision[::-1], axis=0)[::-1]


def _curve(scores: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"]) -> _Curve:
    order = np.argsort(-scores, axis=0, kind="stable")
    hits, end = np.take_along_axis(labels, order, 0), _ends(np.take_along_axis(scores, order, 0))
    found = np.take_along_axis(hits.cumsum(0), end, 0)
    return _Curve(hits, found, found / (end + 1))


def _ends(scores: Float[np.ndarray, " n *k"]) -> Int[np.ndarray, " n *k"]:
    """Of scores sorted along the first axis: the position of the last of each run of equal ones."""
    rank = np.arange(len(scores)).reshape(-1, *(1,) * (scores.ndim - 1))
    last = np.ones(scores.shape, bool)
    last[:-1] = scores[1:] != scores[:-1]
    return np.minimum.accumulate(np.where(last, rank, len(scores))[::-1], axis=0)[::-1]


def average_precision(
    scores: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"], *, definition: str = "step"
) -> Float[np.ndarray, " k"]:
    """AP of each class under one of `DEFINITIONS`; 0 for a class without positives."""
    if definition not in DEFINITIONS:
        raise ValueError(f"definition={definition!r}: must be one of {DEFINITIONS}")
    if len(scores) == 0:
        return np.zeros(scores.shape[1])
    curve, positives = _curve(scores, labels), labels.sum(0)
    if definition == "eleven_point":
        values = np.zeros(scores.shape[1])
        for tenths in range(11):
            # in whole numbers: 0.3 has no exact recall
            first = (10 * curve.found >= tenths * positives).argmax(0)
            values += np.take_along_axis(curve.envelope, first[None], 0)[0]
        return np.where(positives > 0, values / 11, 0.0)
    precision = curve.precision if definition == "step" else curve.envelope
    return (precision * curve.hits).sum(0) / np.maximum(positives, 1)


def precision_at_recall(
    scores: Float[np.ndarray, "n k"],
    labels: Bool[np.ndarray, "n k"],
    recalls: Float[np.ndarray, " r"],
) -> Float[np.ndarray, "r k"]:
    """The best precision of each class at each recall or above; 0 for a class without positives."""
    curve, positives = _curve(scores, labels), labels.sum(0)
    recall = curve.found / np.maximum(positives, 1)
    first = np.stack([(recall >= r - 1e-12).argmax(0) for r in recalls])
    return np.where(positives > 0, np.take_along_axis(curve.envelope, first, 0), 0.0)


def resampled_average_precision(
    scores: Float[np.ndarray, "n k"],
    labels: Bool[np.ndarray, "n k"],
    weights: Shaped[np.ndarray, "r n"],
    *,
    definitions: Sequence[str] = ("step",),
) -> dict[str, Float[np.ndarray, "r k"]]:
    """`average_precision`, under each definition, of r resamples, in the j-th of which person i
    stands weights[j, i] times (a whole number); sorted only once.
    """
    if unknown := set(definitions) - set(DEFINITIONS):
        raise ValueError(f"definitions={sorted(unknown)}: must be of {DEFINITIONS}")
    values = {name: np.zeros((len(weights), scores.shape[1])) for name in definitions}
    for start in range(0, len(weights), _RESAMPLES_AT_ONCE):
        rows = slice(start, start + _RESAMPLES_AT_ONCE)
        # [n r]: the resamples lie side by side, so that taking a person takes one row
        chunk = np.ascontiguousarray(weights[rows].T)
        for column in np.flatnonzero(labels.any(0)):
            curve = _weighted_curve(scores[:, column], labels[:, column], chunk)
            for name in definitions:
                values[name][rows, column] = _area(*curve, definition=name)
    return values


def _weighted_curve(
    scores: Float[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
    weights: Shaped[np.ndarray, "n r"],
) -> tuple[Int[np.ndarray, "p r"], Float[np.ndarray, "p r"], Int[np.ndarray, "p r"]]:
    """(found, precision, times) at each positive by falling score; between them precision falls."""
    order = np.argsort(-scores, kind="stable")
    end, positive = _ends(scores[order]), np.flatnonzero(labels[order])
    # the last positive of each run of equal scores
    last = np.searchsorted(positive, end[positive], side="right") - 1
    counted = weights[order].cumsum(0, dtype=np.int32)[end[positive]]
    hits = weights[order[positive]].astype(np.int32)
    found = hits.cumsum(0, dtype=np.int32)[last]
    return found, found / np.maximum(counted, 1), hits


def _area(
    found: Int[np.ndarray, "p r"],
    precision: Float[np.ndarray, "p r"],
    hits: Int[np.ndarray, "p r"],
    *,
    definition: str,
) -> Float[np.ndarray, " r"]:
    """AP of each resample; 0 for one without positives."""
    total = hits.sum(0)
    if definition == "step":
        return (precision * hits).sum(0) / np.maximum(total, 1)
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    if definition == "envelope":
        return (envelope * hits).sum(0) / np.maximum(total, 1)
    tenths = np.ascontiguousarray(10 * found.T)
    pairs = zip(tenths, total, strict=True)
    firsts = np.stack([np.searchsorted(row, number * np.arange(11)) for row, number in pairs], 1)
    return np.where(total > 0, np.take_along_axis(envelope, firsts, 0).mean(0), 0.0)


IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MAX_DETECTIONS = 100  # per image
_IMAGES_AT_ONCE = 2000  # bounds the memory


def box_average_precision(
    boxes: Float[np.ndarray, "n q 4"],
    scores: Float[np.ndarray, "n q"],
    gt_boxes: Float[np.ndarray, "m 4"],
    people_per_image: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "10"]:
    """COCO's AP (101 recall points) at each of `IOU_THRESHOLDS` of boxes (x1, y1, x2, y2); every
    query is a detection. Raises ValueError: there is nobody to find.
    """
    if len(gt_boxes) == 0:
        raise ValueError("box_average_precision: there is nobody to find")
    order = np.argsort(-scores, axis=1, kind="stable")[:, :_MAX_DETECTIONS]
    scores = np.take_along_axis(scores, order, 1)
    boxes = np.take_along_axis(boxes, order[..., None], 1)
    cuts = range(_IMAGES_AT_ONCE, len(boxes), _IMAGES_AT_ONCE)
    counts = np.split(people_per_image, cuts)
    people = np.split(gt_boxes, np.cumsum([group.sum() for group in counts])[:-1])
    groups = zip(np.split(boxes, cuts), people, counts, strict=True)
    matched = np.concatenate([match_detections(*group) for group in groups])
    falling = matched.reshape(-1, len(IOU_THRESHOLDS))[np.argsort(-scores.ravel(), kind="stable")]
    return np.array([_interpolated_area(hits, num_people=len(gt_boxes)) for hits in falling.T])


def match_detections(
    boxes: Float[np.ndarray, "n q 4"],
    gt_boxes: Float[np.ndarray, "m 4"],
    people_per_image: Int[np.ndarray, " n"],
) -> Bool[np.ndarray, "n q 10"]:
    """Whether each box finds a person at each of `IOU_THRESHOLDS`: by falling score each takes the
    free person it overlaps most (of equals the last), if by the threshold.
    """
    most = max(1, int(people_per_image.max()))
    exists = np.arange(most) < people_per_image[:, None]
    people = np.zeros((len(boxes), most, 4))
    people[exists] = gt_boxes
    overlaps = elementwise_iou(boxes[:, :, None].astype(np.float64), people[:, None])
    free = np.repeat(exists[:, None], len(IOU_THRESHOLDS), 1)  # [n 10 t]
    matched = np.zeros((*boxes.shape[:2], len(IOU_THRESHOLDS)), bool)
    for rank in range(boxes.shape[1]):
        candidates = np.where(free, overlaps[:, rank, None], -1.0)
        best = most - 1 - candidates[..., ::-1].argmax(-1)
        overlap = np.take_along_axis(candidates, best[..., None], -1)[..., 0]
        matched[:, rank] = overlap >= IOU_THRESHOLDS
        image, threshold = np.nonzero(matched[:, rank])
        free[image, threshold, best[image, threshold]] = False
    return matched


def _interpolated_area(hits: Bool[np.ndarray, " d"], *, num_people: int) -> float:
    """Mean of the precision envelope at 101 recalls, 0 beyond the last one reached."""
    found = hits.cumsum()
    precision = np.maximum.accumulate((found / np.arange(1, len(hits) + 1))[::-1])[::-1]
    first = np.searchsorted(found / num_people, _RECALLS, side="left")
    reached = precision[np.minimum(first, len(hits) - 1)]
    return float(np.where(first < len(hits), reached, 0.0).mean())


LEVEL = 0.95


def image_weights(num_images: int, *, resamples: int, seed: int) -> Int[np.ndarray, "r n"]:
    """How often each image stands in each resample of as many images, drawn with replacement."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, num_images, num_images) for _ in range(resamples))
    return np.stack([np.bincount(draw, minlength=num_images).astype(np.int16) for draw in draws])


def interval(values: Num[np.ndarray, " r"]) -> list[float]:
    """[low, high] of the central 95 % of the resamples (percentile bootstrap) that are not NaN."""
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def mean_over_present(
    values: Float[np.ndarray, "r k"], present: Num[np.ndarray, "r k"], *, of: int
) -> Float[np.ndarray, " r"]:
    """Mean over the classes `present` in a resample (> 0), times the share of all k classes that
    have people in the split (`of`); NaN where a resample has nobody.

    A rare class that a resample happens to miss would otherwise count as AP 0 there, and the
    interval of a mAP could lie below the mAP.
    """
    exists = present > 0
    number = exists.sum(-1)
    means = (values * exists).sum(-1) / np.maximum(number, 1) * (of / values.shape[-1])
    return np.where(number > 0, means, np.nan)
