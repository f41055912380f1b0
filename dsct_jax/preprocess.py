"""Deterministic image -> model input: decode, resize, pad, normalize; for training, evaluation and
prediction. Sizes are (height, width) in pixels; PIL's (width, height) stays inside this file.
"""

import contextlib
import dataclasses
import functools
import io
import math
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image, UnidentifiedImageError

from dsct_jax.errors import TooLarge, UserError

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of values in [0, 1] (released datasets/transforms.py)
STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What evaluation and prediction do to an image: its size, and the canvases it may fill."""

    short_side: int
    max_long_side: int
    buckets: tuple[Size, ...]


with contextlib.suppress(ImportError):  # the extra heic
    from pillow_heif import register_heif_opener

    register_heif_opener()

# What PIL raises for files that are damaged, cut short or no images at all.
_PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError)
DECODE_ERRORS = (*_PIL_ERRORS, struct.error, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # the EXIF tag, and what turns an image of each value upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_INFO = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_TAIL = 1 << 16  # bytes at the end of a PNG, where some programs write EXIF
_PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"adobe.xmp")
_OPENING = threading.Lock()
_HEIC = (".heic", ".heif", ".hif")
_HEIC_REMEDY = "pip install 'dsct-jax[heic]'"
_NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # that PIL knows, and seldom reads
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I means 16 bits


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Those of the files that PIL reads here, in small letters, with the dot."""
    formats = Image.registered_extensions()
    readable = Image.OPEN.keys() - {*_NO_PICTURES} | {"MPO"}  # which JPEG's plugin opens
    return tuple(sorted(suffix for suffix, name in formats.items() if name in readable))


def suffix_remedy(suffix: str) -> str:
    """What to do about files of a suffix that is not among `image_suffixes`; "" = nothing."""
    missing = suffix in _HEIC and suffix not in image_suffixes()
    return f" ({_HEIC_REMEDY})" if missing else ""


@contextlib.contextmanager
def open_image(
    path: Path, encoded: bytes | None = None, *, max_megapixels: float
) -> Iterator[Image.Image]:
    """The image in a file, or in the bytes read from it, for as long as the block lasts. Raises
    UserError, also for what decoding it inside the block raises: the file is missing, damaged, cut
    short, or no image; TooLarge for more than `max_megapixels`.
    """
    source = path if encoded is None else io.BytesIO(encoded)
    try:
        with _open(source) as image:
            if image.width * image.height > max_megapixels * 1e6:
                size = f"{image.width}x{image.height}, more than {max_megapixels:g} megapixels"
                remedy = "make it smaller, or raise config.data.max_megapixels or --max-megapixels"
                raise TooLarge(f"{path}: is {size}; {remedy}")
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except UserError:
        raise
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no kind of image that PIL knows"
        reason += suffix_remedy(path.suffix.lower())
        raise UserError(f"{path}: cannot be read as an image ({reason})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One thread at a time, without PIL's warnings of damaged EXIF: warnings and limits are its
    globals.
    """
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(source: Path | io.BytesIO) -> Image.Image:
    """Image.open without a limit of its own, which is a global of PIL."""
    with _quiet():
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def decode_image(
    path: Path,
    encoded: bytes | None = None,
    *,
    upright: bool = False,
    max_megapixels: float = math.inf,
) -> Image.Image:
    """The RGB image in a file, or in the bytes read from it, of any mode that `to_rgb` converts.

    Args:
        upright: apply the EXIF orientation, as every viewer does.

    Raises:
        UserError: the file is missing, damaged, cut short, no image, of a mode without a known
            range, or larger than `max_megapixels`; the line names it.
    """
    with open_image(path, encoded, max_megapixels=max_megapixels) as image:
        return to_rgb(image, str(path), upright=upright)


def to_rgb(image: Image.Image, name: str, *, upright: bool) -> Image.Image:
    """An open image as RGB, without EXIF: alpha is dropped, palettes and CMYK are converted, 16-bit
    grey keeps its high byte. Raises UserError: grey of 32 bits, which may mean any range.
    """
    image.load()
    sixteen_bits = image.mode == "I" and image.format in _SIXTEEN_BITS
    if upright and (turn := _TURNS.get(orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16") or sixteen_bits:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit whole numbers" if image.mode == "I" else "32-bit floating point"
        remedy = "save it with 8 or 16 bits, unsigned"
        raise UserError(f"{name}: grey of {kind} (PIL mode {image.mode}) says no range; {remedy}")
    # RGB of a palette with transparency would warn; through RGBA the alpha is dropped all the same
    rgb = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    for key in _EXIF_INFO:  # no longer true
        rgb.info.pop(key, None)
    return rgb


def orientation(image: Image.Image) -> int:
    """The EXIF orientation 2 to 8 that the pixels of an open image wait for; 1 where there is none,
    or where it cannot be read.
    """
    if image.format == "TIFF":  # Pillow turns these while it decodes them
        return 1
    if image.format == "PNG" and "exif" not in image.info and (file := getattr(image, "fp", None)):
        place = file.tell()  # Pillow would decode every image to see whether EXIF follows
        file.seek(max(0, file.seek(0, io.SEEK_END) - _TAIL))
        tail = file.read()
        file.seek(place)
        if not any(mark in tail for mark in _PNG_MARKS):
            return 1
    try:
        with _quiet():
            value = image.getexif().get(_ORIENTATION)
    except DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


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
    images: UInt8[Any, "b h w 3"] | Float[Any, "b h w 3"], padding_mask: Bool[Any, "b h w"]
) -> Float32[Any, "b h w 3"]:
    """ImageNet normalization of pixels 0..255; padding becomes 0, as DETR pads after it."""
    xp = images.__array_namespace__()
    mean, std = (xp.asarray(x, dtype=xp.float32) for x in (MEAN, STD))
    scaled = (images.astype(xp.float32) / 255 - mean) / std
    return xp.where(padding_mask[..., None], xp.float32(0), scaled)
