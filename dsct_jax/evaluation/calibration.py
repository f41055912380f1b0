"""What is fitted on validation (a temperature, a threshold per class, the confidence from which a
query is a person), where it is kept, and how well probabilities mean what they say.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dsct_jax.boxes import non_max_suppression
from dsct_jax.config import NMS_IOU
from dsct_jax.errors import UserError
from dsct_jax.evaluation.measures import match_detections
from dsct_jax.evaluation.results import SplitResults
from dsct_jax.evaluation.selection import select_people
from dsct_jax.postprocess import DEFAULT_THRESHOLD, Decoder, log_softmax

FILE = "thresholds.json"
NUM_BINS = 15  # of equal width, as usual for the expected calibration error (Guo et al. 2017)
_LOG_TEMPERATURES = (-3.0, 3.0)
_log = logging.getLogger(__name__)


def fit_decoder(results: SplitResults) -> Decoder:
    """What fits this split best, never a test split. Raises UserError: no labelled person."""
    decoder, (everyone, _) = results.about.decoder, select_people(results)
    people = everyone.labelled(len(results.image_ids))
    multi_label, thresholds = decoder.multi_label, None
    if multi_label:
        thresholds = tuple(fit_thresholds(people.probabilities, people.labels).tolist())
    return dataclasses.replace(
        decoder,
        temperature=fit_temperature(people.logits[:, :-1], people.labels, multi_label=multi_label),
        thresholds=thresholds,
        min_confidence=_fit_min_confidence(results),
        fitted_on=results.about.split or "an unnamed split",
        people=len(people.labels),
    )


def _fit_min_confidence(results: SplitResults) -> float | None:
    """As prediction chooses: after its suppression; a query finds a person at an overlap of 0.5."""
    confidences = results.about.decoder.confidence(results.logits)
    images = zip(results.pixel_boxes, confidences, results.gt_boxes_by_image(), strict=True)
    stated, finds = [], []
    for boxes, values, people in images:
        kept = non_max_suppression(boxes, values, threshold=NMS_IOU)  # falling
        stated.append(values[kept])
        finds.append(match_detections(boxes[None, kept], people, np.array([len(people)]))[0, :, 0])
    number = len(results.gt_boxes)
    return fit_min_confidence(np.concatenate(stated), np.concatenate(finds), people=number)


def save_fit(decoder: Decoder, path: Path, *, checkpoint: str) -> None:
    """Writes readable JSON, whole or not at all; `checkpoint` names the weights, as "step 3"."""
    temporary = path.with_name(path.name + ".tmp")
    stored = decoder.to_dict() | {"checkpoint": checkpoint}
    temporary.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_fit(path: Path, decoder: Decoder) -> tuple[Decoder, str]:
    """`decoder` with the fit in a file of `save_fit`, and the checkpoint it was fitted to ("":
    unknown). Raises UserError: the file is missing, damaged or of other classes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); train.py --mode=eval --split=val writes it"
        ) from None
    fitted = decoder.with_fit(text, where=str(path))
    return fitted, str(json.loads(text).get("checkpoint", ""))


def stored_decoder(
    decoder: Decoder, metadata: Mapping[str, Any], workdir: Path, step: int
) -> Decoder:
    """`decoder` with the fit of the checkpoint of `step`: its validation's, in `metadata`, or of
    thresholds.json, where the user fitted it again. Raises UserError for a damaged fit.
    """
    if "decoder" in metadata:
        where = f"{workdir}, checkpoint of step {step}"
        decoder = decoder.with_fit(metadata["decoder"], where=where)
    return with_fit_beside(workdir, decoder, checkpoint=f"step {step}")


