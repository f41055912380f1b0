"""From a query's logits to probabilities and scores, and which query answers for which person
(paper Section 4.1, released test.py).

Everything runs on the host in float64, except overlaps, which keep the boxes' type so that they tie
where the released ones do.
"""

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

from dsct_jax.boxes import elementwise_iou, non_max_suppression, pairwise_iou
from dsct_jax.evaluation.results import SplitResults
from dsct_jax.postprocess import class_probabilities, paper_scores

RELEASED_NMS_THRESHOLD = (
    0.01  # so low that neighbours suppress each other; commented out in the released code
)
_PIXEL = 1.0  # boxes include their last pixel in the released overlap


def subject_scores(
    logits: Float[np.ndarray, "*n c"], *, multi_label: bool
) -> Float[np.ndarray, "*n"]:
    """How much each query deserves to survive the evaluation's non-maximum suppression.

    Multi-label: the mean probability, as released (test.py:271). Multi-class: the mean logit, as
    the paper says; the mean of a softmax is the constant 1/k, so that the released order is one of
    rounding errors.
    """
    return (
        class_probabilities(logits, multi_label=True).mean(-1)
        if multi_label
        else paper_scores(logits)
    )


def select_queries(
    pred_boxes: Float[np.ndarray, "q 4"],
    gt_boxes: Num[np.ndarray, "t 4"],
    *,
    scores: Shaped[np.ndarray, "q"] | None = None,
    nms_threshold: float | None = None,
) -> tuple[Int[np.ndarray, "t"], int]:
    """The query that answers for each person of one image, and how many queries there were to
    choose from.

    Boxes are (x1, y1, x2, y2) in pixels; the overlap counts pixels inclusively. Among equal
    overlaps (no overlap at all, usually) the last query wins: the released argsort()[-1]. With
    `nms_threshold` only queries that survive suppression by `scores` can be chosen, in the order of
    their scores; among equal scores the later query comes first.
    """
    num_queries = len(pred_boxes)
    if num_queries == 0:
        raise ValueError("select_queries: there is no predicted box to choose from")
    candidates = np.arange(num_queries)
    if nms_threshold is not None:
        if scores is None:
            raise ValueError("select_queries: nms_threshold needs scores")
        candidates = (
            num_queries
            - 1
            - non_max_suppression(
                pred_boxes[::-1], scores[::-1], threshold=nms_threshold, offset=_PIXEL
            )
        )
    overlaps = pairwise_iou(pred_boxes[candidates[::-1]], gt_boxes, offset=_PIXEL)
    return candidates[::-1][overlaps.argmax(0)], len(
        candidates
    )  # the first maximum of the reversed order is the last


def select_all(
    results: SplitResults, *, nms_threshold: float | None
) -> tuple[Int[np.ndarray, "m"], float]:
    """`select_queries` for all people of a split, and the mean number of queries an image to choose
    from.
    """
    boxes, image = results.pixel_boxes, results.image_of_person
    num_images, num_queries = boxes.shape[:2]
    if nms_threshold is None:
        overlaps = elementwise_iou(boxes[image, ::-1], results.gt_boxes[:, None], offset=_PIXEL)
        return num_queries - 1 - overlaps.argmax(1), float(num_queries)
    scores = subject_scores(results.logits, multi_label=results.about.multi_label)
    people = np.split(results.gt_boxes, results.people_per_image.cumsum()[:-1])
    chosen = [
        select_queries(boxes[i], people[i], scores=scores[i], nms_threshold=nms_threshold)
        for i in range(num_images)
    ]
    return np.concatenate([queries for queries, _ in chosen]), float(
        np.mean([count for _, count in chosen])
    )
