"""From probabilities to decided emotions (paper Eq. 4 and 5) and how often the decisions are right: F1, recall, confusion.

Every number is a function of counts, so the same functions serve one evaluation and all resamples of a bootstrap at once.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

DEFAULT_THRESHOLD = 0.5  # Eq. 4's t where none was fitted; the paper names no value


@dataclasses.dataclass(frozen=True)
class Counts:
    """People of each class: those that carry it, those it was decided for, and those where both agree; [*r k], whole numbers or weights."""

    support: Num[np.ndarray, "*r k"]
    decided: Num[np.ndarray, "*r k"]
    right: Num[np.ndarray, "*r k"]

    @property
    def recall(self) -> Float[np.ndarray, "*r k"]:
        """Share of a class's people that it was decided for; 0 for a class without people."""
        return self.right / np.maximum(self.support, 1)

    @property
    def precision(self) -> Float[np.ndarray, "*r k"]:
        """Share of a class's decisions that are right; 0 for a class that was never decided."""
        return self.right / np.maximum(self.decided, 1)

    @property
    def f1(self) -> Float[np.ndarray, "*r k"]:
        """Harmonic mean of precision and recall."""
        return 2 * self.right / np.maximum(self.support + self.decided, 1)

    def macro(self, values: Float[np.ndarray, "*r k"]) -> Float[np.ndarray, "*r"]:
        """Mean of `values` over the classes that have people."""
        present = self.support > 0
        return np.asarray((values * present).sum(-1) / np.maximum(present.sum(-1), 1))


def decide(probabilities: Float[np.ndarray, "n k"], *, multi_label: bool, thresholds: Sequence[float] | None = None) -> Bool[np.ndarray, "n k"]:
    """The emotions of each person: every class above its threshold (Eq. 4), or the one likeliest class (Eq. 5, multi-class)."""
    if multi_label:
        return probabilities > (DEFAULT_THRESHOLD if thresholds is None else np.asarray(thresholds, np.float64))
    return np.arange(probabilities.shape[1]) == probabilities.argmax(-1)[:, None]


def count(decided: Bool[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"], *, weights: Shaped[np.ndarray, "*r n"] | None = None) -> Counts:
    """The counts of each class; with `weights` those of each resample, in which a person stands that many times."""
    groups = (labels, decided, labels & decided)
    if weights is None:
        return Counts(*(group.sum(0) for group in groups))
    weights = weights.astype(np.float32)  # exact up to 2**24, and a matrix product then takes milliseconds
    return Counts(*(weights @ group.astype(np.float32) for group in groups))


def confusion_matrix(decided: Bool[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"]) -> Int[np.ndarray, "k k"]:
    """Multi-class: people by their class (row) and the class decided for them (column)."""
    num_classes = labels.shape[1]
    pairs = labels.argmax(-1) * num_classes + decided.argmax(-1)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
