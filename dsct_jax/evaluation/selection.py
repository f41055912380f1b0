"""Which query answers for which person (paper Section 4.1, released test.py). Overlaps keep the
boxes' type, so that they tie where the released ones do.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from dsct_jax.boxes import elementwise_iou, non_max_suppression, pairwise_iou
from dsct_jax.errors import UserError
from dsct_jax.evaluation.results import SplitResults
from dsct_jax.postprocess import class_probabilities, paper_scores

RELEASED_NMS_THRESHOLD = 0.01  # neighbors suppress each other; commented out in the released code
_PIXEL = 1.0  # boxes include their last pixel in the released overlap


@dataclasses.dataclass(frozen=True)
class People:
    """Annotated people in the order of their images, each with the answer selected for it."""

    logits: Float[np.ndarray, "n c"]
    probabilities: Float[np.ndarray, "n k"]
    labels: Bool[np.ndarray, "n k"]
    iou: Float[np.ndarray, " n"]
    image: Int[np.ndarray, " n"]  # position of the image among the results

    @property
    def hits(self) -> Bool[np.ndarray, " n"]:
        """Released `acc`: whether the most probable class is the (first) label."""
        return self.probabilities.argmax(-1) == self.labels.argmax(-1)

    def take(self, which: Bool[np.ndarray, " n"]) -> "People":
        """Those of them for whom `which` is True."""
        return People(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))

    def labelled(self, num_images: int) -> "People":
        """Those that carry a label. Raises UserError, with the number of images, for nobody."""
        carries = np.asarray(self.labels.any(-1))
        if not carries.any():
            nobody = f"none of the {num_images} images has a person with a label"
            remedy = "check the annotation file of the split"
            raise UserError(f"nothing to evaluate: {nobody}; {remedy}")
        return self.take(carries)


def select_people(
    results: SplitResults, *, nms_threshold: float | None = None
) -> tuple[People, float]:
    """Everybody annotated, and the mean number of queries per image to choose an answer from."""
    queries, mean_candidates = select_all(results, nms_threshold=nms_threshold)
    image = results.image_of_person
    logits = results.logits[image, queries]
    boxes = results.pixel_boxes[image, queries].astype(np.float64)
    people = People(
        logits=logits.astype(np.float64),
        probabilities=results.about.decoder.probabilities(logits),
        labels=results.gt_labels,
        iou=elementwise_iou(boxes, results.gt_boxes.astype(np.float64)),
        image=image,
    )
    return people, mean_candidates


def subject_scores(
    logits: Float[np.ndarray, "*n c"], *, multi_label: bool
) -> Float[np.ndarray, "*n"]:
    """How much each query deserves to survive the evaluation's non-maximum suppression: the mean
    probability, as released (test.py:271), or, where that is the constant 1/k (multi-class), the
    mean logit, as the paper says.
    """
    if not multi_label:
        return paper_scores(logits)
    return class_probabilities(logits, multi_label=True).mean(-1)


def select_queries(
    pred_boxes: Float[np.ndarray, "q 4"],
    gt_boxes: Num[np.ndarray, "t 4"],
    *,
    scores: Shaped[np.ndarray, " q"] | None = None,
    nms_threshold: float | None = None,
) -> tuple[Int[np.ndarray, " t"], int]:
    """The query that answers for each person of one image, and how many there were to choose from.

    Boxes are (x1, y1, x2, y2) in pixels, counted inclusively. Among equal overlaps (usually zeros)
    the last query wins, as in the released argsort()[-1]. With `nms_threshold` only queries that
    survive suppression can be chosen, by their `scores`; among equal ones the later comes first.
    """
    num_queries = len(pred_boxes)
    if num_queries == 0:
        raise ValueError("select_queries: there is no predicted box to choose from")
    candidates = np.arange(num_queries)
    if nms_threshold is not None:
        if scores is None:
            raise ValueError("select_queries: nms_threshold needs scores")
        how = {"threshold": nms_threshold, "offset": _PIXEL}
        candidates = num_queries - 1 - non_max_suppression(pred_boxes[::-1], scores[::-1], **how)
    overlaps = pairwise_iou(pred_boxes[candidates[::-1]], gt_boxes, offset=_PIXEL)
    # the first maximum of the reversed order is the last
    return candidates[::-1][overlaps.argmax(0)], len(candidates)


def select_all(
    results: SplitResults, *, nms_threshold: float | None
) -> tuple[Int[np.ndarray, " m"], float]:
    """`select_queries` for all people, and the mean number of queries per image to choose from."""
    boxes, image = results.pixel_boxes, results.image_of_person
    num_queries = boxes.shape[1]
    if nms_threshold is None:
        overlaps = elementwise_iou(boxes[image, ::-1], results.gt_boxes[:, None], offset=_PIXEL)
        return num_queries - 1 - overlaps.argmax(1), float(num_queries)
    scores = subject_scores(results.logits, multi_label=results.about.decoder.multi_label)
    images = zip(boxes, results.gt_boxes_by_image(), scores, strict=True)
    chosen = [
        select_queries(*image_boxes, scores=image_scores, nms_threshold=nms_threshold)
        for *image_boxes, image_scores in images
    ]
    queries, counts = zip(*chosen, strict=True)
    return np.concatenate(queries), float(np.mean(counts))
