"""One image and its people as readers return them, what was counted, and the checks all share."""

import contextlib
import csv
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from data.config import DataConfig, class_lookup
from data.readers.frames import UPRIGHT, Boxes, FoundImage, choose_frames
from dsct_jax.errors import UserError
from dsct_jax.preprocess import Size, decode_image, open_image, orientation

_MANY = 6  # images and people whose boxes may be expected to differ
REMEDY = "repair or remove it, or set config.data.skip_corrupt=True"  # for a damaged image


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One image of a split: where its pixels come from and who is on it."""

    image_id: int  # index in the split, from 0
    image: Path | Callable[[], Image.Image]  # a file, or something that draws the image
    width: int
    height: int
    boxes: Boxes  # inside the image, each with an area
    labels: Float32[np.ndarray, "t k"]  # multi-hot or one-hot; a row of zeros = no label
    name: str  # the file as the annotations call it, for messages
    cues: tuple[str, ...] = ()  # scenes only: what decided each person's emotion
    exif: str = ""  # upright or stored: how a file with an EXIF orientation is read

    def load(self) -> Image.Image:
        """The RGB image. Raises UserError naming a file that cannot be read."""
        if isinstance(self.image, Path):
            return decode_image(self.image, upright=self.exif == UPRIGHT)
        return self.image()


def with_boxes(record: Record, boxes: Boxes) -> Record:
    """The image with other people, whose labels nobody knows."""
    clipped = clip_boxes(np.asarray(boxes, np.float32).reshape(-1, 4), record.height, record.width)
    inside = clipped[has_area(clipped)]
    unknown = np.zeros((len(inside), record.labels.shape[1]), np.float32)
    return dataclasses.replace(record, boxes=inside, labels=unknown, cues=())


def _counted(text: str) -> Any:
    """A number, from 0, that a report shows with this text once it is not 0."""
    return dataclasses.field(default=0, metadata={"text": text})


def one_line(error: Exception) -> str:
    """What an exception says, or else its name."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclasses.dataclass
class ReadReport:
    """What a reader counted; as text, one line that a run prints once."""

    source: str
    images: int = 0
    people: int = 0
    clipped: int = _counted("boxes cut at the image border")
    dropped: int = _counted(
        "boxes dropped, outside the image or without area (first: {first_dropped})"
    )
    inverted: int = _counted("of these boxes have a negative width or height")
    crowds: int = _counted("crowd annotations skipped")  # as DETR does
    unlabelled: int = _counted("people without a label (kept, without a class loss)")
    swapped: int = _counted(
        "images annotated with width and height exchanged (the file's are used)"
    )
    resized: int = _counted(
        "images annotated in another size of the same shape (boxes are scaled, unless they fit the "
        "file's size alone)"
    )
    unrated: int = _counted("people without valence, arousal or dominance skipped")
    without_people: int = _counted("images skipped, nobody on them has a box")
    unreadable: int = _counted("images skipped, missing or damaged (first: {first_unreadable})")
    misshapen: int = _counted("of these annotated as an image of another shape")
    missing: int = 0  # those of them that do not exist
    unreadable_images: list[str] = dataclasses.field(default_factory=list)  # the error line of each
    tiny: int = 0  # boxes within the first pixel: are they divided by the image size?
    leaving: int = 0  # boxes that end far outside the image: are they x1 y1 x2 y2?
    repeated: int = 0  # people with the box and the labels of another in the image
    first_dropped: str = ""
    first_unreadable: str = ""
    first_leaving: str = ""
    first_repeated: str = ""
    disputed: int = 0  # people with the box of another in the image, and other labels
    first_disputed: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)  # more lines, of one reader
    suspicious: list[str] = dataclasses.field(default_factory=list)  # its more serious ones
    protocol: str = "custom"  # which task this is: one of data.config.PROTOCOLS

    def __str__(self) -> str:
        return "; ".join(self.lines())

    def lines(self) -> list[str]:
        """The totals, and a line for each thing that was not as annotated."""
        values = vars(self)
        protocol = "" if self.protocol == "custom" else f", protocol {self.protocol}"
        totals = f"{self.source}: {self.images} images, {self.people} people{protocol}"
        counted = [
            f"{values[field.name]} {field.metadata['text'].format(**values)}"
            for field in dataclasses.fields(self)
            if "text" in field.metadata and values[field.name]
        ]
        return [totals, *counted, *self.notes, *self.suspicions()]

    def suspicions(self) -> list[str]:
        """A line for each sign that the boxes or labels do not mean what they are taken for."""
        lines, boxes = list(self.suspicious), self.people + self.dropped
        if self.people and self.tiny > 0.01 * boxes:
            lines.append(
                f"{self.tiny} boxes lie inside one pixel: boxes are read in pixels, these may be "
                "divided by the image size"
            )
        if self.people and self.leaving > 0.05 * boxes:
            lines.append(
                f"{self.leaving} boxes end far outside their image (first: {self.first_leaving}): "
                "boxes are read as x, y, width, height in json and x1, y1, x2, y2 in lists"
            )
        if self.repeated:
            lines.append(
                f"{self.repeated} people have the box and labels of another in the same image "
                f"(first: {self.first_repeated})"
            )
        if self.disputed:
            lines.append(
                f"{self.disputed} people have the box of another in the same image and other "
                f"labels (first: {self.first_disputed}): several labels of a person are one "
                "annotation with a list, and config.multi_label=True"
            )
        return lines


