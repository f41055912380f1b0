"""The evaluation protocols of the paper and of its field, all in one pass on the host in float64:
results of a split -> one dictionary of metrics, each defined in docs/evaluation.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from dsct_jax.errors import missing_extra
from dsct_jax.evaluation.calibration import calibration_errors
from dsct_jax.evaluation.measures import (
    DEFINITIONS,
    IOU_THRESHOLDS,
    Counts,
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
from dsct_jax.evaluation.selection import People, select_people
from dsct_jax.postprocess import DEFAULT_THRESHOLD, Decoder, class_probabilities, decide

BUCKETS = ("1", "2", "3", "4", ">=5")  # people annotated in the image: Tables 4 and 12
LOWER_IS_BETTER = ("ece", "ece_calibrated", "brier")  # of every other metric, more is better
# The names of the mAP of each definition of AP.
MAP_NAMES = {"step": "mAP", "envelope": "mAP_envelope", "eleven_point": "mAP_eleven_point"}
_CURVE_RECALLS = np.linspace(0, 1, 51)


def evaluate(
    results: SplitResults,
    *,
    nms_threshold: float | None = None,
    decoder: Decoder | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of a split, as plain values that can be written as JSON.

    Args:
        nms_threshold: overlap above which a query is suppressed before the selection (the paper's
            text); None = off, as released.
        decoder: what was fitted on validation (None: what `results` carry), for what is _fitted or
            _calibrated and the decisions of `per_class`; no fit on this very split is used.
        resamples: of the images, for the 95 % intervals; 0 = no intervals.
        seed: of the resampling.

    Raises:
        UserError: no labelled person.
    """
    about = results.about
    decoder = unless_fitted_on(about.split, about.decoder if decoder is None else decoder)
    everyone, mean_candidates = select_people(results, nms_threshold=nms_threshold)
    people = everyone.labelled(len(results.image_ids))
    metrics: dict[str, Any] = {
        "protocol": about.protocol,
        "split": about.split,
        "checkpoint": about.checkpoint,
        "boxes": about.boxes,
        "num_images": len(results.image_ids),
        "num_people": len(everyone.labels),
        "num_labelled": len(people.labels),
        "mean_iou": float(everyone.iou.mean()),
        "mean_candidates": mean_candidates,
        **_ranking(people),
        "chance_mAP": float(people.labels.mean()),
        **_decisions(people, decoder),
        **({} if about.boxes else _boxes(results)),
        **_detected(people),
        **_calibration(people, decoder),
        "per_class": _per_class(people, decoder),
        "precision_recall": _mean_curve(people),
        "buckets": _by_number_of_people(results, people),
    }
    if resamples:
        weights = image_weights(len(results.image_ids), resamples=resamples, seed=seed)
        _add_intervals(metrics, people, decoder, weights[:, people.image], _bucket_of(results))
        metrics["resamples"] = resamples
    return metrics


def unless_fitted_on(split: str, decoder: Decoder) -> Decoder:
    """`decoder`, without its fit where that was made on `split`: on it, it would prove nothing."""
    if decoder.fitted_on != split:
        return decoder
    return Decoder(decoder.class_names, decoder.multi_label, decoder.subject_logit)


def _ranking(people: People) -> dict[str, float]:
    """mAP under the three definitions and the released accuracy, of one labelled person or more."""
    values = _average_precisions(people)
    return {MAP_NAMES[name]: float(values[name].mean()) for name in DEFINITIONS} | {
        "mAP_present": float(values["step"][people.labels.any(0)].mean()),
        "accuracy": float(people.hits.mean()),
    }


def _average_precisions(people: People) -> dict[str, np.ndarray]:
    return {
        name: average_precision(people.probabilities, people.labels, definition=name)
        for name in DEFINITIONS
    }


Weights = Shaped[np.ndarray, "r m"]  # how often each person stands in each resample


