"""The evaluation protocols of the paper and of its field, all in one pass: predictions and people
-> one dictionary of metrics.

    python -m dsct_jax evaluate runs/demo/predictions_test.npz [--output=folder] [--nms=0.01] [--thresholds=runs/demo/thresholds.json]

computes everything anew from what train.py --mode=eval stored, without the model.
docs/evaluation.md defines every number.

Each annotated person is answered by the query whose box overlaps the person's most (released
test.py); how well the emotions of that query fit is then measured over all people. That measures
emotions, not detection: boxes without a person cost nothing, and one query may answer for several
people. `box_AP` and `detected` measure the rest. Everything runs on the host in float64.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from dsct_jax.boxes import elementwise_iou, non_max_suppression
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import (
    Calibration,
    calibration_errors,
    fit_min_confidence,
    fit_temperature,
    fit_thresholds,
)
from dsct_jax.evaluation.measures import (
    DEFINITIONS,
    IOU_THRESHOLDS,
    average_precision,
    box_average_precision,
    confusion_matrix,
    count,
    image_weights,
    interval,
    mean_over_present,
    precision_at_recall,
    resampled_average_precision,
)
from dsct_jax.evaluation.report import draw_evaluation, format_table
from dsct_jax.evaluation.results import SplitResults
from dsct_jax.evaluation.selection import select_all
from dsct_jax.postprocess import (
    DEFAULT_THRESHOLD,
    PREDICTION_NMS,
    class_probabilities,
    confidence,
    decide,
)

BUCKETS = ("1", "2", "3", "4", ">=5")  # people annotated in the image: Tables 4 and 12
RESAMPLES = 400  # a few seconds for 10,000 images
MAP_NAMES = {
    "step": "mAP",
    "envelope": "mAP_envelope",
    "eleven_point": "mAP_eleven_point",
}  # of each definition of AP
_CURVE_RECALLS = np.linspace(0, 1, 51)


@dataclasses.dataclass(frozen=True)
class _People:
    """Annotated people in the order of their images, each with the answer selected for it."""

    logits: Float[np.ndarray, "n c"]
    probabilities: Float[np.ndarray, "n k"]
    labels: Bool[np.ndarray, "n k"]
    iou: Float[np.ndarray, "n"]
    image: Int[np.ndarray, "n"]  # position of the image among the results

    @property
    def labelled(self) -> Bool[np.ndarray, "n"]:
        return np.asarray(self.labels.any(-1))

    def take(self, which: Bool[np.ndarray, "n"]) -> "_People":
        return _People(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))


def evaluate(
    results: SplitResults,
    *,
    nms_threshold: float | None = None,
    calibration: Calibration | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of a split; plain numbers, dictionaries and lists, so that it can be written as
    JSON. docs/evaluation.md defines them.

    People without labels count in the boxes and in the size of their image, not in anything about
    classes.

    Args:
        nms_threshold: overlap above which a query is suppressed before the selection (the paper's
            text); None = off, as released.
        calibration: fitted on validation; gives the numbers whose names end in _fitted or
            _calibrated, and the decisions of `per_class`.
        resamples: of the images, for the 95 % intervals; 0 = no intervals.
        seed: of the resampling.

    Returns:
        `protocol`, `split`, `checkpoint`: what was evaluated. `num_images`, `num_people`,
            `num_labelled`: what was counted.
        `mean_iou`: of the selected boxes with their people; `mean_candidates`: queries an image
            that could be selected (fewer with NMS).
        `mAP`: mean over all classes of AP as scikit-learn and the released code define it, a class
            without people counting 0; `mAP_envelope` and
        `mAP_eleven_point`: of the other two definitions; `mAP_present`: `mAP` over the classes that
            have people; `chance_mAP`: mean share of
        people a class, what a constant prediction reaches.
        `accuracy`: share of people whose most probable class is their label (multi-label: their
            first label, as released).
        `macro_recall`, `macro_f1` (multi-label also `macro_precision`), over the classes that have
        people, of the decisions of Eq. 5, or Eq. 4 with the threshold 0.5; with the ending
        `_fitted` of Eq. 4 with the thresholds of `calibration`. Only multi-class:
        `majority_accuracy`, of always naming the most frequent class; `confusion_matrix`, rows =
        label, columns = prediction. `box_AP`, `box_AP50`, `box_AP75`: COCO's, every query a
        detection scored by `selection.confidence`. `detected`: {IoU 0.50 to 0.95: share of labelled
        people whose selected box reaches it, and the metrics of these}; of which `mAP_detected50`
        and `mAP_detected75` are the `mAP_present` at 0.50 and 0.75, where anybody is found.
        `calibration`: ECE, Brier score and bins, of the probabilities as they are and, with
        `calibration`, at its temperature. `per_class`: {class: AP of each definition, people,
        chance, recall, precision, f1 and their threshold}; `precision_recall`: the mean curve.
        `buckets`: {number of people in the image: images, people, mAP, mAP_present, accuracy}, over
        their labelled people. `intervals`, and `AP_interval`, `mAP_interval` in `per_class` and
        `buckets`: [low, high] at 95 %.

    Raises:
        UserError: no labelled person.
    """
    about = results.about
    queries, mean_candidates = select_all(results, nms_threshold=nms_threshold)
    everyone = _gather(results, queries)
    labelled = everyone.labelled
    if not labelled.any():
        raise UserError(
            f"nothing to evaluate: none of the {len(results.image_ids)} images has a person with "
            "a label; check the annotation file of the split"
        )
    people = everyone.take(labelled)
    thresholds = None if calibration is None else calibration.thresholds
    metrics: dict[str, Any] = {
        "protocol": about.protocol,
        "split": about.split,
        "checkpoint": about.checkpoint,
        "num_images": len(results.image_ids),
        "num_people": len(labelled),
        "num_labelled": len(people.labels),
        "mean_iou": float(everyone.iou.mean()),
        "mean_candidates": mean_candidates,
        **_ranking(people),
        "chance_mAP": float(people.labels.mean()),
        **_decisions(people, multi_label=about.multi_label, thresholds=thresholds),
        **_boxes(results),
        **_detected(people),
        **_calibration(people, calibration, multi_label=about.multi_label),
    }
    metrics["per_class"] = _per_class(
        people, about.class_names, multi_label=about.multi_label, thresholds=thresholds
    )
    metrics["precision_recall"] = _mean_curve(people)
    metrics["buckets"] = _by_number_of_people(results, people)
    if resamples:
        weights = image_weights(len(results.image_ids), resamples=resamples, seed=seed)
        _add_intervals(
            metrics,
            people,
            weights,
            _bucket_of_image(results),
            multi_label=about.multi_label,
            thresholds=thresholds,
        )
        metrics["resamples"] = resamples
    return metrics


