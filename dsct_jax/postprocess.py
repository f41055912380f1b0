"""From outputs to people (paper Section 3.1, "During inference", Eq. 4 and 5)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dsct_jax.boxes import non_max_suppression, to_pixels
from dsct_jax.config import NMS_IOU
from dsct_jax.errors import UserError
from dsct_jax.preprocess import Size

DEFAULT_MIN_CONFIDENCE = 0.3  # where none was fitted on validation
DEFAULT_THRESHOLD = 0.5  # Eq. 4's t where none was fitted; the paper names no value


# NumPy alone: importing scipy.special takes a fifth of a second, which every answer would wait for


def sigmoid(logits: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """1 / (1 + exp(-logits)), without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def log_softmax(logits: Float[np.ndarray, "*n k"]) -> Float[np.ndarray, "*n k"]:
    """The logarithm of the softmax over the last axis."""
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def class_probabilities(
    logits: Float[np.ndarray, "*n c"], *, multi_label: bool, temperature: float = 1.0
) -> Float[np.ndarray, "*n k"]:
    """Sigmoid (multi-label) or softmax of all logits but the last / `temperature`; float64."""
    logits = logits[..., :-1].astype(np.float64) / temperature
    return sigmoid(logits) if multi_label else np.exp(log_softmax(logits))


