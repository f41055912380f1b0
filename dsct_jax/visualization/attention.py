"""Where a two-stage network looked (GLAMOR-Net's Figure 5)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dsct_jax.crops import CropConfig
from dsct_jax.visualization.drawing import draw_subjects

_SHARE = 0.55  # of the heat in the picture
_HEAT = np.array([(0, 0, 130), (0, 170, 255), (255, 230, 0), (220, 0, 0)], np.float64)  # low..high


def draw_attention(
    image: Image.Image, subjects: Sequence[Any], crops: CropConfig
) -> list[Image.Image]:
    """A picture for each person who has attention: it, from its least to its largest value, over
    the part of the image that the network saw of the context; fusion weights below the emotions.
    """
    pictures = []
    for subject in subjects:
        if getattr(subject, "attention", None) is None:
            continue
        heat, place = np.array(subject.attention, np.float32), context_place(image.size, crops)
        heat = (heat - heat.min()) / max(float(np.ptp(heat)), 1e-12)
        size = (max(1, place[2] - place[0]), max(1, place[3] - place[1]))
        fine = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))
        steps = np.linspace(0, 1, len(_HEAT))
        colors = np.stack([np.interp(fine, steps, channel) for channel in _HEAT.T], -1)
        seen = np.asarray(image.crop(place), np.float64)
        mixed = image.copy()
        mixed.paste(
            Image.fromarray((_SHARE * colors + (1 - _SHARE) * seen).astype(np.uint8)), place[:2]
        )
        ImageDraw.Draw(mixed).rectangle(place, outline="white")
        picture = draw_subjects(mixed, [subject])
        if subject.fusion_weights:
            face, context = subject.fusion_weights
            text = f"face {face:.2f}  context {context:.2f}"
            ImageDraw.Draw(picture).text((8, 8), text, fill="white", stroke_width=2, stroke_fill=0)
        pictures.append(picture)
    return pictures


def context_place(size: tuple[int, int], crops: CropConfig) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the context in an image of (width, height)."""
    (height, width), (top, left) = crops.context_resize, crops.context_corner
    x, y = size[0] / width, size[1] / height
    right, bottom = (left + crops.context_size) * x, (top + crops.context_size) * y
    return round(left * x), round(top * y), round(right), round(bottom)
