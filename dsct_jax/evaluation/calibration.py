"""Whether probabilities mean what they say, and what is fitted on validation to make them: one
temperature, a threshold for each class, and the confidence from which a query is a person.

thresholds.json beside a run's checkpoints keeps the fit; prediction and evaluation read it.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from dsct_jax.errors import UserError
from dsct_jax.postprocess import DEFAULT_THRESHOLD

FILE = "thresholds.json"
NUM_BINS = 15  # of equal width, as usual for the expected calibration error (Guo et al. 2017)
_LOG_TEMPERATURES = (-3.0, 3.0)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was fitted on validation. The thresholds hold for probabilities as the model gives them,
    without the temperature.
    """

    class_names: tuple[str, ...]
    temperature: float  # logits are divided by it
    thresholds: (
        tuple[float, ...] | None
    )  # Eq. 4's t, one a class; None for multi-class, where Eq. 5 decides
    split: str  # what it was fitted on
    people: int  # how many labelled people that were
    checkpoint: str = (
        ""  # which weights gave the probabilities; other weights of the same run need another fit
    )
    min_confidence: float | None = (
        None  # a query below is nobody; None: not fitted, as in files of older versions
    )

    def save(self, path: Path) -> None:
        """Writes readable JSON, whole or not at all."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        temporary.replace(path)

    def to_json(self) -> str:
        """One line that `parse_calibration` reads."""
        return json.dumps(dataclasses.asdict(self))


def parse_calibration(text: str, *, class_names: tuple[str, ...], where: str) -> Calibration:
    """Reads what `Calibration.save` or `to_json` wrote.

    Raises:
        UserError: `text` is damaged, or was fitted for other classes; the line begins with `where`.
    """
    remedy = "train.py --mode=eval --split=val makes it anew"
    try:
        stored: dict[str, Any] = json.loads(text)
        thresholds = stored["thresholds"]
        calibration = Calibration(
            class_names=tuple(stored["class_names"]),
            temperature=float(stored["temperature"]),
            thresholds=None if thresholds is None else tuple(float(value) for value in thresholds),
            split=str(stored["split"]),
            people=int(stored["people"]),
            checkpoint=str(stored.get("checkpoint", "")),
            min_confidence=None
            if stored.get("min_confidence") is None
            else float(stored["min_confidence"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{where}: not what a calibration writes ({type(error).__name__}: {error}); {remedy}"
        ) from None
    if calibration.class_names != class_names:
        raise UserError(
            f"{where}: fitted for the classes {', '.join(calibration.class_names)}, not for "
            f"{', '.join(class_names)}; {remedy}"
        )
    if not (np.isfinite(calibration.temperature) and calibration.temperature > 0):
        raise UserError(
            f"{where}: temperature={calibration.temperature} must be more than 0; {remedy}"
        )
    values = calibration.thresholds
    if values is not None and (
        len(values) != len(class_names) or not all(0 <= value <= 1 for value in values)
    ):
        raise UserError(
            f"{where}: thresholds must be {len(class_names)} numbers in [0, 1]; {remedy}"
        )
    if calibration.min_confidence is not None and not 0 <= calibration.min_confidence <= 1:
        raise UserError(
            f"{where}: min_confidence={calibration.min_confidence} must lie in [0, 1]; {remedy}"
        )
    return calibration


def read_calibration(path: Path, *, class_names: tuple[str, ...]) -> Calibration:
    """`parse_calibration` of a file. Raises UserError, also when the file is missing."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); train.py --mode=eval --split=val writes it"
        ) from None
    return parse_calibration(text, class_names=class_names, where=str(path))


def calibration_of_run(
    workdir: Path, *, class_names: tuple[str, ...], step: int | None
) -> Calibration | None:
    """The calibration stored beside a run's checkpoints; None where there is none, or (with a
    warning) one of the weights of another step.

    Raises:
        UserError: the file is damaged or of other classes.
    """
    path = workdir / FILE
    if not path.is_file():
        return None
    calibration, checkpoint = read_calibration(path, class_names=class_names), f"step {step}"
    if calibration.checkpoint != checkpoint:
        _log.warning(
            "%s: fitted for %s, not for %s; not used (train.py --mode=eval --split=val fits anew)",
            path,
            calibration.checkpoint,
            checkpoint,
        )
        return None
    return calibration


