"""From outputs to people: probabilities, confidence, labels and boxes (paper Section 3.1, "During
inference", Eq. 4 and 5).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from dsct_jax.boxes import cxcywh_to_xyxy, non_max_suppression
from dsct_jax.errors import UserError
from dsct_jax.preprocess import Size

PREDICTION_NMS = (
    0.5  # in prediction: of two boxes that overlap more (IoU), the less certain one goes
)


DEFAULT_MIN_CONFIDENCE = 0.3  # in prediction, where none was fitted on validation


def sigmoid(logits: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Logistic function in float64, without overflow."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


def class_probabilities(
    logits: Float[np.ndarray, "*n c"], *, multi_label: bool, temperature: float = 1.0
) -> Float[np.ndarray, "*n k"]:
    """Sigmoid (multi-label) or softmax (multi-class) of all logits but the last, divided by
    `temperature`; float64 (test.py:263-266).
    """
    logits = logits[..., :-1].astype(np.float64) / temperature
    if multi_label:
        return sigmoid(logits)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def paper_scores(logits: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n"]:
    """The score of each query as the paper defines it: the mean of its class logits (Section 3.1,
    "During inference"), float64.
    """
    return logits[..., :-1].astype(np.float64).mean(-1)


def confidence(
    logits: Float[np.ndarray, "*n c"], *, subject_logit: bool
) -> Float[np.ndarray, "*n"]:
    """How sure each query is to answer for a person, 0..1.

    The probability of the last logit, "a subject", where training gave it that meaning; otherwise
    (multi-class focal loss) the largest sigmoid over the classes, which that loss drives to 0 for
    queries that answer for nobody.
    """
    return sigmoid(logits[..., -1] if subject_logit else logits[..., :-1].max(-1))


DEFAULT_THRESHOLD = 0.5  # Eq. 4's t where none was fitted; the paper names no value


def decide(
    probabilities: Float[np.ndarray, "n k"],
    *,
    multi_label: bool,
    thresholds: Sequence[float] | None = None,
) -> Bool[np.ndarray, "n k"]:
    """The emotions of each person: every class above its threshold (Eq. 4), or the one likeliest
    class (Eq. 5, multi-class).
    """
    if multi_label:
        return probabilities > (
            DEFAULT_THRESHOLD if thresholds is None else np.asarray(thresholds, np.float64)
        )
    return np.arange(probabilities.shape[1]) == probabilities.argmax(-1)[:, None]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One person."""

    box: tuple[
        float, float, float, float
    ]  # (x1, y1, x2, y2) in pixels of the image as it was given, inside it
    probabilities: Mapping[str, float]  # probability of every class
    labels: tuple[str, ...]
    # the emotions: classes above the threshold, most probable first (multi-label); exactly one
    # (multi-class)
    paper_score: float  # the paper's: the mean of the class logits, any number
    # how sure the model is that this is a person of its own, 0..1; what `Selection.min_confidence`
    # cuts at
    confidence: float = 1.0


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which answers of the queries count, and which classes become labels."""

    # Multi-label: a class above this probability is a label (Eq. 4's t); None = the model's
    # thresholds, fitted on validation, or 0.5 without a fit. Without meaning for multi-class (Eq.
    # 5).
    threshold: float | None = None
    min_confidence: float | None = (
        None  # queries below are nobody; None = as fitted on validation, or 0.3 without a fit
    )
    # of two boxes that overlap more than this (IoU), the less certain one goes; 1 = keep all
    nms: float = PREDICTION_NMS

    def __post_init__(self) -> None:
        for field, value in dataclasses.asdict(self).items():
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{field}={value} must lie in [0, 1]")

    def resolve_min_confidence(self, fitted: float | None) -> float:
        """The confidence from which a query is a person: as named, else as `fitted`, else the
        default.
        """
        return next(
            value
            for value in (self.min_confidence, fitted, DEFAULT_MIN_CONFIDENCE)
            if value is not None
        )


def has_subject_logit(*, multi_label: bool, class_loss: str) -> bool:
    """Whether training gave the last logit its meaning "this is a person" (see
    `losses.detection_losses`).
    """
    return multi_label or class_loss == "softmax"


def select_subjects(
    logits: Float[np.ndarray, "q c"],
    boxes: Float[np.ndarray, "q 4"],
    size: Size,
    *,
    class_names: Sequence[str],
    multi_label: bool,
    subject_logit: bool,
    selection: Selection,
    thresholds: Sequence[float] | None = None,
    min_confidence: float | None = None,
) -> list[Subject]:
    """The people of one image, surest first, from the queries of the last decoder layer.

    A query is a person when its confidence (`selection.confidence`) says so. The paper's score, the
    mean of the class logits, is reported with each person, but cannot say whether there is one: it
    grows with the number of emotions and has no scale to cut at.

    Args:
        thresholds, min_confidence: as fitted on validation, for when `selection` names none; one
            threshold a class.
        logits: c = k + 1.
        boxes: (cx, cy, w, h) in [0, 1] of the image without padding.
        size: (height, width) of the image that the boxes are wanted for.
    """
    probabilities = class_probabilities(logits, multi_label=multi_label)
    confidences, scores = confidence(logits, subject_logit=subject_logit), paper_scores(logits)
    height, width = size
    pixels = np.clip(cxcywh_to_xyxy(boxes) * np.array([width, height] * 2), 0, [width, height] * 2)
    candidates = np.flatnonzero(
        (confidences >= selection.resolve_min_confidence(min_confidence))
        & (pixels[:, 2:] > pixels[:, :2]).all(-1)
    )
    kept = candidates[
        non_max_suppression(pixels[candidates], confidences[candidates], threshold=selection.nms)
    ]
    cuts = thresholds if selection.threshold is None else [selection.threshold] * len(class_names)
    decided = decide(probabilities, multi_label=multi_label, thresholds=cuts)
    subjects = []
    for query in kept:
        order = np.argsort(-probabilities[query], kind="stable")
        subjects.append(
            Subject(
                box=tuple(pixels[query].tolist()),
                probabilities=dict(zip(class_names, probabilities[query].tolist(), strict=True)),
                labels=tuple(class_names[i] for i in order if decided[query, i]),
                paper_score=float(scores[query]),
                confidence=float(confidences[query]),
            )
        )
    return subjects