def fit_calibration(results: SplitResults) -> Calibration:
    """What fits this split best: the temperature, the threshold of each class (multi-label), and
    the confidence from which a query is a person.

    Meant for validation, never for a test split.

    Raises:
        UserError: no labelled person.
    """
    about = results.about
    everyone = _gather(results, select_all(results, nms_threshold=None)[0])
    labelled = everyone.labelled
    if not labelled.any():
        raise UserError(
            f"nothing to fit: none of the {len(results.image_ids)} images has a person with a label"
        )
    people = everyone.take(labelled)
    return Calibration(
        class_names=about.class_names,
        temperature=fit_temperature(
            people.logits[:, :-1], people.labels, multi_label=about.multi_label
        ),
        thresholds=tuple(fit_thresholds(people.probabilities, people.labels).tolist())
        if about.multi_label
        else None,
        split=about.split,
        people=len(people.labels),
        checkpoint=about.checkpoint,
        min_confidence=_fit_min_confidence(results),
    )


def _fit_min_confidence(results: SplitResults) -> float | None:
    """As prediction chooses: after its suppression; a query finds a person at an overlap of 0.5."""
    boxes, confidences = (
        results.pixel_boxes,
        confidence(results.logits, subject_logit=results.about.subject_logit),
    )
    people = np.split(results.gt_boxes, results.people_per_image.cumsum()[:-1])
    stated, finds = [], []
    for image_boxes, image_certainties, annotated in zip(boxes, confidences, people, strict=True):
        kept = non_max_suppression(
            image_boxes, image_certainties, threshold=PREDICTION_NMS
        )  # surest first
        stated.append(image_certainties[kept])
        finds.append(
            match_detections(image_boxes[None, kept], annotated, np.array([len(annotated)]))[
                0, :, 0
            ]
        )
    return fit_min_confidence(
        np.concatenate(stated), np.concatenate(finds), people=len(results.gt_boxes)
    )


