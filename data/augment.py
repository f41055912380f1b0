"""Train-only randomness: DETR's recipe (paper Appendix C; released datasets/emotic.py), and color
changes for training from scratch; and that of two-stage networks, of a person's two crops.

`draw` turns uniform numbers and an image's size into a `Transform` without touching a pixel, so
that the batch plan knows every final size beforehand; `apply` carries it out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageEnhance
from scipy import ndimage

from data.config import DataConfig
from data.readers.records import Boxes, clip_boxes, has_area
from dsct_jax.crops import CropConfig, cut_crops, round_crop
from dsct_jax.preprocess import Size, resize, resized_size

NUM_DRAWS = 12  # uniform numbers per image and epoch
NUM_ERASING_DRAWS = 6  # and further ones with `erase_probability`
ERASED = (0.15, 0.45)  # smallest and largest part of a box's side


@dataclasses.dataclass(frozen=True)
class Transform:
    """Geometry and color of one augmented image: flip, resize and crop (or not), then resize."""

    size: Size  # final (height, width)
    flip: bool = False
    crop_resize: Size | None = None  # (height, width) before the crop
    crop: tuple[int, int, int, int] | None = None  # top, left, height, width
    brightness: float = 1.0  # factors, 1 = unchanged
    contrast: float = 1.0
    saturation: float = 1.0
    rotation: float = 0.0  # degrees; of a subject only
    # left, top, width, height in 0..1 of each box, and the gray of what is put there
    erased: tuple[float, float, float, float, float] | None = None
    # of the person cut out, where this one is of the context
    subject: "Transform | None" = None


def draw(config: DataConfig, height: int, width: int, uniform: Sequence[float]) -> Transform:
    """The random transform of a `height` x `width` image that NUM_DRAWS numbers in [0, 1) mean.

    Half of the time (`crop_probability`) the image is brought to a short side of `crop_resize`, a
    region with sides between the two `crop_size` is cut out, and that is resized; else the whole
    image is resized. Sides smaller than the smallest crop are kept whole.
    """
    flip, branch, before, crop_width, crop_height, top, left, side, *colors = uniform
    crop_resize, crop = None, None
    if branch < config.crop_probability:
        crop_resize = resized_size(height, width, _pick(config.crop_resize, before))
        full_height, full_width = crop_resize
        smallest, largest = config.crop_size
        height = _between(min(smallest, full_height), min(largest, full_height), crop_height)
        width = _between(min(smallest, full_width), min(largest, full_width), crop_width)
        corner = _between(0, full_height - height, top), _between(0, full_width - width, left)
        crop = (*corner, height, width)
    return Transform(
        size=resized_size(height, width, _pick(config.short_sides, side), config.max_long_side),
        flip=flip < config.flip_probability,
        crop_resize=crop_resize,
        crop=crop,
        **_colors(config, colors),
    )


def draw_crops(config: DataConfig, crops: CropConfig, uniform: Sequence[float]) -> Transform:
    """The random transform of a person's two crops that NUM_DRAWS numbers in [0, 1) mean."""
    top, left, flip, other_flip, turn, *colors, gray = uniform
    size, (down, right) = crops.context_size, crops.spare
    subject = Transform(
        size=(crops.subject_size,) * 2,
        flip=flip < config.flip_probability,
        rotation=crops.rotation * (2 * turn - 1),
        **_colors(config, (*colors[:3], gray)),
    )
    context = Transform(
        size=(size, size),
        crop=(_between(0, down, top), _between(0, right, left), size, size),
        subject=subject,
    )
    if not crops.augment_context:
        return context
    return dataclasses.replace(
        context, flip=other_flip < config.flip_probability, **_colors(config, (*colors[3:], gray))
    )


def draw_erased(
    config: DataConfig, uniform: Sequence[float]
) -> tuple[float, float, float, float, float] | None:
    """`Transform.erased` that NUM_ERASING_DRAWS numbers in [0, 1) mean."""
    happens, left, top, width, height, gray = uniform
    if happens >= config.erase_probability:
        return None
    smallest, largest = ERASED
    width, height = (smallest + (largest - smallest) * x for x in (width, height))
    return left * (1 - width), top * (1 - height), width, height, gray


