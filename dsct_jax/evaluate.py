"""The evaluation protocol of the paper's Section 4 as the released test.py runs it: predictions and people -> one dictionary of metrics.

Each annotated person is answered by the query whose box overlaps the person's most; how well the emotions of that query fit is then measured
over all people. Boxes without a person cost nothing, and one query may answer for several people: this measures emotions, not detection.
Everything runs on the host in float64.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from dsct_jax.boxes import cxcywh_to_xyxy, non_max_suppression, pairwise_iou
from dsct_jax.errors import UserError

BUCKETS = ("1", "2", "3", "4", ">=5")  # people annotated in the image: Tables 4 and 12
RELEASED_NMS_THRESHOLD = 0.01  # so low that neighbours suppress each other; commented out in the released code
_PIXEL = 1.0  # boxes include their last pixel in the released overlap


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """What the last decoder layer says about one image, and the people annotated in it."""

    image_id: int
    logits: Float[np.ndarray, "q c"]  # c = k + 1; the last one is ignored
    boxes: Float[np.ndarray, "q 4"]  # (cx, cy, w, h) in [0, 1] of the image
    size: tuple[int, int]  # (height, width) of the photograph in pixels
    gt_boxes: Num[np.ndarray, "t 4"]  # (x1, y1, x2, y2) in pixels
    gt_labels: Shaped[np.ndarray, "t k"]  # multi-hot or one-hot; a row of zeros = the person carries no label


@dataclasses.dataclass(frozen=True)
class _People:
    """All annotated people of all images in order, each with the answer selected for it."""

    probabilities: Float[np.ndarray, "n k"]
    labels: Bool[np.ndarray, "n k"]
    iou: Float[np.ndarray, "n"]
    image: Int[np.ndarray, "n"]  # position of the image among the results


def class_probabilities(logits: Float[np.ndarray, "*n c"], *, multi_label: bool) -> Float[np.ndarray, "*n k"]:
    """Sigmoid (multi-label) or softmax (multi-class) of all logits but the last, float64 (test.py:263-266)."""
    logits = logits[..., :-1].astype(np.float64)
    if multi_label:
        return np.exp(-np.logaddexp(0, -logits))
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def subject_scores(logits: Float[np.ndarray, "*n c"], *, multi_label: bool) -> Float[np.ndarray, "*n"]:
    """How much each query deserves to survive non-maximum suppression.

    Multi-label: the mean probability, as released (test.py:271). Multi-class: the mean logit, as the paper says (Section 3.2); the mean of a
    softmax is the constant 1/k, so that the released order is one of rounding errors.
    """
    return class_probabilities(logits, multi_label=True).mean(-1) if multi_label else logits[..., :-1].astype(np.float64).mean(-1)


def select_queries(
    pred_boxes: Float[np.ndarray, "q 4"],
    gt_boxes: Num[np.ndarray, "t 4"],
    *,
    scores: Shaped[np.ndarray, "q"] | None = None,
    nms_threshold: float | None = None,
) -> tuple[Int[np.ndarray, "t"], int]:
    """The query that answers for each person of one image, and how many queries there were to choose from.

    Boxes are (x1, y1, x2, y2) in pixels; the overlap counts pixels inclusively. Among equal overlaps (no overlap at all, usually) the last query
    wins: the released argsort()[-1]. With `nms_threshold` only queries that survive suppression by `scores` can be chosen, in the order of their
    scores; among equal scores the later query comes first.
    """
    num_queries = len(pred_boxes)
    if num_queries == 0:
        raise ValueError("select_queries: there is no predicted box to choose from")
    candidates = np.arange(num_queries)
    if nms_threshold is not None:
        if scores is None:
            raise ValueError("select_queries: nms_threshold needs scores")
        candidates = num_queries - 1 - non_max_suppression(pred_boxes[::-1], scores[::-1], threshold=nms_threshold, offset=_PIXEL)
    overlaps = pairwise_iou(pred_boxes[candidates[::-1]], gt_boxes, offset=_PIXEL)
    return candidates[::-1][overlaps.argmax(0)], len(candidates)  # the first maximum of the reversed order is the last


def average_precision(scores: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"]) -> Float[np.ndarray, "k"]:
    """Area under the precision-recall steps of each class, as scikit-learn defines it; 0 for a class without positives.

    People with equal scores are one step, so the order of the people never matters.
    """
    if len(scores) == 0:
        return np.zeros(scores.shape[1])
    order = np.argsort(-scores, axis=0, kind="stable")
    scores, hits = np.take_along_axis(scores, order, 0), np.take_along_axis(labels, order, 0)
    rank = np.arange(len(scores))[:, None]
    ends = np.ones(scores.shape, bool)  # the last of each run of equal scores
    ends[:-1] = scores[1:] != scores[:-1]
    end = np.minimum.accumulate(np.where(ends, rank, len(scores))[::-1], axis=0)[::-1]
    precision = np.take_along_axis(hits.cumsum(0), end, 0) / (end + 1)
    return (precision * hits).sum(0) / np.maximum(hits.sum(0), 1)


def evaluate(results: Iterable[ImageResult], *, class_names: Sequence[str], multi_label: bool, nms_threshold: float | None = None) -> dict[str, Any]:
    """All metrics of a split; plain numbers, dictionaries and lists, so that it can be written as JSON.

    People without labels count in the boxes and in the size of their image, not in anything about classes.

    Returns:
        `num_images`, `num_people`, `num_labelled`: what was counted (int).
        `mean_iou`: of the selected boxes with their people; `mean_candidates`: queries an image that could be selected (fewer with NMS).
        `mAP`: mean average precision over all classes, one without people counting 0 (released); `mAP_present`: over the classes that have people.
        `chance_mAP`: mean share of people a class, what a constant prediction reaches.
        `accuracy`: share of people whose most probable class is their label (multi-label: their first label, as released).
        Only multi-class: `macro_recall`, `macro_f1` over the classes that have people; `majority_accuracy`, of always naming the most frequent
        class; `confusion_matrix`, rows = label, columns = prediction.
        `per_class`: {class: AP, people, prevalence, and if multi-class recall}.
        `buckets`: {number of people in the image: images, people, mAP, mAP_present, accuracy}, over their labelled people.

    Raises:
        UserError: no labelled person, or labels or logits that do not fit `class_names`.
        FloatingPointError: logits or boxes of an image are not finite.
    """
    results = list(results)
    for result in results:
        _check(result, num_classes=len(class_names))
    selected = [_select(result, multi_label=multi_label, nms_threshold=nms_threshold) for result in results]
    people = _gather(results, [queries for queries, _ in selected], multi_label=multi_label)
    labelled = people.labels.any(-1)
    if not labelled.any():
        raise UserError(f"nothing to evaluate: none of the {len(results)} images has a person with a label; check the annotation file of the split")
    probabilities, labels = people.probabilities[labelled], people.labels[labelled]
    precisions, counts = average_precision(probabilities, labels), labels.sum(0)
    metrics: dict[str, Any] = {
        "num_images": len(results),
        "num_people": len(people.labels),
        "num_labelled": int(labelled.sum()),
        "mean_iou": float(people.iou.mean()),
        "mean_candidates": float(np.mean([count for _, count in selected])),
        **_ranking(probabilities, labels),
        "chance_mAP": float(labels.mean()),
    }
    per_class = {
        name: {"AP": float(precision), "people": int(count), "prevalence": float(count / len(labels))}
        for name, precision, count in zip(class_names, precisions, counts, strict=True)
    }
    if not multi_label:
        decided, recalls = _decisions(probabilities, labels)
        metrics |= decided
        for entry, recall in zip(per_class.values(), recalls, strict=True):
            entry["recall"] = float(recall)
    return metrics | {"per_class": per_class, "buckets": _by_number_of_people(results, people)}


def _check(result: ImageResult, *, num_classes: int) -> None:
    if result.logits.shape[-1] != num_classes + 1 or result.gt_labels.shape[-1] != num_classes:
        raise UserError(
            f"image {result.image_id}: {result.logits.shape[-1]} logits and labels of {result.gt_labels.shape[-1]} classes do not fit the "
            f"{num_classes} class names: expected {num_classes + 1} and {num_classes}"
        )
    if not (np.isfinite(result.logits).all() and np.isfinite(result.boxes).all()):
        raise FloatingPointError(f"image {result.image_id}: the predicted logits or boxes are not finite")


def _pixel_boxes(result: ImageResult) -> Float[np.ndarray, "q 4"]:
    height, width = result.size
    return cxcywh_to_xyxy(result.boxes) * np.array([width, height, width, height], result.boxes.dtype)


def _select(result: ImageResult, *, multi_label: bool, nms_threshold: float | None) -> tuple[np.ndarray, int]:
    scores = None if nms_threshold is None else subject_scores(result.logits, multi_label=multi_label)
    return select_queries(_pixel_boxes(result), result.gt_boxes, scores=scores, nms_threshold=nms_threshold)


def _gather(results: Sequence[ImageResult], selected: Sequence[np.ndarray], *, multi_label: bool) -> _People:
    if not results:
        raise UserError("nothing to evaluate: there is no image; check the annotation file of the split")
    logits = np.concatenate([result.logits[queries] for result, queries in zip(results, selected, strict=True)])
    boxes = np.concatenate([_pixel_boxes(result)[queries] for result, queries in zip(results, selected, strict=True)]).astype(np.float64)
    gt_boxes = np.concatenate([result.gt_boxes for result in results]).astype(np.float64)
    return _People(
        probabilities=class_probabilities(logits, multi_label=multi_label),
        labels=np.concatenate([result.gt_labels for result in results]) > 0.5,
        iou=_paired_iou(boxes, gt_boxes),
        image=np.repeat(np.arange(len(results)), [len(queries) for queries in selected]),
    )


def _paired_iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n"]:
    """IoU of row i with row i, (x1, y1, x2, y2), without the extra pixel of the selection."""
    size = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    intersection = size.prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - intersection
    return intersection / np.where(union > 0, union, 1)


def _ranking(probabilities: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"]) -> dict[str, float]:
    """What the released evaluation prints, for a group of labelled people (at least one)."""
    precisions = average_precision(probabilities, labels)
    return {
        "mAP": float(precisions.mean()),
        "mAP_present": float(precisions[labels.any(0)].mean()),
        "accuracy": float((probabilities.argmax(-1) == labels.argmax(-1)).mean()),
    }


def _decisions(probabilities: Float[np.ndarray, "n k"], labels: Bool[np.ndarray, "n k"]) -> tuple[dict[str, Any], Float[np.ndarray, "k"]]:
    """Metrics of the most probable class against the one label, and the recall of each class (0 where there are no people)."""
    num_classes = labels.shape[1]
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels.argmax(-1), probabilities.argmax(-1)), 1)
    support, predicted, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    recall, f1 = right / np.maximum(support, 1), 2 * right / np.maximum(support + predicted, 1)
    return {
        "macro_recall": float(recall[support > 0].mean()),
        "macro_f1": float(f1[support > 0].mean()),
        "majority_accuracy": float(support.max() / support.sum()),
        "confusion_matrix": confusion.tolist(),
    }, recall


def _by_number_of_people(results: Sequence[ImageResult], people: _People) -> dict[str, dict[str, Any]]:
    """The released metrics of the images with 1, 2, 3, 4 and at least 5 people; a bucket without labelled people has counts only."""
    bucket_of_image = np.minimum([len(result.gt_boxes) for result in results], len(BUCKETS)) - 1  # -1: nobody
    bucket_of_person, labelled = bucket_of_image[people.image], people.labels.any(-1)
    buckets = {}
    for number, name in enumerate(BUCKETS):
        inside = (bucket_of_person == number) & labelled
        counts: dict[str, Any] = {"images": int((bucket_of_image == number).sum()), "people": int(inside.sum())}
        buckets[name] = counts | (_ranking(people.probabilities[inside], people.labels[inside]) if inside.any() else {})
    return buckets


def format_table(metrics: dict[str, Any]) -> str:
    """The dictionary of `evaluate` as text for a terminal; shares in percent."""
    lines = [f"{metrics['num_images']} images, {metrics['num_people']} people ({metrics['num_labelled']} with labels)", ""]
    scalars = {name: value for name, value in metrics.items() if isinstance(value, float)}
    lines += [f"{name:<20}{value:>8.2f}" if name == "mean_candidates" else f"{name:<20}{100 * value:>8.2f} %" for name, value in scalars.items()]
    lines += ["", *_rows("class", metrics["per_class"]), "", *_rows("people/image", metrics["buckets"])]
    if "confusion_matrix" in metrics:
        names = list(metrics["per_class"])
        lines += ["", "confusion (row = label, column = prediction)", " " * 20 + "".join(f"{name[:7]:>8}" for name in names)]
        lines += [f"{name:<20}" + "".join(f"{n:>8}" for n in row) for name, row in zip(names, metrics["confusion_matrix"], strict=True)]
    return "\n".join(lines)


def _rows(title: str, entries: dict[str, dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for entry in entries.values() for column in entry))
    lines = [f"{title:<20}" + "".join(f"{column:>13}" for column in columns)]
    for name, entry in entries.items():
        cells = (entry.get(column, "-") for column in columns)
        lines.append(f"{name:<20}" + "".join(f"{100 * cell:>11.2f} %" if isinstance(cell, float) else f"{cell:>13}" for cell in cells))
    return lines