def _gather(results: SplitResults, queries: Int[np.ndarray, "m"]) -> _People:
    image = results.image_of_person
    logits = results.logits[image, queries]
    return _People(
        logits=logits.astype(np.float64),
        probabilities=class_probabilities(logits, multi_label=results.about.multi_label),
        labels=results.gt_labels,
        iou=elementwise_iou(
            results.pixel_boxes[image, queries].astype(np.float64),
            results.gt_boxes.astype(np.float64),
        ),
        image=image,
    )


def _ranking(people: _People) -> dict[str, float]:
    """mAP under the three definitions and the released accuracy, of a group of labelled people (at
    least one).
    """
    present = people.labels.any(0)
    values = {
        MAP_NAMES[name]: average_precision(people.probabilities, people.labels, definition=name)
        for name in DEFINITIONS
    }
    return {name: float(precisions.mean()) for name, precisions in values.items()} | {
        "mAP_present": float(values["mAP"][present].mean()),
        "accuracy": float(_right(people).mean()),
    }


def _right(people: _People) -> Bool[np.ndarray, "n"]:
    """Released `acc`: the most probable class is the (first) label."""
    return people.probabilities.argmax(-1) == people.labels.argmax(-1)


def _decisions(
    people: _People, *, multi_label: bool, thresholds: Sequence[float] | None
) -> dict[str, Any]:
    decided = decide(people.probabilities, multi_label=multi_label)
    counts = count(decided, people.labels)
    metrics: dict[str, Any] = {
        "macro_recall": float(counts.macro(counts.recall)),
        "macro_f1": float(counts.macro(counts.f1)),
    }
    if multi_label:
        metrics["macro_precision"] = float(counts.macro(counts.precision))
        if thresholds is not None:
            fitted = count(
                decide(people.probabilities, multi_label=True, thresholds=thresholds), people.labels
            )
            for name in ("recall", "f1", "precision"):
                metrics[f"macro_{name}_fitted"] = float(fitted.macro(getattr(fitted, name)))
        return metrics
    support = people.labels.sum(0)
    return metrics | {
        "majority_accuracy": float(support.max() / support.sum()),
        "confusion_matrix": confusion_matrix(decided, people.labels).tolist(),
    }


def _boxes(results: SplitResults) -> dict[str, float]:
    scores = confidence(results.logits, subject_logit=results.about.subject_logit)
    precisions = box_average_precision(
        results.pixel_boxes, scores, results.gt_boxes, results.people_per_image
    )
    return {
        "box_AP": float(precisions.mean()),
        "box_AP50": float(precisions[0]),
        "box_AP75": float(precisions[5]),
    }


def _detected(people: _People) -> dict[str, Any]:
    """Emotions of the people that were found, at each overlap that counts as found."""
    detected: dict[str, dict[str, Any]] = {}
    for threshold in IOU_THRESHOLDS:
        found = people.iou >= threshold
        detected[f"{threshold:.2f}"] = {
            "people": int(found.sum()),
            "share": float(found.mean()),
        } | (_ranking(people.take(found)) if found.any() else {})
    scalars = {
        f"mAP_detected{name[2:]}": detected[name]["mAP_present"]
        for name in ("0.50", "0.75")
        if detected[name]["people"]
    }
    return {**scalars, "detected": detected}


def _calibration(
    people: _People, calibration: Calibration | None, *, multi_label: bool
) -> dict[str, Any]:
    errors = calibration_errors(people.probabilities, people.labels, multi_label=multi_label)
    found: dict[str, Any] = {
        "ece": errors["ece"],
        "brier": errors["brier"],
        "calibration": {"bins": errors["bins"]},
    }
    if calibration is not None:
        scaled = class_probabilities(
            people.logits, multi_label=multi_label, temperature=calibration.temperature
        )
        after = calibration_errors(scaled, people.labels, multi_label=multi_label)
        found["ece_calibrated"] = after["ece"]
        found["calibration"] |= {
            "temperature": calibration.temperature,
            "fitted_on": calibration.split,
            "bins_calibrated": after["bins"],
        }
    return found


def _per_class(
    people: _People,
    class_names: Sequence[str],
    *,
    multi_label: bool,
    thresholds: Sequence[float] | None,
) -> dict[str, dict[str, float | int]]:
    precisions = {
        name: average_precision(people.probabilities, people.labels, definition=name)
        for name in DEFINITIONS
    }
    counts = count(
        decide(people.probabilities, multi_label=multi_label, thresholds=thresholds), people.labels
    )
    entries: dict[str, dict[str, float | int]] = {}
    for i, name in enumerate(class_names):
        entries[name] = {
            "AP": float(precisions["step"][i]),
            "AP_envelope": float(precisions["envelope"][i]),
            "AP_eleven_point": float(precisions["eleven_point"][i]),
            "people": int(counts.support[i]),
            "chance": float(counts.support[i] / len(people.labels)),
            "recall": float(counts.recall[i]),
            "precision": float(counts.precision[i]),
            "f1": float(counts.f1[i]),
        }
        if multi_label:
            entries[name]["threshold"] = (
                DEFAULT_THRESHOLD if thresholds is None else float(thresholds[i])
            )
    return entries