def _counts(
    people: People, decoder: Decoder, *, fitted: bool = False, weights: Weights | None = None
) -> Counts:
    """Of the decisions of Eq. 5, or Eq. 4 with the threshold 0.5 or the `fitted` ones."""
    thresholds = decoder.thresholds if fitted else None
    decided = decide(people.probabilities, multi_label=decoder.multi_label, thresholds=thresholds)
    return count(decided, people.labels, weights=weights)


def _decisions(people: People, decoder: Decoder) -> dict[str, Any]:
    counts = _counts(people, decoder)
    names = ("recall", "f1", "precision") if decoder.multi_label else ("recall", "f1")
    metrics: dict[str, Any] = {
        f"macro_{name}": float(counts.macro(getattr(counts, name))) for name in names
    }
    if not decoder.multi_label:
        support, decided = people.labels.sum(0), decide(people.probabilities, multi_label=False)
        return metrics | {
            "majority_accuracy": float(support.max() / support.sum()),
            "confusion_matrix": confusion_matrix(decided, people.labels).tolist(),
        }
    if decoder.thresholds is not None:
        fitted = _counts(people, decoder, fitted=True)
        for name in names:
            metrics[f"macro_{name}_fitted"] = float(fitted.macro(getattr(fitted, name)))
    return metrics


def _boxes(results: SplitResults) -> dict[str, float]:
    scores = results.about.decoder.confidence(results.logits)
    precisions = box_average_precision(
        results.pixel_boxes, scores, results.gt_boxes, results.people_per_image
    )
    named = {"box_AP": precisions.mean(), "box_AP50": precisions[0], "box_AP75": precisions[5]}
    return {name: float(value) for name, value in named.items()}


def _detected(people: People) -> dict[str, Any]:
    """Emotions of the people that were found, at each overlap that counts as found."""
    detected: dict[str, dict[str, Any]] = {}
    for threshold in IOU_THRESHOLDS:
        found = people.iou >= threshold
        entry = {"people": int(found.sum()), "share": float(found.mean())}
        ranking = _ranking(people.take(found)) if found.any() else {}
        detected[f"{threshold:.2f}"] = entry | ranking
    scalars = {
        f"mAP_detected{name[2:]}": detected[name]["mAP_present"]
        for name in ("0.50", "0.75")
        if detected[name]["people"]
    }
    return {**scalars, "detected": detected}


def _calibration(people: People, decoder: Decoder) -> dict[str, Any]:
    multi_label = decoder.multi_label
    errors = calibration_errors(people.probabilities, people.labels, multi_label=multi_label)
    bins: dict[str, Any] = {"bins": errors["bins"]}
    found = {"ece": errors["ece"], "brier": errors["brier"], "calibration": bins}
    if decoder.fitted_on:
        temperature = decoder.temperature
        scaled = class_probabilities(
            people.logits, multi_label=multi_label, temperature=temperature
        )
        after = calibration_errors(scaled, people.labels, multi_label=multi_label)
        found["ece_calibrated"] = after["ece"]
        bins |= {"temperature": temperature, "fitted_on": decoder.fitted_on}
        bins["bins_calibrated"] = after["bins"]
    return found


def _per_class(people: People, decoder: Decoder) -> dict[str, dict[str, float | int]]:
    precisions, counts = _average_precisions(people), _counts(people, decoder, fitted=True)
    columns: dict[str, np.ndarray] = {
        **{MAP_NAMES[name][1:]: precisions[name] for name in DEFINITIONS},
        "people": counts.support,
        "chance": counts.support / len(people.labels),
        "recall": counts.recall,
        "precision": counts.precision,
        "f1": counts.f1,
    }
    if decoder.multi_label:
        default = (DEFAULT_THRESHOLD,) * len(decoder.class_names)
        columns["threshold"] = np.array(decoder.thresholds or default)
    return {
        name: {column: values[i].item() for column, values in columns.items()}
        for i, name in enumerate(decoder.class_names)
    }


