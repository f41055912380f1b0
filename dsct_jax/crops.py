"""What a two-stage network sees of a person: the person cut out, and the whole image around.

One function for training, evaluation and prediction, on the host, from the image at full
resolution. The chains are those of the networks' code (CAER-Net-S: pil; GLAMOR-Net: tensorflow;
EMO-Net: opencv, and bicubic, which a second data path of it has).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float32, Num, Shaped, UInt8
from PIL import Image

from dsct_jax.config import cannot_be_used, check_settings, setting
from dsct_jax.preprocess import MEAN, STD, Size

_UNIT = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
# (mean, std) of RGB values in [0, 1], of the context and of the subject
PIXELS = {
    "unit": (_UNIT, _UNIT),
    "imagenet": ((MEAN, STD), (MEAN, STD)),
    "emotic": (
        ((0.4690646, 0.4407227, 0.40508908), (0.2514227, 0.24312855, 0.24266963)),
        ((0.43832874, 0.3964344, 0.3706214), (0.24784276, 0.23621225, 0.2323653)),
    ),
}
_PIL = {"pil": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Settings of the `model` section of a network that sees crops."""

    resize: str = setting(
        "tensorflow",
        "pil, bicubic: Pillow's, antialiased; tensorflow: bilinear without antialiasing; opencv: "
        "the same, rounded. pil keeps what is outside of the image as black, and masks one pixel "
        "more at the right and the bottom",
        choices=(*_PIL, "tensorflow", "opencv"),
    )
    subject_size: int = setting(96, "pixels, both sides of the person's crop", low=1)
    context_size: int = setting(112, "pixels, both sides of the context", low=1)
    context_resize: tuple[int, int] = setting(
        (128, 171), "(height, width) of the whole image, of which the context is a crop", low=1
    )
    context_corner: tuple[int, int] = setting(
        (8, 29), "(top, left) of that crop; in training it is drawn", low=0
    )
    face_in_context: str = setting(
        "masked_own",
        "masked_own: the person is black in the context; masked_all: everybody is",
        choices=("masked_own", "masked_all", "visible"),
    )
    pixels: str = setting("unit", "mean and standard deviation of the input", choices=PIXELS)
    rotation: float = setting(
        20.0, "degrees that training turns the subject by at most", low=0, high=180, free=True
    )
    augment_context: bool = setting(
        False, "False: training flips and colors the subject only; True: both, apart", free=True
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")
        if any(space < 0 for space in self.spare):
            wanted = f"at least config.model.context_size ({self.context_size})"
            raise cannot_be_used("model.context_resize", self.context_resize, wanted)
        if any(a > b for a, b in zip(self.context_corner, self.spare, strict=True)):
            wanted = f"at most {self.spare}, what the crop leaves of the image"
            raise cannot_be_used("model.context_corner", self.context_corner, wanted)

    @property
    def spare(self) -> tuple[int, int]:
        """How far (down, right) the crop of the context can move."""
        height, width = self.context_resize
        return height - self.context_size, width - self.context_size

    @property
    def canvases(self) -> tuple[Size]:
        """The one size of `images`."""
        return ((self.context_size, self.context_size),)


def cut_crops(
    image: Image.Image,
    box: Num[np.ndarray, "4"],
    config: CropConfig,
    *,
    everybody: Iterable[Num[np.ndarray, "4"]] = (),
    corner: tuple[int, int] | None = None,
) -> tuple[Shaped[np.ndarray, "c c 3"], Shaped[np.ndarray, "s s 3"]]:
    """(context, subject) of one person, pixels 0..255: uint8, or not rounded float32 (tensorflow).

    Args:
        image: RGB.
        box: (x1, y1, x2, y2) in pixels; one without area is nobody: a black subject, no mask.
        everybody: the boxes of the image, for face_in_context="masked_all".
        corner: (top, left) of the context's crop; None = that of evaluation.
    """
    pixels, place = np.asarray(image), _integer(box)
    subject_size, context_size = (config.subject_size,) * 2, config.context_size
    masked = {"visible": [], "masked_own": [place]}.get(
        config.face_in_context, [place, *map(_integer, everybody)]
    )
    context = pixels.copy() if masked else pixels
    for x1, y1, x2, y2 in masked:
        if x2 > x1 and y2 > y1:
            more = int(config.resize == "pil")
            context[max(y1, 0) : max(y2 + more, 0), max(x1, 0) : max(x2 + more, 0)] = 0
    top, left = corner or config.context_corner
    context = _resize(context, config.context_resize, config.resize)
    context = context[top : top + context_size, left : left + context_size]
    if config.resize == "pil":
        person = np.asarray(image.crop(place)) if place[2] > place[0] else pixels[:0]
    else:
        x1, y1, x2, y2 = (max(corner, 0) for corner in place)
        person = pixels[y1:y2, x1:x2]
    if person.size == 0:
        return context, np.zeros((*subject_size, 3), context.dtype)
    return context, _resize(person, subject_size, config.resize)


def _integer(box: Num[np.ndarray, "4"]) -> tuple[int, int, int, int]:
    """The pixels that a box touches."""
    x1, y1, x2, y2 = map(float, box)
    return int(np.floor(x1)), int(np.floor(y1)), int(np.ceil(x2)), int(np.ceil(y2))


def _resize(pixels: UInt8[np.ndarray, "h w 3"], size: Size, method: str) -> np.ndarray:
    if method in _PIL:
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], _PIL[method]))
    exact = bilinear(bilinear(pixels.swapaxes(0, 1), size[1]).swapaxes(0, 1), size[0])
    return exact if method == "tensorflow" else np.rint(exact).astype(np.uint8)


def bilinear(values: Shaped[np.ndarray, "n m c"], size: int) -> Float32[np.ndarray, "{size} m c"]:
    """The first axis resized to `size`: between the two nearest centers, without antialiasing."""
    n, half = len(values), np.float32(0.5)
    places = (np.arange(size, dtype=np.float32) + half) * np.float32(n / size) - half
    lower = np.floor(places).astype(int)
    share = (places - lower).astype(np.float32)[:, None, None]
    first, second = (values[np.clip(i, 0, n - 1)].astype(np.float32) for i in (lower, lower + 1))
    return first + (second - first) * share


def normalize_crops(
    images: UInt8[Any, "b c c 3"], subjects: UInt8[Any, "b s s 3"], pixels: str
) -> tuple[Float32[Any, "b c c 3"], Float32[Any, "b s s 3"]]:
    """Pixels 0..255 -> what the network takes; `pixels` is a name of PIXELS."""
    xp = images.__array_namespace__()
    context, subject = (
        (x.astype(xp.float32) / 255 - xp.asarray(mean, dtype=xp.float32))
        / xp.asarray(std, dtype=xp.float32)
        for x, (mean, std) in zip((images, subjects), PIXELS[pixels], strict=True)
    )
    return context, subject


def round_crop(crop: Shaped[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """A crop as it travels to the device."""
    return crop if crop.dtype == np.uint8 else np.rint(crop).astype(np.uint8)
