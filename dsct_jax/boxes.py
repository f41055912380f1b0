"""Box arithmetic: (cx, cy, w, h) is what networks predict, (x1, y1, x2, y2) what areas need."""

from typing import Any

import numpy as np
from jaxtyping import Float, Num

# of jax or NumPy: these serve the device (losses) and the host, which may not have imported jax
AnyArray = Any


def cxcywh_to_xyxy(boxes: Num[AnyArray, "*n 4"]) -> Num[AnyArray, "*n 4"]:
    """(cx, cy, w, h) -> (x1, y1, x2, y2)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return boxes.__array_namespace__().concat([centre - 0.5 * size, centre + 0.5 * size], axis=-1)


def xyxy_to_cxcywh(boxes: Num[AnyArray, "*n 4"]) -> Num[AnyArray, "*n 4"]:
    """(x1, y1, x2, y2) -> (cx, cy, w, h)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return boxes.__array_namespace__().concat([(low + high) / 2, high - low], axis=-1)


def to_pixels(
    boxes: Num[np.ndarray, "*n 4"], sizes: tuple[int, int] | np.ndarray
) -> Num[np.ndarray, "*n 4"]:
    """(cx, cy, w, h) in [0, 1] of images of these (height, width) -> (x1, y1, x2, y2) in pixels."""
    return cxcywh_to_xyxy(boxes) * np.asarray(sizes, boxes.dtype)[..., [1, 0, 1, 0]]


def _areas(boxes: Float[AnyArray, "*n 4"]) -> Float[AnyArray, "*n"]:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou_and_giou(
    a: Float[AnyArray, "... 4"], b: Float[AnyArray, "... 4"], *, epsilon: float = 0.0
) -> tuple[Float[AnyArray, "..."], Float[AnyArray, "..."]]:
    """IoU and generalized IoU (Rezatofighi et al. 2019) of (x1, y1, x2, y2) boxes, element by
    element after broadcasting; a pair whose union is empty has IoU 0. Some authors add an `epsilon`
    to both denominators.
    """
    xp = a.__array_namespace__()
    low, high = xp.maximum(a[..., :2], b[..., :2]), xp.minimum(a[..., 2:], b[..., 2:])
    size = xp.clip(high - low, 0)
    intersection = size[..., 0] * size[..., 1]
    union = _areas(a) + _areas(b) - intersection
    iou = intersection / (xp.where(union > 0, union, 1) + epsilon)
    low, high = xp.minimum(a[..., :2], b[..., :2]), xp.maximum(a[..., 2:], b[..., 2:])
    size = xp.clip(high - low, 0)
    hull = size[..., 0] * size[..., 1]
    return iou, iou - (hull - union) / (xp.where(hull > 0, hull, 1) + epsilon)


def elementwise_iou(a: np.ndarray, b: np.ndarray, *, offset: float = 0.0) -> np.ndarray:
    """IoU on the host of (x1, y1, x2, y2) boxes a [*n 4] and b [*n 4] after broadcasting -> [*n]; 0
    for an empty union. `offset=1` counts pixels inclusively, as released (test.py:30-44).
    """
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    size = np.clip(high - low + offset, 0, None)
    intersection = size[..., 0] * size[..., 1]
    area_a = (a[..., 2] - a[..., 0] + offset) * (a[..., 3] - a[..., 1] + offset)
    area_b = (b[..., 2] - b[..., 0] + offset) * (b[..., 3] - b[..., 1] + offset)
    union = area_a + area_b - intersection
    return intersection / np.where(union > 0, union, 1)


def pairwise_iou(a: np.ndarray, b: np.ndarray, *, offset: float = 0.0) -> np.ndarray:
    """`elementwise_iou` of each of a [n 4] with each of b [m 4] -> [n m]."""
    return elementwise_iou(a[:, None], b[None], offset=offset)


def non_max_suppression(
    boxes: np.ndarray, scores: np.ndarray, *, threshold: float, offset: float = 0.0
) -> np.ndarray:
    """Indices of the boxes [n 4] (x1, y1, x2, y2) kept by greedy suppression, best score first: a
    box goes when its IoU with a kept one exceeds `threshold`.
    """
    order = np.argsort(-scores, kind="stable")
    overlaps = pairwise_iou(boxes, boxes, offset=offset)
    kept: list[int] = []
    for candidate in order:
        if all(overlaps[candidate, other] <= threshold for other in kept):
            kept.append(int(candidate))
    return np.array(kept, dtype=np.int64)


def inverse_sigmoid(x: Float[AnyArray, "*n"], *, eps: float = 1e-5) -> Float[AnyArray, "*n"]:
    """log(x / (1 - x)) of x clipped to [0, 1], both terms at least `eps`, as Deformable DETR's."""
    xp = x.__array_namespace__()
    x = xp.clip(x, 0, 1)
    return xp.log(xp.maximum(x, eps) / xp.maximum(1 - x, eps))
