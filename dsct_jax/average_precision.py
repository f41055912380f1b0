"""Average precision of multi-label scores under the three definitions in use for EMOTIC.

The same scores differ by up to 2.5 points between them, so a number says which it is:

- `step`: sum over the positives of the precision where each is found, as scikit-learn and the released test.py compute it.
- `envelope`: the same area under the precision made non-increasing (each value is the best at this recall or above): PASCAL VOC from 2010 on and
  the evaluation of EMOTIC's authors. Never below `step`.
- `eleven_point`: the mean of that envelope at recall 0, 0.1, ..., 1: PASCAL VOC 2007.

People with equal scores are one step of the curve, so the order of the people never matters. A class without positives has AP 0.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

DEFINITIONS = ("step", "envelope", "eleven_point")
_RESAMPLES_AT_ONCE = 64  # bounds the memory: this many weights a person at a time


@dataclasses.dataclass(frozen=True)
class _Curve:
    """The precision-recall points of n people and k classes by falling score; people of equal score share one point."""

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


def _ends(scores: Float[np.ndarray, "n *k"]) -> Int[np.ndarray, "n *k"]:
    """Of scores sorted along the first axis: the position of the last of each run of equal ones."""
    rank = np.arange(len(scores)).reshape(-1, *(1,) * (scores.ndim - 1))
    last = np.ones(scores.shape, bool)
    last[:-1] = scores[1:] != scores[:-1]
    return np.minimum.accumulate(np.where(last, rank, len(scores))[::-1], axis=0)[::-1]


def average_precision(scores: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"], *, definition: str = "step") -> Float[np.ndarray, "k"]:
    """AP of each class under one of `DEFINITIONS`; 0 for a class without positives."""
    if definition not in DEFINITIONS:
        raise ValueError(f"definition={definition!r}: must be one of {DEFINITIONS}")
    if len(scores) == 0:
        return np.zeros(scores.shape[1])
    curve, positives = _curve(scores, labels), labels.sum(0)
    if definition == "eleven_point":
        values = np.zeros(scores.shape[1])
        for tenths in range(11):
            first = (10 * curve.found >= tenths * positives).argmax(0)  # in whole numbers: 0.3 has no exact recall
            values += np.take_along_axis(curve.envelope, first[None], 0)[0]
        return np.where(positives > 0, values / 11, 0.0)
    precision = curve.precision if definition == "step" else curve.envelope
    return (precision * curve.hits).sum(0) / np.maximum(positives, 1)


def precision_at_recall(
    scores: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"], recalls: Float[np.ndarray, "r"]
) -> Float[np.ndarray, "r k"]:
    """The best precision of each class at each recall or above (the envelope), for drawing; 0 for a class without positives."""
    curve, positives = _curve(scores, labels), labels.sum(0)
    recall = curve.found / np.maximum(positives, 1)
    rows = [np.take_along_axis(curve.envelope, (recall >= r - 1e-12).argmax(0)[None], 0)[0] for r in recalls]
    return np.where(positives > 0, np.stack(rows), 0.0)


def resampled_average_precision(
    scores: Float[np.ndarray, "n k"],
    labels: Bool[np.ndarray, "n k"],
    weights: Shaped[np.ndarray, "r n"],
    *,
    definitions: Sequence[str] = ("step",),
) -> dict[str, Float[np.ndarray, "r k"]]:
    """`average_precision` of r resamples, in the j-th of which person i stands weights[j, i] times (a whole number), for each definition.

    Equal to `average_precision` of the people repeated that often, but sorted only once.
    """
    if unknown := set(definitions) - set(DEFINITIONS):
        raise ValueError(f"definitions={sorted(unknown)}: must be of {DEFINITIONS}")
    values = {definition: np.zeros((len(weights), scores.shape[1])) for definition in definitions}
    for start in range(0, len(weights), _RESAMPLES_AT_ONCE):
        rows = slice(start, start + _RESAMPLES_AT_ONCE)
        chunk = np.ascontiguousarray(weights[rows].T)  # [n r]: the resamples lie side by side, so that taking a person takes one row
        for column in np.flatnonzero(labels.any(0)):
            found, precision, hits = _weighted_curve(scores[:, column], labels[:, column], chunk)
            for definition in definitions:
                values[definition][rows, column] = _area(found, precision, hits, definition=definition)
    return values


def _weighted_curve(
    scores: Float[np.ndarray, "n"], labels: Bool[np.ndarray, "n"], weights: Shaped[np.ndarray, "n r"]
) -> tuple[Int[np.ndarray, "p r"], Float[np.ndarray, "p r"], Int[np.ndarray, "p r"]]:
    """(found, precision, times) at each positive by falling score; the points between them add nothing, for there precision only falls."""
    order = np.argsort(-scores, kind="stable")
    end, positive = _ends(scores[order]), np.flatnonzero(labels[order])
    last = np.searchsorted(positive, end[positive], side="right") - 1  # the last positive of the run of equal scores
    counted = weights[order].cumsum(0, dtype=np.int32)[end[positive]]
    hits = weights[order[positive]].astype(np.int32)
    found = hits.cumsum(0, dtype=np.int32)[last]
    return found, found / np.maximum(counted, 1), hits


def _area(
    found: Int[np.ndarray, "p r"], precision: Float[np.ndarray, "p r"], hits: Int[np.ndarray, "p r"], *, definition: str
) -> Float[np.ndarray, "r"]:
    """AP of each resample; 0 for one without positives."""
    total = hits.sum(0)
    if definition == "step":
        return (precision * hits).sum(0) / np.maximum(total, 1)
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    if definition == "envelope":
        return (envelope * hits).sum(0) / np.maximum(total, 1)
    tenths = np.ascontiguousarray(10 * found.T)
    firsts = np.stack([np.searchsorted(row, number * np.arange(11)) for row, number in zip(tenths, total, strict=True)], 1)
    return np.where(total > 0, np.take_along_axis(envelope, firsts, 0).mean(0), 0.0)