def paper_scores(logits: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n"]:
    """The score of each query as the paper defines it: the mean of its class logits, float64."""
    return logits[..., :-1].astype(np.float64).mean(-1)


def confidence(
    logits: Float[np.ndarray, "*n c"], *, subject_logit: bool
) -> Float[np.ndarray, "*n"]:
    """How sure each query is to answer for a person, 0..1: the probability of the last logit, "a
    subject", where training gave it that meaning; otherwise (multi-class focal loss) the largest
    sigmoid over the classes, which that loss drives to 0 for queries that answer for nobody.
    """
    return sigmoid((logits[..., -1] if subject_logit else logits[..., :-1].max(-1)).astype(float))


def decide(
    probabilities: Float[np.ndarray, "n k"],
    *,
    multi_label: bool,
    thresholds: Sequence[float] | None = None,
) -> Bool[np.ndarray, "n k"]:
    """The emotions of each person: classes above their thresholds (Eq. 4), or the likeliest (5)."""
    if multi_label:
        return probabilities > np.asarray(DEFAULT_THRESHOLD if thresholds is None else thresholds)
    return np.arange(probabilities.shape[1]) == probabilities.argmax(-1)[:, None]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One person."""

    box: tuple[float, float, float, float]  # (x1, y1, x2, y2) in pixels of the given image
    probabilities: Mapping[str, float]  # of every class
    labels: tuple[str, ...]  # the emotions, most probable first; multi-class: exactly one
    paper_score: float  # the paper's: the mean of the class logits, any number
    confidence: float = 1.0  # that this is a person; what `Selection.min_confidence` cuts at


def _require_share(field: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"{field}={value} must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which answers of the queries count, and which classes become labels."""

    # multi-label: Eq. 4's t for every class; None = as fitted on validation, else 0.5
    threshold: float | None = None
    # queries below are no person; None = as fitted on validation, else 0.3
    min_confidence: float | None = None
    nms: float = NMS_IOU  # 1 = keep all

    def __post_init__(self) -> None:
        for field, value in dataclasses.asdict(self).items():
            _require_share(field, value)


_AS_FITTED = Selection()
_REMEDY = "re-create it with train.py --mode=eval --split=val"


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How the outputs of one model are read, with what was fitted to its weights on validation."""

    class_names: tuple[str, ...]
    multi_label: bool
    subject_logit: bool  # whether training gave the last logit its meaning, "this is a person"
    temperature: float = 1.0  # logits are divided by it for probabilities that mean what they say
    # Eq. 4's t of each class, without the temperature; None: not fitted, or multi-class (Eq. 5)
    thresholds: tuple[float, ...] | None = None
    min_confidence: float | None = None  # a query below is no person; None: not fitted
    fitted_on: str = ""  # the split; "": nothing was fitted
    people: int = 0  # how many labelled people it was fitted on

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"temperature={self.temperature} must be more than 0")
        values, number = self.thresholds, len(self.class_names)
        if values is not None and [0 <= value <= 1 for value in values] != [True] * number:
            raise UserError(f"thresholds must be {number} numbers in [0, 1]")
        _require_share("min_confidence", self.min_confidence)

    @classmethod
    def unfitted(
        cls, class_names: Sequence[str], *, multi_label: bool, class_loss: str
    ) -> "Decoder":
        """The decoder of weights trained with `class_loss`, before anything is fitted."""
        return cls(tuple(class_names), multi_label, multi_label or class_loss != "focal")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], *, where: str) -> "Decoder":
        """The inverse of `to_dict`. Raises UserError, naming `where`, for damaged values."""
        try:
            thresholds, cut = stored["thresholds"], stored.get("min_confidence")
            return cls(
                class_names=tuple(map(str, stored["class_names"])),
                multi_label=bool(stored["multi_label"]),
                subject_logit=bool(stored["subject_logit"]),
                temperature=float(stored["temperature"]),
                thresholds=None if thresholds is None else tuple(map(float, thresholds)),
                min_confidence=None if cut is None else float(cut),
                fitted_on=str(stored["fitted_on"]),
                people=int(stored["people"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"not a stored fit ({type(error).__name__}: {error})"
        except UserError as error:
            reason = str(error)
        raise UserError(f"{where}: {reason}; {_REMEDY}")

    def with_fit(self, stored: Mapping[str, Any] | str, *, where: str) -> "Decoder":
        """This decoder with a stored fit: a `to_dict` or its JSON text, of any version (older ones
        call `fitted_on` "split"). Raises UserError, naming `where`: damaged, or other classes.
        """
        names = ("class_names", "multi_label", "subject_logit")
        own = {name: getattr(self, name) for name in names}
        try:
            fields = dict(json.loads(stored) if isinstance(stored, str) else stored)
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: not a stored fit ({error}); {_REMEDY}") from None
        fields.setdefault("fitted_on", fields.get("split"))
        fitted = Decoder.from_dict({**own, **fields}, where=where)
        if fitted.class_names != self.class_names:
            other, mine = (", ".join(decoder.class_names) for decoder in (fitted, self))
            raise UserError(f"{where}: fitted for the classes {other}, not for {mine}; {_REMEDY}")
        return dataclasses.replace(fitted, **own)

    def probabilities(self, logits: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n k"]:
        """Of every class, as decisions take them: without the temperature."""
        return class_probabilities(logits, multi_label=self.multi_label)

    def confidence(self, logits: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n"]:
        """How sure each query is to answer for a person (`postprocess.confidence`)."""
        return confidence(logits, subject_logit=self.subject_logit)

    def resolve_min_confidence(self, selection: Selection) -> float:
        """The confidence from which a query is a person: as named, as fitted, or the default."""
        cuts = (selection.min_confidence, self.min_confidence, DEFAULT_MIN_CONFIDENCE)
        return next(cut for cut in cuts if cut is not None)

    def resolve_thresholds(self, selection: Selection) -> tuple[float, ...] | None:
        """One threshold per class: as named, or as fitted; None: the default for every class."""
        if selection.threshold is None:
            return self.thresholds
        return (selection.threshold,) * len(self.class_names)

    def __call__(
        self,
        logits: Float[np.ndarray, "q c"],
        boxes: Float[np.ndarray, "q 4"],
        size: Size,
        *,
        selection: Selection = _AS_FITTED,
    ) -> list[Subject]:
        """The people of one image, most confident first, from the last layer's queries.

        Args:
            logits: c = k + 1.
            boxes: (cx, cy, w, h) in [0, 1] of the image without padding.
            size: (height, width) of the image that the boxes are wanted for.
        """
        return list(self.by_query(logits, boxes, size, selection=selection).values())

    def by_query(
        self,
        logits: Float[np.ndarray, "q c"],
        boxes: Float[np.ndarray, "q 4"],
        size: Size,
        *,
        selection: Selection = _AS_FITTED,
    ) -> dict[int, Subject]:
        """`__call__` with the query of each person.

        A query is a person when its confidence says so. The paper's score cannot say it: it grows
        with the number of emotions and has no scale to cut at.
        """
        logits, boxes = np.asarray(logits), np.asarray(boxes, np.float64)
        probabilities, confidences = self.probabilities(logits), self.confidence(logits)
        pixels = np.clip(to_pixels(boxes, size), 0, [size[1], size[0]] * 2)
        certain = confidences >= self.resolve_min_confidence(selection)
        chosen = np.flatnonzero(certain & (pixels[:, 2:] > pixels[:, :2]).all(-1))
        kept = non_max_suppression(pixels[chosen], confidences[chosen], threshold=selection.nms)
        thresholds = self.resolve_thresholds(selection)
        decided = decide(probabilities, multi_label=self.multi_label, thresholds=thresholds)
        scores, found = paper_scores(logits), {}
        for query in chosen[kept].tolist():
            order = np.argsort(-probabilities[query], kind="stable")
            values = probabilities[query].tolist()
            found[query] = Subject(
                box=tuple(pixels[query].tolist()),
                probabilities=dict(zip(self.class_names, values, strict=True)),
                labels=tuple(self.class_names[i] for i in order if decided[query, i]),
                paper_score=float(scores[query]),
                confidence=float(confidences[query]),
            )
        return found