def negative_log_likelihood(
    logits: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"], *, multi_label: bool
) -> float:
    """Mean over the people (multi-label: and over the classes) of -log p of what is true, in nats.
    Logits without the subject logit.
    """
    if multi_label:
        return float(np.logaddexp(0, np.where(labels, -logits, logits)).mean())
    return float(-log_softmax(logits, -1)[np.arange(len(labels)), labels.argmax(-1)].mean())


def fit_temperature(
    logits: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"], *, multi_label: bool
) -> float:
    """The temperature in [0.05, 20] that makes the labels likeliest (Guo et al. 2017). Logits
    without the subject logit, at least one person.
    """
    logits = logits.astype(np.float64)

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(
            logits / np.exp(log_temperature), labels, multi_label=multi_label
        )

    return float(
        np.exp(
            minimize_scalar(
                loss, bounds=_LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-4}
            ).x
        )
    )


def fit_thresholds(
    probabilities: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"]
) -> Float[np.ndarray, "k"]:
    """The threshold t of each class with the best F1 of `probability > t` (Eq. 4), half-way between
    two probabilities that occur.

    Of equally good ones the highest; 0.5 for a class that nobody has, about which the split says
    nothing.
    """
    positives = labels.sum(0)
    return np.where(positives > 0, _best_cuts(probabilities, labels, positives), DEFAULT_THRESHOLD)


def fit_min_confidence(
    confidences: Float[np.ndarray, "n"], finds: Bool[np.ndarray, "n"], *, people: int
) -> float | None:
    """The confidence from which a query is a person: the cut with the best F1 of finding people,
    None where no query finds anybody.

    Args:
        confidences: of the queries that could answer, in any order.
        finds: whether each finds a person whom no surer one found.
        people: how many there were to find.
    """
    if not finds.any():
        return None
    return float(_best_cuts(confidences[:, None], finds[:, None], np.array([people]))[0])


def _best_cuts(
    scores: Float[np.ndarray, "n k"],
    right: Bool[np.ndarray, "n k"],
    positives: Int[np.ndarray, "k"],
) -> Float[np.ndarray, "k"]:
    """For each column the cut with the best F1 of `score > cut`, half-way between two scores;
    `positives` counts also those without a score.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    falling = np.take_along_axis(scores, order, 0)
    below = np.concatenate([falling[1:], np.zeros((1, falling.shape[1]))])  # the next lower score
    found = np.take_along_axis(right, order, 0).cumsum(0)
    f1 = 2 * found / (np.arange(1, len(right) + 1)[:, None] + positives)
    f1 = np.where(falling > below, f1, -1.0)  # no cut parts equal scores
    best = f1.argmax(0)[None]
    return (np.take_along_axis(falling, best, 0) + np.take_along_axis(below, best, 0))[0] / 2


def calibration_errors(
    probabilities: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"], *, multi_label: bool
) -> dict[str, Any]:
    """Expected calibration error, Brier score and the bins of the reliability diagram.

    Multi-label: each (person, class) is one statement with its probability. Multi-class: the
    probability of the likeliest class, right or wrong; Brier sums over the classes.

    Returns:
        `ece`: mean distance of stated probability and share that is true, over `NUM_BINS` bins
            weighted with their statements; `brier`; `bins`:
        one {low, high, stated, true, count} for each bin that has statements.
    """
    squared = (probabilities - labels) ** 2
    if multi_label:
        stated, true, brier = probabilities.ravel(), labels.ravel(), float(squared.mean())
    else:
        stated, true = probabilities.max(-1), probabilities.argmax(-1) == labels.argmax(-1)
        brier = float(squared.sum(-1).mean())
    which = np.minimum((stated * NUM_BINS).astype(int), NUM_BINS - 1)
    counts = np.bincount(which, minlength=NUM_BINS)
    sums = [
        np.bincount(which, weights=values.astype(np.float64), minlength=NUM_BINS)
        for values in (stated, true)
    ]
    means = [total / np.maximum(counts, 1) for total in sums]
    bins = [
        {
            "low": i / NUM_BINS,
            "high": (i + 1) / NUM_BINS,
            "stated": float(means[0][i]),
            "true": float(means[1][i]),
            "count": int(counts[i]),
        }
        for i in np.flatnonzero(counts)
    ]
    return {
        "ece": float(np.abs(means[0] - means[1]) @ counts / counts.sum()),
        "brier": brier,
        "bins": bins,
    }
