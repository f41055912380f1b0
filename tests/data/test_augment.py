"""Augmentation: boxes against the released transforms, sizes against the released distribution,
pixels against the boxes.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp

from configs import base
from data.augment import (
    ERASED,
    NUM_DRAWS,
    NUM_ERASING_DRAWS,
    Transform,
    apply,
    crop_boxes,
    draw,
    draw_erased,
    flip_boxes,
    scale_boxes,
)
from data.config import DataConfig
from dsct_jax.boxes import xyxy_to_cxcywh

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "augment.npz")
CONFIG = DataConfig(class_names=("a", "b"), multi_label=False, **base.get_config().data.to_dict())


def test_boxes_after_the_evaluation_resize_equal_the_released_ones():
    for case in range(3):
        height, width = GOLDEN[f"{case}/out_size"].tolist()
        boxes = scale_boxes(
            GOLDEN[f"{case}/in_boxes"], tuple(GOLDEN[f"{case}/in_size"].tolist()), (height, width)
        )
        normalized = xyxy_to_cxcywh(boxes) / np.array([width, height, width, height], np.float32)
        np.testing.assert_array_equal(normalized, GOLDEN[f"{case}/out_boxes"])


def test_crop_and_flip_equal_the_released_ones():
    boxes, kept = crop_boxes(GOLDEN["crop_in_boxes"], tuple(GOLDEN["crop_region"].tolist()))
    np.testing.assert_array_equal(boxes, GOLDEN["crop_out_boxes"])
    np.testing.assert_array_equal(kept, GOLDEN["crop_kept"])
    np.testing.assert_array_equal(
        (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), GOLDEN["crop_out_area"]
    )
    np.testing.assert_array_equal(
        flip_boxes(GOLDEN["crop_in_boxes"], int(GOLDEN["hflip_width"])), GOLDEN["hflip_out_boxes"]
    )


def test_final_sizes_are_distributed_as_in_the_released_transform():
    rng = np.random.default_rng(0)
    ours = np.array(
        [draw(CONFIG, 420, 640, rng.random(NUM_DRAWS).tolist()).size for _ in range(4000)]
    )
    released = GOLDEN["train_sizes"]
    for axis in range(2):
        assert ks_2samp(ours[:, axis], released[:, axis]).pvalue > 0.05
    assert (
        ks_2samp(ours[:, 1] / ours[:, 0], released[:, 1] / released[:, 0]).pvalue > 0.05
    )  # the mix of crops and whole images


@settings(deadline=None)
@given(
    st.integers(20, 900),
    st.integers(20, 900),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=NUM_DRAWS, max_size=NUM_DRAWS),
)
def test_crops_lie_inside_the_image_and_have_allowed_sides(height, width, uniform):
    transform = draw(CONFIG, height, width, uniform)
    assert (transform.crop is None) == (uniform[1] >= 0.5) and transform.flip == (uniform[0] < 0.5)
    assert min(transform.size) in CONFIG.short_sides or max(
        transform.size
    ) >= CONFIG.max_long_side - max(1, max(transform.size) // min(transform.size))
    if transform.crop is not None:
        top, left, crop_height, crop_width = transform.crop
        assert min(transform.crop_resize) in CONFIG.crop_resize
        assert (
            top >= 0
            and left >= 0
            and top + crop_height <= transform.crop_resize[0]
            and left + crop_width <= transform.crop_resize[1]
        )
        assert all(
            min(384, full) <= side <= 600
            for side, full in zip((crop_height, crop_width), transform.crop_resize, strict=True)
        )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [None, (20, 30, 70, 120)])
def test_boxes_follow_the_pixels(flip, crop):
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[40:70, 60:110] = 255
    transform = Transform(
        (140, 240), flip=flip, crop_resize=None if crop is None else (100, 200), crop=crop
    )
    image, boxes, kept = apply(
        transform, Image.fromarray(pixels), np.array([[60, 40, 110, 70]], np.float32)
    )
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
    assert kept.tolist() == [0] and (image.height, image.width) == transform.size
    np.testing.assert_allclose(
        boxes[0], [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1.01
    )


def test_people_cropped_away_are_dropped_and_an_image_may_end_empty():
    image = Image.new("RGB", (200, 100))
    boxes = np.array([[0, 0, 20, 20], [150, 50, 200, 100], [90, 40, 100, 50]], np.float32)
    _, left, kept = apply(
        Transform((50, 50), crop_resize=(100, 200), crop=(0, 0, 50, 91)), image, boxes
    )
    assert kept.tolist() == [0, 2]  # the third by a single column
    np.testing.assert_allclose(left[1], [90 * 50 / 91, 40, 50, 50], rtol=1e-6)
    _, left, kept = apply(
        Transform((50, 50), crop_resize=(100, 200), crop=(60, 0, 30, 60)), image, boxes
    )
    assert left.shape == (0, 4) and kept.size == 0
    _, left, kept = apply(Transform((50, 50), flip=True), image, np.zeros((0, 4), np.float32))
    assert left.shape == (0, 4) and kept.size == 0


def test_color_is_left_alone_by_default_and_changed_on_request():
    rng = np.random.default_rng(0)
    draws = [rng.random(NUM_DRAWS).tolist() for _ in range(400)]
    plain = [draw(CONFIG, 100, 100, uniform) for uniform in draws]
    assert {(t.brightness, t.contrast, t.saturation) for t in plain} == {(1.0, 1.0, 1.0)}
    colored = dataclasses.replace(CONFIG, color_jitter=0.4, grayscale_probability=0.25)
    changed = [draw(colored, 100, 100, uniform) for uniform in draws]
    assert [
        dataclasses.replace(t, brightness=1.0, contrast=1.0, saturation=1.0) for t in changed
    ] == plain  # the geometry is the same
    factors = np.array([t.brightness for t in changed])
    assert factors.min() < 0.65 and factors.max() > 1.35 and abs(factors - 1).max() <= 0.4
    assert 0.18 < np.mean([t.saturation == 0 for t in changed]) < 0.32


def test_color_changes_reach_the_pixels():
    image = Image.new("RGB", (4, 4), (100, 50, 20))
    boxes = np.zeros((0, 4), np.float32)
    assert apply(Transform((4, 4), brightness=1.5), image, boxes)[0].getpixel((0, 0)) == (
        150,
        75,
        30,
    )
    red, green, blue = apply(Transform((4, 4), saturation=0.0), image, boxes)[0].getpixel((0, 0))
    assert red == green == blue


def test_erasing_paints_the_same_part_of_every_box_and_nothing_else():
    image = Image.fromarray(np.full((60, 80, 3), 200, np.uint8))
    boxes = np.array([[10, 10, 50, 40], [60, 0, 80, 20]], np.float32)
    plain = Transform(size=(60, 80))
    erased = dataclasses.replace(plain, erased=(0.5, 0.5, 0.25, 0.25, 0.1))
    before, after = (np.asarray(apply(how, image, boxes)[0]) for how in (plain, erased))
    changed = (before != after).any(-1)
    assert (before == 200).all() and set(np.unique(after)) == {25, 200}  # the cached one is whole
    assert changed[25:32, 30:40].all() and changed[10:15, 70:75].all()
    assert changed.sum() == 7 * 10 + 5 * 5


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_how_often_and_how_much_is_erased(probability):
    config = dataclasses.replace(CONFIG, erase_probability=probability)
    uniform = np.random.default_rng(0).random((4000, NUM_ERASING_DRAWS))
    found = [draw_erased(config, numbers.tolist()) for numbers in uniform]
    some = np.array([one for one in found if one])
    assert abs(len(some) / 4000 - probability) < 0.03
    if probability:
        left, top, width, height, gray = some.T
        assert width.min() >= ERASED[0] and height.max() <= ERASED[1]
        assert (left + width).max() <= 1 and (top + height).max() <= 1 and gray.max() < 1
