"""COCO's box AP against faster-coco-eval on random images, and by hand."""

import contextlib
import io

import numpy as np
import pytest

from dsct_jax.evaluation.measures import IOU_THRESHOLDS, box_average_precision


def random_split(rng, num_images, num_queries):
    """Boxes on a coarse grid near the people: many partial overlaps, equal overlaps and equal
    scores.
    """
    people_per_image = rng.integers(0, 5, num_images)
    people_per_image[0] = 2
    gt_boxes = random_boxes(rng, people_per_image.sum())
    boxes = np.stack([random_boxes(rng, num_queries) for _ in range(num_images)])
    start = 0
    for image, count in enumerate(people_per_image):
        for query in range(min(num_queries, count)):
            if rng.random() < 0.8:
                boxes[image, query] = gt_boxes[start + query] + rng.integers(-6, 7, 4)
        start += count
    return boxes, np.round(rng.random((num_images, num_queries)), 1), gt_boxes, people_per_image


def random_boxes(rng, n):
    corners = rng.integers(0, 200, (n, 2))
    return np.concatenate([corners, corners + rng.integers(20, 120, (n, 2))], -1).astype(np.float64)


def official(boxes, scores, gt_boxes, people_per_image):
    coco_eval = pytest.importorskip(
        "faster_coco_eval", reason="faster-coco-eval is not installed (the coco extra)"
    )
    width_height = np.concatenate([gt_boxes[:, :2], gt_boxes[:, 2:] - gt_boxes[:, :2]], -1)
    image = np.repeat(np.arange(len(boxes)), people_per_image)
    document = {
        "info": {},
        "images": [{"id": i + 1, "width": 1000, "height": 1000} for i in range(len(boxes))],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": n + 1,
                "image_id": int(i) + 1,
                "category_id": 1,
                "bbox": box.tolist(),
                "area": float(box[2] * box[3]),
                "iscrowd": 0,
            }
            for n, (i, box) in enumerate(zip(image, width_height, strict=True))
        ],
    }
    detections = [
        {
            "image_id": i + 1,
            "category_id": 1,
            "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            "score": float(score),
        }
        for i in range(len(boxes))
        for box, score in zip(boxes[i], scores[i], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_eval.COCO(document)
        evaluation = coco_eval.COCOeval_faster(truth, truth.loadRes(detections), "bbox")
        evaluation.run()
    precision = evaluation.eval["precision"]  # [thresholds recalls classes areas detections]
    return np.asarray(precision)[:, :, 0, 0, -1].mean(1)


@pytest.mark.parametrize("seed", range(6))
def test_equals_faster_coco_eval(seed):
    rng = np.random.default_rng(seed)
    split = random_split(
        rng, num_images=(1, 3, 40, 120, 200, 60)[seed], num_queries=(1, 4, 4, 9, 4, 130)[seed]
    )
    expected = official(*split)
    assert expected.max() > 0
    np.testing.assert_allclose(box_average_precision(*split), expected, atol=1e-9)


def test_by_hand():
    people = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 10]], float)
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 10, 9]], [[0, 0, 10, 7], [50, 50, 60, 60]]], float)
    scores = np.array([[0.9, 0.8], [0.7, 0.1]])
    precisions = box_average_precision(boxes, scores, people, np.array([2, 1]))
    # Hit, double, hit (IoU 0.7), nothing: recall 1/3 at precision 1, 2/3 at 2/3; with 101 recalls
    # 34 and 33 of them.
    np.testing.assert_allclose(precisions[IOU_THRESHOLDS < 0.69], (34 + 33 * 2 / 3) / 101)
    np.testing.assert_allclose(precisions[IOU_THRESHOLDS > 0.71], 34 / 101)
    swapped = box_average_precision(boxes[::-1], scores[::-1], people[[2, 0, 1]], np.array([1, 2]))
    np.testing.assert_allclose(swapped, precisions)


def test_nobody_to_find_and_no_image():
    with pytest.raises(ValueError, match="nobody to find"):
        box_average_precision(
            np.zeros((1, 2, 4)), np.zeros((1, 2)), np.zeros((0, 4)), np.zeros(1, int)
        )