@contextlib.contextmanager
def reading(path: Path, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Raises UserError, naming the file, when it is missing or (`errors`) is not `what`."""
    unusable: tuple[type[Exception], ...] = (OSError, UnicodeDecodeError, *errors)
    try:
        yield
    except FileNotFoundError:
        remedy = "set config.data.data_dir and the split's file name"
        raise UserError(f"{path}: no such annotation file; {remedy}") from None
    except unusable as error:
        raise UserError(f"{path}: cannot be read as {what} ({one_line(error)})") from None


def read_rows(path: Path, what: str) -> list[tuple[int, list[str]]]:
    """(line number, stripped cells) of a csv file's lines that are not empty. Raises UserError."""
    with reading(path, what, csv.Error), path.open(newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    return [(number, row) for number, row in enumerate(rows, 1) if row]


def clip_boxes(boxes: Boxes, height: int, width: int) -> Boxes:
    """Boxes cut at the borders of the image."""
    return np.clip(boxes, 0, np.array([width, height, width, height], np.float32))


def has_area(boxes: Boxes) -> np.ndarray:
    """bool [t]: wider and higher than nothing, which is False for NaN."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def image_header(path: Path, config: DataConfig) -> tuple[Size, int]:
    """(height, width) as stored and EXIF orientation of a file. Raises UserError naming it."""
    try:
        with open_image(path, max_megapixels=config.max_megapixels) as image:
            return (image.height, image.width), orientation(image)
    except UserError as error:
        remedy = "repair it" if path.exists() else "check config.data.data_dir"
        skip = "or set config.data.skip_corrupt=True to skip it"
        raise UserError(f"{error}; {remedy}, {skip}") from None


def require_room(config: DataConfig, source: str, name: str, count: int) -> None:
    """Raises UserError when an image shows more people than a batch has places for."""
    if count > config.max_targets:
        limit = f"config.data.max_targets={config.max_targets}"
        raise UserError(
            f"{source}: {name} shows {count} people, more than {limit}: raise the limit"
        )


def same_place(records: Sequence[Record]) -> list[str]:
    """A line where the boxes of many images are all the same part of the image."""
    sides = [[one.width, one.height] * 2 for one in records for _ in one.boxes]
    places = np.concatenate([one.boxes for one in records]) / np.array(sides).reshape(-1, 4)
    if len(records) < _MANY or len(places) < _MANY or np.ptp(places, axis=0).max() > 0.01:
        return []
    where = [round(float(value), 2) for value in places[0]]
    what = f"all {len(places)} boxes are the same part of their image (x1 y1 x2 y2 = {where}, first"
    return [
        f"{what}: {records[0].name}): what is learned is that place, and no person is looked for"
    ]


def crowded(records: Sequence[Record], model: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether many people are more than the queries of a network (the `model` section) in their
    image, and a line about those that are ("" = none).
    """
    field = next((one for one in ("num_subject_queries", "num_queries") if one in model), "")
    images = [one for one in records if field and len(one.boxes) > model[field]]
    if not images:
        return False, ""
    most = max(images, key=lambda one: len(one.boxes))
    lost = sum(len(one.boxes) - model[field] for one in images)
    line = (
        f"{len(images)} images show more people than config.model.{field}={model[field]} (most: "
        f"{len(most.boxes)}, {most.name}): {lost} people cannot be found; raise it"
    )
    return lost > 0.01 * sum(len(one.boxes) for one in records), line


class RecordBuilder:
    """Collects the images of one split in order, with the checks that all sources share."""

    def __init__(self, sources: Sequence[Path], config: DataConfig, *, protocol: str) -> None:
        protocol = protocol if config.protocol == "auto" else config.protocol
        self.records: list[Record] = []
        self.report = ReadReport(", ".join(map(str, sources)), protocol=protocol)
        self._config = config
        self._found: list[FoundImage] = []
        self._find = class_lookup(config.class_names)

    def class_index(self, name: object, where: str, hint: str = "") -> int:
        """The number of the class of that name. Raises UserError: `where` name ... `hint`."""
        index = self.find_class(name)
        if index is None:
            known = ", ".join(self._config.class_names)
            raise UserError(f"{where} {name!r} is not in config.class_names ({known}){hint}")
        return index

    def find_class(self, name: object) -> int | None:
        """The same, or None."""
        return self._find(name) if isinstance(name, str) else None

    def add(
        self,
        path: Path,
        name: str,
        boxes: Sequence[tuple[float, ...]],
        labels: Sequence[Sequence[int]],
        *,
        annotated_size: Size | None = None,
        frame: str = "",
    ) -> None:
        """One image with the (x1, y1, x2, y2) pixel boxes of its people and the class indices of
        each (NaN = no box), as annotated: in an image of that size, in that frame ("" = unknown).
        Raises UserError for an image that is missing or damaged without `skip_corrupt`.
        """
        given = np.array(boxes, np.float32).reshape(-1, 4)
        try:
            size, turn = image_header(path, self._config)
        except UserError as error:
            self._skip(name, error)
            self.report.missing += not path.exists()
        else:
            found = FoundImage(path, name, given, labels, annotated_size, size, turn, frame)
            self._found.append(found)

    def _skip(self, name: str, error: UserError) -> None:
        if not self._config.skip_corrupt:
            raise error
        self.report.unreadable += 1
        self.report.unreadable_images.append(str(error))
        self.report.first_unreadable = self.report.first_unreadable or name

    def _add(self, found: FoundImage, frame: str) -> None:
        """The record of an image whose frame is known."""
        try:
            found.require_shape(frame)
        except UserError as error:
            self.report.misshapen += 1
            self._skip(found.name, error)
            return
        report, name = self.report, found.name
        height, width = size = found.size(frame)
        report.swapped += found.annotated == size[::-1] != size and not frame
        given = found.scaled_boxes(frame)
        report.resized += given is not found.boxes
        clipped = clip_boxes(given, height, width)
        kept = has_area(clipped)
        require_room(self._config, report.source, name, int(kept.sum()))
        hot = np.zeros((len(given), len(self._config.class_names)), np.float32)
        for row, classes in zip(hot, found.labels, strict=True):
            row[list(classes)] = 1
        self._count_boxes(name, given, clipped, size)
        hot = hot[kept]
        report.images += 1
        report.people += len(hot)
        report.unlabelled += int((hot.sum(1) == 0).sum())
        boxes = clipped[kept]
        repeated = len(hot) - len(np.unique(np.column_stack([boxes, hot]), axis=0))
        disputed = len(hot) - len(np.unique(boxes, axis=0)) - repeated
        for count, field in ((repeated, "repeated"), (disputed, "disputed")):
            if count:
                setattr(report, field, getattr(report, field) + count)
                setattr(report, f"first_{field}", getattr(report, f"first_{field}") or name)
        image = len(self.records), found.path, width, height
        self.records.append(Record(*image, boxes, hot, name, exif=frame))

    def _count_boxes(self, name: str, given: Boxes, clipped: Boxes, size: Size) -> None:
        """What the report says of the boxes of one image, as given and as clipped to it."""
        report, kept = self.report, has_area(clipped)
        height, width = size
        report.clipped += int((kept & (clipped != given).any(1)).sum())
        report.dropped += int((~kept).sum())
        report.inverted += int((given[:, 2:] < given[:, :2]).any(1).sum())
        report.tiny += int((kept & (given <= 1).all(1)).sum()) if min(size) > 1 else 0
        leaving = kept & (given[:, 2:] > 1.1 * np.array([width, height])).any(1)
        report.leaving += int(leaving.sum())
        for places, field in ((~kept, "first_dropped"), (leaving, "first_leaving")):
            if places.any() and not getattr(report, field):
                first = int(np.argmax(places))
                box = [round(float(value), 1) for value in given[first]]
                where = f"x1 y1 x2 y2 = {box} of a {width}x{height} image"
                setattr(report, field, f"{name}, person {first}, {where}")

    def finish(self) -> tuple[list[Record], ReadReport]:
        """What was collected. Raises UserError when it is nothing, when an image was annotated as
        one of another shape (without `skip_corrupt`), or shows more people than `max_targets`.
        """
        frames, notes, problems = choose_frames(self._found, self._config.exif)
        self.report.notes += notes
        self.report.suspicious += problems
        for found, frame in zip(self._found, frames, strict=True):
            self._add(found, frame)
        if not self.records:
            lines = self.report.unreadable_images
            first = f" (first: {lines[0]})" if lines else ""
            raise UserError(f"{self.report.source}: holds no usable image{first}")
        self.report.suspicious += same_place(self.records)
        return self.records, self.report
