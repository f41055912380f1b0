"""How well people are found, whatever they feel: average precision of the boxes as COCO defines it, one category, all sizes.

Equals pycocotools and faster-coco-eval (tests/test_box_ap.py), without their dictionaries: thousands of images are matched at once.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from dsct_jax.boxes import elementwise_iou

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MAX_DETECTIONS = 100  # an image
_IMAGES_AT_ONCE = 2000  # bounds the memory


def box_average_precision(
    boxes: Float[np.ndarray, "n q 4"],
    scores: Float[np.ndarray, "n q"],
    gt_boxes: Float[np.ndarray, "m 4"],
    people_per_image: Int[np.ndarray, "n"],
) -> Float[np.ndarray, "10"]:
    """COCO's AP (101 recall points) at each of `IOU_THRESHOLDS`; its AP is the mean, AP50 and AP75 are elements 0 and 5.

    Every query is a detection. `boxes` and `gt_boxes` are (x1, y1, x2, y2) in any one unit.

    Raises:
        ValueError: there is nobody to find.
    """
    if len(gt_boxes) == 0:
        raise ValueError("box_average_precision: there is nobody to find")
    order = np.argsort(-scores, axis=1, kind="stable")[:, :_MAX_DETECTIONS]
    scores, boxes = np.take_along_axis(scores, order, 1), np.take_along_axis(boxes, order[..., None], 1)
    starts = np.concatenate([[0], people_per_image.cumsum()])
    matched = np.concatenate(
        [
            match(boxes[i : i + _IMAGES_AT_ONCE], gt_boxes[starts[i] : starts[min(i + _IMAGES_AT_ONCE, len(boxes))]], counts)
            for i in range(0, len(boxes), _IMAGES_AT_ONCE)
            for counts in [people_per_image[i : i + _IMAGES_AT_ONCE]]
        ]
    )
    falling = np.argsort(-scores.ravel(), kind="stable")
    return np.array([_area(hits, num_people=len(gt_boxes)) for hits in matched.reshape(-1, len(IOU_THRESHOLDS))[falling].T])


def match(
    boxes: Float[np.ndarray, "n q 4"], gt_boxes: Float[np.ndarray, "m 4"], people_per_image: Int[np.ndarray, "n"]
) -> Bool[np.ndarray, "n q 10"]:
    """Whether each box finds a person at each of `IOU_THRESHOLDS`, boxes of an image in falling order of their scores.

    Each takes the free person it overlaps most (of equals the last), if by the threshold.
    """
    most = max(1, int(people_per_image.max()))
    exists = np.arange(most) < people_per_image[:, None]
    people = np.zeros((len(boxes), most, 4))
    people[exists] = gt_boxes
    overlaps = elementwise_iou(boxes[:, :, None].astype(np.float64), people[:, None])
    free = np.repeat(exists[:, None], len(IOU_THRESHOLDS), 1)  # [n 10 t]
    matched = np.zeros((*boxes.shape[:2], len(IOU_THRESHOLDS)), bool)
    for rank in range(boxes.shape[1]):
        candidates = np.where(free, overlaps[:, rank, None], -1.0)
        best = most - 1 - candidates[..., ::-1].argmax(-1)
        matched[:, rank] = np.take_along_axis(candidates, best[..., None], -1)[..., 0] >= IOU_THRESHOLDS
        image, threshold = np.nonzero(matched[:, rank])
        free[image, threshold, best[image, threshold]] = False
    return matched


def _area(hits: Bool[np.ndarray, "d"], *, num_people: int) -> float:
    """Mean of the precision envelope at 101 recalls, 0 beyond the last one reached."""
    found = hits.cumsum()
    precision = np.maximum.accumulate((found / np.arange(1, len(hits) + 1))[::-1])[::-1]
    first = np.searchsorted(found / num_people, _RECALLS, side="left")
    return float(np.where(first < len(hits), precision[np.minimum(first, len(hits) - 1)], 0.0).mean())
