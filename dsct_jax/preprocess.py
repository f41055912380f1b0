"""Deterministic image -> model input: decode, resize, pad, normalize; for training, evaluation and
prediction. Sizes are (height, width) in pixels; PIL's (width, height) stays inside this file.
"""

import dataclasses
import io
import struct
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8
from PIL import Image, ImageOps

from dsct_jax.errors import UserError

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of values in [0, 1] (released datasets/transforms.py)
STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What evaluation and prediction do to an image: its size, and the canvases it may fill."""

    short_side: int
    max_long_side: int
    buckets: tuple[Size, ...]


# What PIL raises for files that are damaged, cut short or no images at all.
_PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError)
DECODE_ERRORS = (*_PIL_ERRORS, struct.error, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # the EXIF tag
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I means 16 bits


def decode_image(path: Path, encoded: bytes | None = None, *, upright: bool = False) -> Image.Image:
    """The RGB image in a file, or in the bytes read from it, of any mode that `to_rgb` converts.

    Args:
        upright: apply the EXIF orientation, as every viewer does. Training does not: the data sets'
            boxes are given in the frame of the stored pixels.

    Raises:
        UserError: the file is missing, damaged, cut short, no image, or of a mode without a known
            range; the line names it.
    """
    try:
        with Image.open(path if encoded is None else io.BytesIO(encoded)) as image:
            return to_rgb(image, str(path), upright=upright)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except UserError:
        raise
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from None


def to_rgb(image: Image.Image, name: str, *, upright: bool) -> Image.Image:
    """An open image as RGB: alpha is dropped, palettes and CMYK are converted, 16-bit grey keeps
    its high byte. Raises UserError: grey of 32 bits, which may mean any range.
    """
    image.load()  # Pillow turns some files while it reads them, and then has no orientation left
    if upright and image.getexif().get(_ORIENTATION, 1) != 1:
        image_format = image.format
        image = ImageOps.exif_transpose(image)
        image.format = image_format
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit whole numbers" if image.mode == "I" else "32-bit floating point"
        remedy = "save it with 8 or 16 bits, unsigned"
        raise UserError(f"{name}: grey of {kind} (PIL mode {image.mode}) says no range; {remedy}")
    # RGB of a palette with transparency would warn; through RGBA the alpha is dropped all the same
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def resized_size(
    height: int, width: int, short_side: int, max_long_side: int | None = None
) -> Size:
    """(height, width) after bringing the short side to `short_side` without the long one passing
    `max_long_side`, as DETR does it (released datasets/transforms.py:93-105): the long side is
    truncated, and may pass the limit by a pixel or two (480x1500 at 800/1333 becomes 427x1334).
    """
    shortest, longest = min(height, width), max(height, width)
    if max_long_side is not None and longest / shortest * short_side > max_long_side:
        short_side = max(1, round(max_long_side * shortest / longest))
    if shortest == short_side:
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def resize(image: Image.Image, size: Size) -> Image.Image:
    """PIL's antialiased bilinear resize, as the released code uses; nothing to do costs nothing."""
    wanted = size[1], size[0]
    return image if image.size == wanted else image.resize(wanted, Image.Resampling.BILINEAR)


def choose_bucket(sizes: Iterable[Size], buckets: Iterable[Size]) -> Size | None:
    """The canvas of least area that holds every size, the first of equals; None: no canvas does."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    fitting = [bucket for bucket in buckets if bucket[0] >= height and bucket[1] >= width]
    return min(fitting, key=lambda bucket: bucket[0] * bucket[1], default=None)


def shrink_to_fit(size: Size, bucket: Size) -> Size:
    """`size` scaled down, aspect kept, until it fits the canvas; unchanged when it fits already."""
    (height, width), (room_height, room_width) = size, bucket
    if height <= room_height and width <= room_width:
        return size
    if room_height * width <= room_width * height:
        return room_height, max(1, width * room_height // height)
    return max(1, height * room_width // width), room_width


def fit_bucket(size: Size, buckets: Iterable[Size]) -> tuple[Size, Size]:
    """(size, bucket) of one image: the smallest canvas that holds it, else the one that it has to
    be scaled down least for.
    """
    buckets = tuple(buckets)
    bucket = choose_bucket([size], buckets)
    if bucket is None:
        bucket = max(buckets, key=lambda room: min(room[0] / size[0], room[1] / size[1]))
    return shrink_to_fit(size, bucket), bucket


def pad_to(image: UInt8[np.ndarray, "h w 3"], size: Size) -> UInt8[np.ndarray, "height width 3"]:
    """The image in the upper left corner of a black canvas of `size`."""
    canvas = np.zeros((*size, 3), np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def prepare_image(
    image: Image.Image, preprocessing: Preprocessing
) -> tuple[UInt8[np.ndarray, "height width 3"], Size]:
    """One RGB image as evaluation resizes and pads it, and the (height, width) it fills there."""
    limits = preprocessing.short_side, preprocessing.max_long_side
    wanted = resized_size(image.height, image.width, *limits)
    size, bucket = fit_bucket(wanted, preprocessing.buckets)
    return pad_to(np.asarray(resize(image, size)), bucket), size


def normalize(
    images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"], padding_mask: Bool[Array, "b h w"]
) -> Float32[Array, "b h w 3"]:
    """ImageNet normalization of pixels 0..255; padding becomes 0, as DETR pads after it."""
    mean, std = (jnp.array(x, jnp.float32).reshape(1, 1, 1, 3) for x in (MEAN, STD))
    scaled = (images.astype(jnp.float32) / 255 - mean) / std
    return jnp.where(padding_mask[..., None], jnp.float32(0), scaled)