def _colors(config: DataConfig, uniform: Sequence[float]) -> dict[str, Any]:
    brightness, contrast, saturation, gray = uniform
    strength, is_gray = config.color_jitter, gray < config.grayscale_probability
    return {
        "brightness": 1 + strength * (2 * brightness - 1),
        "contrast": 1 + strength * (2 * contrast - 1),
        "saturation": 0.0 if is_gray else 1 + strength * (2 * saturation - 1),
    }


def apply(
    transform: Transform, image: Image.Image, boxes: Boxes
) -> tuple[Image.Image, Boxes, Int[np.ndarray, " kept"]]:
    """The transformed RGB image, the boxes that are left in it, and whose they are."""
    kept = np.arange(len(boxes))
    if transform.flip:
        boxes = flip_boxes(boxes, image.width)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if transform.crop is not None and transform.crop_resize is not None:
        boxes = scale_boxes(boxes, (image.height, image.width), transform.crop_resize)
        image = resize(image, transform.crop_resize)
        boxes, kept = crop_boxes(boxes, transform.crop)
        top, left, height, width = transform.crop
        image = image.crop((left, top, left + width, top + height))
    boxes = scale_boxes(boxes, (image.height, image.width), transform.size)
    image = _recolor(transform, resize(image, transform.size))
    if transform.erased is not None:
        image = erase(image, boxes, transform.erased)
    return image, boxes, kept


def erase(image: Image.Image, boxes: Boxes, erased: Sequence[float]) -> Image.Image:
    """The same part of each box painted gray: (left, top, width, height, gray) in 0..1."""
    image = image.copy()  # the one given may be the one that is kept
    left, top, width, height, gray = erased
    for x1, y1, x2, y2 in boxes.tolist():
        x, y = x1 + left * (x2 - x1), y1 + top * (y2 - y1)
        place = (x, y, x + width * (x2 - x1), y + height * (y2 - y1))
        image.paste((int(256 * gray),) * 3, tuple(round(value) for value in place))
    return image


def apply_crops(
    transform: Transform, image: Image.Image, boxes: Boxes, person: int, crops: CropConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(context, subject) of one of the image's people, uint8, as a network sees them."""
    corner = None if transform.crop is None else transform.crop[:2]
    pair = cut_crops(image, boxes[person], crops, everybody=boxes, corner=corner)
    changes = transform, transform.subject or Transform((0, 0))
    context, subject = (
        _augment_crop(how, round_crop(x)) for how, x in zip(changes, pair, strict=True)
    )
    return context, subject


def _augment_crop(transform: Transform, crop: np.ndarray) -> np.ndarray:
    if transform.flip:
        crop = crop[:, ::-1]
    if transform.rotation:
        crop = ndimage.rotate(crop, transform.rotation, reshape=False, order=1, mode="nearest")
    return np.asarray(_recolor(transform, Image.fromarray(crop)))


def flip_boxes(boxes: Boxes, width: int) -> Boxes:
    """Boxes of the mirrored image."""
    mirrored = boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32)
    return mirrored + np.array([width, 0, width, 0], np.float32)


def scale_boxes(boxes: Boxes, old: Size, new: Size) -> Boxes:
    """Boxes of an image resized from `old` to `new` (height, width)."""
    vertical, horizontal = new[0] / old[0], new[1] / old[1]
    return boxes * np.array([horizontal, vertical, horizontal, vertical], np.float32)


def crop_boxes(
    boxes: Boxes, crop: tuple[int, int, int, int]
) -> tuple[Boxes, Int[np.ndarray, " kept"]]:
    """Boxes cut to (top, left, height, width), and whose they are; any area counts, as in DETR."""
    top, left, height, width = crop
    moved = clip_boxes(boxes - np.array([left, top, left, top], np.float32), height, width)
    kept = np.flatnonzero(has_area(moved))
    return moved[kept], kept


def _recolor(transform: Transform, image: Image.Image) -> Image.Image:
    for enhancer, factor in (
        (ImageEnhance.Brightness, transform.brightness),
        (ImageEnhance.Contrast, transform.contrast),
        (ImageEnhance.Color, transform.saturation),
    ):
        if factor != 1:
            image = enhancer(image).enhance(factor)
    return image


def _pick(choices: Sequence[int], uniform: float) -> int:
    return choices[int(uniform * len(choices))]


def _between(low: int, high: int, uniform: float) -> int:
    """An integer of [low, high], both included."""
    return low + int(uniform * (high - low + 1))