def _mean_curve(people: People) -> dict[str, list[float]]:
    """The precision envelope at fixed recalls, mean over the classes that have people."""
    present = people.labels.any(0)
    curve = precision_at_recall(
        people.probabilities[:, present], people.labels[:, present], _CURVE_RECALLS
    ).mean(1)
    return {"recall": _CURVE_RECALLS.tolist(), "precision": curve.tolist()}


def _bucket_of(results: SplitResults) -> Int[np.ndarray, " n"]:
    return np.minimum(results.people_per_image, len(BUCKETS)) - 1  # -1: nobody


def _by_number_of_people(results: SplitResults, people: People) -> dict[str, dict[str, Any]]:
    """The released metrics of each of `BUCKETS`; one without labelled people has counts only."""
    bucket_of_image, buckets = _bucket_of(results), {}
    for number, name in enumerate(BUCKETS):
        images = bucket_of_image == number
        inside = images[people.image]
        counts: dict[str, Any] = {"images": int(images.sum()), "people": int(inside.sum())}
        buckets[name] = counts | (_ranking(people.take(inside)) if inside.any() else {})
    return buckets


def _add_intervals(
    metrics: dict[str, Any],
    people: People,
    decoder: Decoder,
    weights: Weights,
    bucket_of_image: Int[np.ndarray, " n"],
) -> None:
    """Writes the intervals into what `evaluate` returns."""
    counts, total = _counts(people, decoder, weights=weights), np.maximum(weights.sum(1), 1)
    intervals = {
        "accuracy": interval((weights @ people.hits.astype(np.float32)) / total),
        "macro_recall": interval(counts.macro(counts.recall)),
        "macro_f1": interval(counts.macro(counts.f1)),
    }
    if decoder.thresholds is not None:
        fitted = _counts(people, decoder, fitted=True, weights=weights)
        intervals["macro_recall_fitted"] = interval(fitted.macro(fitted.recall))
        intervals["macro_f1_fitted"] = interval(fitted.macro(fitted.f1))
    precisions = resampled_average_precision(
        people.probabilities, people.labels, weights, definitions=DEFINITIONS
    )
    present = int(people.labels.any(0).sum())
    for definition, values in precisions.items():
        means = mean_over_present(values, counts.support, of=present)
        intervals[MAP_NAMES[definition]] = interval(means)
    classes, of_classes = metrics["per_class"].values(), precisions["step"].T
    for entry, of_class, support in zip(classes, of_classes, counts.support.T, strict=True):
        if entry["people"]:
            entry["AP_interval"] = interval(of_class[support > 0])
    metrics["intervals"] = intervals
    for bucket, entry in enumerate(metrics["buckets"].values()):
        inside = bucket_of_image[people.image] == bucket
        if inside.any():
            entry["mAP_interval"] = _map_interval(people.take(inside), weights[:, inside])


def _map_interval(people: People, weights: Weights) -> list[float]:
    labels = people.labels
    precisions = resampled_average_precision(people.probabilities, labels, weights)["step"]
    support = weights.astype(np.float32) @ labels.astype(np.float32)
    return interval(mean_over_present(precisions, support, of=int(labels.any(0).sum())))


def write_evaluation(metrics: dict[str, Any], folder: Path, *, suffix: str) -> list[Path]:
    """Writes metrics<suffix>.json, .md (the table) and .png (the plots); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"metrics{suffix}.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    title = f"# Evaluation on the {metrics['split'] or 'given'} split"
    paths[1].write_text(f"{title}\n\n{format_table(metrics)}\n", encoding="utf-8")
    try:
        draw_evaluation(metrics, paths[2])
    except ModuleNotFoundError as error:  # the numbers do not need the picture
        print(f"no {paths.pop()}: {missing_extra(error) or error}", file=sys.stderr)
    return paths
