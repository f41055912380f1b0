"""Which picture the boxes of an image mean: the pixels as they are stored, or the upright picture
that viewers make of them by the EXIF orientation. Annotation files do not say; sizes and boxes may.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from dsct_jax.errors import UserError
from dsct_jax.preprocess import Size

Boxes = Float32[np.ndarray, "t 4"]  # (x1, y1, x2, y2) in pixels
FRAMES = UPRIGHT, STORED = "upright", "stored"
_FEW = 0.02  # of the images: what they say is not taken for the others


@dataclasses.dataclass(frozen=True, eq=False)
class FoundImage:
    """An image file with its people, before it is known which picture they are marked in."""

    path: Path
    name: str
    boxes: Boxes  # as annotated
    labels: Sequence[Sequence[int]]
    annotated: Size | None
    stored: Size
    orientation: int  # EXIF, 1 to 8
    hint: str  # the frame that the annotation file or its format names; "" = none

    def size(self, frame: str) -> Size:
        """(height, width) of the picture."""
        return self.stored[::-1] if frame == UPRIGHT and self.orientation > 4 else self.stored

    def scaled_boxes(self, frame: str) -> Boxes:
        """The boxes in pixels of the picture; scaled where it was annotated in another size, unless
        they leave that size and fit the picture.
        """
        size, annotated = self.size(frame), self.annotated
        if annotated in (None, size) or not _same_shape(annotated, size):
            return self.boxes
        if not _fit(self.boxes, annotated) and _fit(self.boxes, size):
            return self.boxes
        (height, width), (before_height, before_width) = size, annotated
        scale = width / before_width, height / before_height
        return self.boxes * np.array(scale * 2, np.float32)

    def decide(self) -> str:
        """The frame that the boxes or the annotated size fit alone, or else the hint."""
        shown = self.annotated == self.size(UPRIGHT) != self.stored or (
            _same_shape(self.annotated, self.size(UPRIGHT))
            and not _same_shape(self.annotated, self.stored)
        )
        slack = 1.2 if shown else 1.02  # only boxes far outside weigh more than a size
        fitting = [
            frame for frame in FRAMES if _fit(self.scaled_boxes(frame), self.size(frame), slack)
        ]
        if len(fitting) == 1:
            return fitting[0]
        if shown or self.hint != UPRIGHT:
            return UPRIGHT if shown else self.hint
        return "" if self.annotated == self.stored != self.size(UPRIGHT) else UPRIGHT

    def require_shape(self, frame: str) -> None:
        """Raises UserError where the file was annotated as one of another shape."""
        (height, width), annotated = self.size(frame), self.annotated
        shapes = {self.size(UPRIGHT), self.stored}
        # exchanged sides: EMOTIC has such
        if annotated in (None, self.stored[::-1]) or any(_same_shape(annotated, s) for s in shapes):
            return
        raise UserError(
            f"{self.path}: is {width}x{height}, but annotated as {annotated[1]}x{annotated[0]}: "
            "correct the annotated width and height, or remove them if boxes are in pixels of the "
            "file; config.data.skip_corrupt=True skips the image"
        )


def _same_shape(one: Size | None, other: Size) -> bool:
    """Whether one is the other, made larger or smaller."""
    if one is None:
        return False
    (height, width), (other_height, other_width) = one, other
    return abs(height * other_width / other_height - width) <= max(1, 0.01 * width)


def _fit(boxes: Boxes, size: Size, slack: float = 1.02) -> bool:
    height, width = size
    limits = slack * np.array([width, height], np.float32) + 1
    return not (boxes[:, 2:] > limits).any()


def choose_frames(
    images: Sequence[FoundImage], setting: str
) -> tuple[list[str], list[str], list[str]]:
    """The frame of each image ("" without an EXIF orientation), lines about them, and more serious
    ones. `setting` (config.data.exif): upright, stored, or auto: what an image's size and boxes
    say, else what those of all others that say anything agree on.
    """
    said = {place: one.decide() for place, one in enumerate(images) if one.orientation != 1}
    if not said:
        return [""] * len(images), [], []
    decided = [frame for frame in said.values() if frame]
    agreed = decided[0] if len(set(decided)) == 1 and len(decided) > _FEW * len(said) else ""
    frames = [""] * len(images)
    for place, frame in said.items():
        image = images[place]
        # unknown: what viewers show, unless the size is another
        unlike = image.annotated == image.stored != image.size(UPRIGHT)
        guess = frame or agreed or (STORED if unlike else UPRIGHT)
        frames[place] = guess if setting == "auto" else setting
    if setting == "auto":
        how, wrong = "by their sizes and boxes", "" if not agreed else None
        problem = "nothing says whether their boxes mean the stored or the upright picture"
    else:
        how, wrong = f"as config.data.exif={setting!r}", STORED if setting == UPRIGHT else UPRIGHT
        problem = f"config.data.exif={setting!r}, but their sizes or boxes fit the other picture"
    upright = frames.count(UPRIGHT)
    first = images[next(iter(said))].name
    note = (
        f"{len(said)} images carry an EXIF orientation (first: {first}): {upright} read upright, "
        f"{len(said) - upright} as stored, {how}"
    )
    doubtful = [images[place].name for place, frame in said.items() if frame == wrong]
    remedy = "look at them with python -m data show, and set config.data.exif to upright or stored"
    line = f"{len(doubtful)} images with an EXIF orientation (first: {{}}): {problem}; {remedy}"
    return frames, [note], [line.format(doubtful[0])] if doubtful else []
