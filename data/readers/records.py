"""One image and its people as every reader returns them, what a reader met on its way, and the
checks that all readers share.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image

from data.config import DataConfig
from dsct_jax.errors import UserError
from dsct_jax.preprocess import DECODE_ERRORS, decode_image


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One image of a split: where its pixels come from and who is on it."""

    image_id: int  # index in the split, from 0
    image: Path | Callable[[], Image.Image]  # a file, or something that draws the image
    width: int
    height: int
    boxes: Float32[
        np.ndarray, "t 4"
    ]  # (x1, y1, x2, y2) in pixels, inside the image, each with an area
    labels: Float32[
        np.ndarray, "t k"
    ]  # multi-hot or one-hot; a row of zeros = a person without a label
    name: str  # the file as the annotations call it, for messages
    cues: tuple[str, ...] = ()  # scenes only: what decided each person's emotion

    def load(self) -> Image.Image:
        """The RGB image. Raises UserError naming the file when it cannot be read."""
        return decode_image(self.image) if isinstance(self.image, Path) else self.image()


@dataclasses.dataclass
class ReadReport:
    """What a reader counted; as text, one line that a run prints once."""

    source: str
    images: int = 0
    people: int = 0
    clipped: int = 0  # boxes cut at the image border
    dropped: int = 0  # boxes outside the image or without area
    first_dropped: str = ""
    crowds: int = 0  # annotations of groups, left out as DETR does
    unlabelled: int = 0  # people kept without any label
    swapped: int = 0  # annotated width and height are exchanged; the file wins
    resized: int = 0  # annotated size differs from the file's in another way; the file wins
    unrated: int = 0  # people left out because drop_unrated is set
    without_people: int = (
        0  # images left out because no face was found (NCAER-S), or everybody was left out
    )
    unreadable: int = 0  # images left out because skip_corrupt is set
    missing: int = 0  # those of them that do not exist
    first_unreadable: str = ""
    unreadable_images: list[str] = dataclasses.field(default_factory=list)  # the error line of each
    # which task this is (data.config.PROTOCOLS): results of different protocols cannot be compared
    protocol: str = "custom"

    def __str__(self) -> str:
        return "; ".join(self.lines())

    def lines(self) -> list[str]:
        """The totals, and a line for each thing that was not as annotated."""
        protocol = "" if self.protocol == "custom" else f", protocol {self.protocol}"
        lines = [f"{self.source}: {self.images} images, {self.people} people{protocol}"]
        if self.clipped:
            lines.append(f"{self.clipped} boxes cut at the image border")
        if self.dropped:
            lines.append(
                f"{self.dropped} boxes dropped, outside the image or without area (first: "
                f"{self.first_dropped})"
            )
        if self.crowds:
            lines.append(f"{self.crowds} crowd annotations left out")
        if self.unlabelled:
            lines.append(f"{self.unlabelled} people without a label (kept, without a class loss)")
        if self.swapped:
            lines.append(
                f"{self.swapped} images annotated with width and height exchanged (the file's are "
                "used)"
            )
        if self.unrated:
            lines.append(f"{self.unrated} people without valence, arousal or dominance left out")
        if self.without_people:
            lines.append(f"{self.without_people} images left out, nobody on them has a box")
        if self.resized:
            lines.append(
                f"{self.resized} images whose annotated size is not the file's (the file's is used)"
            )
        if self.unreadable:
            lines.append(
                f"{self.unreadable} images left out, missing or damaged (first: "
                f"{self.first_unreadable})"
            )
        return lines


def clip_boxes(
    boxes: Float32[np.ndarray, "t 4"], height: int, width: int
) -> Float32[np.ndarray, "t 4"]:
    """(x1, y1, x2, y2) cut at the borders of the image."""
    return np.clip(boxes, 0, np.array([width, height, width, height], np.float32))


def has_area(boxes: Float32[np.ndarray, "t 4"]) -> np.ndarray:
    """bool [t]: wider and higher than nothing. Boxes with a coordinate that is not a number have
    none.
    """
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from a file's header, without decoding it. Raises UserError naming the file."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such image file; check config.data.data_dir, or set "
            "config.data.skip_corrupt=True to leave it out"
        ) from None
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); repair it, or set "
            "config.data.skip_corrupt=True to leave it out"
        ) from None


class RecordBuilder:
    """Collects the images of one split in order and applies the checks that are the same for every
    source.
    """

    def __init__(self, source: str, config: DataConfig, *, protocol: str) -> None:
        self.records: list[Record] = []
        self.report = ReadReport(
            source, protocol=protocol if config.protocol == "auto" else config.protocol
        )
        self._config = config

    def add(
        self,
        path: Path,
        name: str,
        boxes: Sequence[tuple[float, ...]],
        labels: Sequence[Sequence[int]],
        *,
        annotated_size: tuple[int, int] | None = None,
    ) -> None:
        """One image with the (x1, y1, x2, y2) pixel boxes of its people and the class indices of
        each; no box at all is written with NaN.

        Raises:
            UserError: the image is missing or damaged and `skip_corrupt` is not set, or it shows
                more people than `max_targets`.
        """
        try:
            height, width = image_size(path)
        except UserError as error:
            if not self._config.skip_corrupt:
                raise
            self.report.unreadable += 1
            self.report.missing += not path.exists()
            self.report.unreadable_images.append(str(error))
            self.report.first_unreadable = self.report.first_unreadable or name
            return
        if annotated_size is not None and annotated_size != (height, width):
            self.report.swapped += annotated_size == (width, height)
            self.report.resized += annotated_size != (width, height)
        given = np.array(boxes, np.float32).reshape(-1, 4)
        clipped = clip_boxes(given, height, width)
        kept = has_area(clipped)
        self.report.clipped += int((kept & (clipped != given).any(1)).sum())
        if not kept.all():
            self.report.dropped += int((~kept).sum())
            first = int(np.argmin(kept))
            box = [round(float(value), 1) for value in given[first]]
            self.report.first_dropped = (
                self.report.first_dropped
                or f"{name}, person {first}, x1 y1 x2 y2 = {box} of a {width}x{height} image"
            )
        if kept.sum() > self._config.max_targets:
            limit = f"config.data.max_targets={self._config.max_targets}"
            raise UserError(
                f"{self.report.source}: {name} shows {kept.sum()} people, more than {limit}: "
                "raise the limit"
            )
        hot = np.zeros((len(given), len(self._config.class_names)), np.float32)
        for row, classes in zip(hot, labels, strict=True):
            row[list(classes)] = 1
        hot = hot[kept]
        self.report.images += 1
        self.report.people += len(hot)
        self.report.unlabelled += int((hot.sum(1) == 0).sum())
        self.records.append(
            Record(len(self.records), path, width, height, clipped[kept], hot, name)
        )

    def finish(self) -> tuple[list[Record], ReadReport]:
        """What was collected. Raises UserError when it is nothing."""
        if not self.records:
            first = (
                f" (first: {self.report.unreadable_images[0]})" if self.report.unreadable else ""
            )
            raise UserError(f"{self.report.source}: holds no usable image{first}")
        return self.records, self.report