def _mean_curve(people: _People) -> dict[str, list[float]]:
    """The precision envelope at fixed recalls, mean over the classes that have people."""
    present = people.labels.any(0)
    curve = precision_at_recall(
        people.probabilities[:, present], people.labels[:, present], _CURVE_RECALLS
    ).mean(1)
    return {"recall": _CURVE_RECALLS.tolist(), "precision": curve.tolist()}


def _bucket_of_image(results: SplitResults) -> Int[np.ndarray, "n"]:
    return np.minimum(results.people_per_image, len(BUCKETS)) - 1  # -1: nobody


def _by_number_of_people(results: SplitResults, people: _People) -> dict[str, dict[str, Any]]:
    """The released metrics of the images with 1, 2, 3, 4 and at least 5 people; a bucket without
    labelled people has counts only.
    """
    bucket_of_image = _bucket_of_image(results)
    buckets = {}
    for number, name in enumerate(BUCKETS):
        inside = bucket_of_image[people.image] == number
        counts: dict[str, Any] = {
            "images": int((bucket_of_image == number).sum()),
            "people": int(inside.sum()),
        }
        buckets[name] = counts | (_ranking(people.take(inside)) if inside.any() else {})
    return buckets


def _add_intervals(
    metrics: dict[str, Any],
    people: _People,
    weights: Shaped[np.ndarray, "r n"],
    bucket_of_image: Int[np.ndarray, "n"],
    *,
    multi_label: bool,
    thresholds: Sequence[float] | None,
) -> None:
    """Writes the intervals into what `evaluate` returns. `weights`: of the images."""
    of_person = weights[:, people.image]
    counts = count(
        decide(people.probabilities, multi_label=multi_label), people.labels, weights=of_person
    )
    total = np.maximum(of_person.sum(1), 1)
    intervals = {
        "accuracy": interval((of_person @ _right(people).astype(np.float32)) / total),
        "macro_recall": interval(counts.macro(counts.recall)),
        "macro_f1": interval(counts.macro(counts.f1)),
    }
    if thresholds is not None:
        fitted = count(
            decide(people.probabilities, multi_label=True, thresholds=thresholds),
            people.labels,
            weights=of_person,
        )
        intervals |= {
            "macro_recall_fitted": interval(fitted.macro(fitted.recall)),
            "macro_f1_fitted": interval(fitted.macro(fitted.f1)),
        }
    number = int(people.labels.any(0).sum())
    for definition, precisions in resampled_average_precision(
        people.probabilities, people.labels, of_person, definitions=DEFINITIONS
    ).items():
        intervals[MAP_NAMES[definition]] = interval(
            mean_over_present(precisions, counts.support, of=number)
        )
        if definition == "step":
            for entry, values, support in zip(
                metrics["per_class"].values(), precisions.T, counts.support.T, strict=True
            ):
                if entry["people"]:
                    entry["AP_interval"] = interval(values[support > 0])
    metrics["intervals"] = intervals
    for bucket, entry in enumerate(metrics["buckets"].values()):
        inside = bucket_of_image[people.image] == bucket
        if inside.any():
            group, drawn = people.take(inside), of_person[:, inside]
            precisions = resampled_average_precision(group.probabilities, group.labels, drawn)[
                "step"
            ]
            support = drawn.astype(np.float32) @ group.labels.astype(np.float32)
            entry["mAP_interval"] = interval(
                mean_over_present(precisions, support, of=int(group.labels.any(0).sum()))
            )


def write_evaluation(metrics: dict[str, Any], folder: Path, *, suffix: str) -> list[Path]:
    """Writes metrics<suffix>.json, metrics<suffix>.md (the table) and metrics<suffix>.png (the
    plots) into `folder`; returns their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"metrics{suffix}.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    paths[1].write_text(
        f"# Evaluation on the {metrics['split'] or 'given'} split\n\n{format_table(metrics)}\n"
    )
    draw_evaluation(metrics, paths[2])
    return paths