def with_fit_beside(folder: Path, decoder: Decoder, *, checkpoint: str) -> Decoder:
    """`decoder` with the fit in the thresholds.json of `folder`; unchanged where there is none, or
    (with a warning) one of other weights than `checkpoint`. Raises UserError for a damaged file.
    """
    path = folder / FILE
    if not path.is_file():
        return decoder
    fitted, of = read_fit(path, decoder)
    if of == checkpoint:
        return fitted
    if not decoder.fitted_on:
        again = "train.py --mode=eval --split=val fits again"
        _log.warning("%s: fitted for %s, not for %s; not used (%s)", path, of, checkpoint, again)
    return decoder


def negative_log_likelihood(
    logits: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"], *, multi_label: bool
) -> float:
    """Mean of -log p of what is true, in nats; multi-label: over the classes too."""
    if multi_label:
        return float(np.logaddexp(0, np.where(labels, -logits, logits)).mean())
    return float(-log_softmax(logits)[np.arange(len(labels)), labels.argmax(-1)].mean())


def fit_temperature(
    logits: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"], *, multi_label: bool
) -> float:
    """The temperature in [0.05, 20] that makes the labels most likely (Guo et al. 2017), of logits
    without the subject logit.
    """
    from scipy.optimize import minimize_scalar  # half a second that prediction need not spend

    logits = logits.astype(np.float64)

    def loss(log_t: float) -> float:
        return negative_log_likelihood(logits / np.exp(log_t), labels, multi_label=multi_label)

    options = {"bounds": _LOG_TEMPERATURES, "method": "bounded", "options": {"xatol": 1e-4}}
    return float(np.exp(minimize_scalar(loss, **options).x))


def fit_thresholds(
    probabilities: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"]
) -> Float[np.ndarray, " k"]:
    """The threshold t of each class with the best F1 of `probability > t` (Eq. 4), half-way between
    two that occur; of equally good ones the highest; 0.5 for a class that nobody has.
    """
    positives = labels.sum(0)
    return np.where(positives > 0, _best_cuts(probabilities, labels, positives), DEFAULT_THRESHOLD)


def fit_min_confidence(
    confidences: Float[np.ndarray, " n"], finds: Bool[np.ndarray, " n"], *, people: int
) -> float | None:
    """The confidence from which a query is a person: the cut with the best F1 of finding people.

    `finds`: whether each query finds a person whom no surer one found; of `people` to find. None
    where no query finds anybody.
    """
    if not finds.any():
        return None
    return float(_best_cuts(confidences[:, None], finds[:, None], np.array([people]))[0])


def _best_cuts(
    scores: Float[np.ndarray, "n k"],
    right: Bool[np.ndarray, "n k"],
    positives: Int[np.ndarray, " k"],
) -> Float[np.ndarray, " k"]:
    """Each column's cut with the best F1 of `score > cut`; `positives`: all there are to find."""
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
    """Expected calibration error `ece`, `brier` score, and the `bins` of the reliability diagram:
    one {low, high, stated, true, count} for each of `NUM_BINS` that has statements.

    Multi-label: each (person, class) is one statement. Multi-class: the likeliest class is; Brier
    sums over the classes.
    """
    squared = (probabilities - labels) ** 2
    if multi_label:
        stated, true, brier = probabilities.ravel(), labels.ravel(), float(squared.mean())
    else:
        stated, true = probabilities.max(-1), probabilities.argmax(-1) == labels.argmax(-1)
        brier = float(squared.sum(-1).mean())
    which = np.minimum((stated * NUM_BINS).astype(int), NUM_BINS - 1)
    counts = np.bincount(which, minlength=NUM_BINS)
    means = [
        np.bincount(which, values.astype(np.float64), NUM_BINS) / np.maximum(counts, 1)
        for values in (stated, true)
    ]
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    names, columns = (
        ("low", "high", "stated", "true", "count"),
        (edges[:-1], edges[1:], *means, counts),
    )
    rows = zip(*(column[counts > 0].tolist() for column in columns), strict=True)
    bins = [dict(zip(names, row, strict=True)) for row in rows]
    ece = float(np.abs(means[0] - means[1]) @ counts / counts.sum())
    return {"ece": ece, "brier": brier, "bins": bins}
