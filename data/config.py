"""What the input pipeline needs to know: the `data` section of a configuration and the classes, as
one frozen value.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from dsct_jax.errors import UserError

SOURCES = ("coco", "caer_s", "ncaer_s", "emotic", "scenes", "prepared")
LABEL_FORMATS = ("ids", "bits")
SPLITS = ("train", "val", "test")
PERSON_BOXES = ("head", "body")
PROTOCOLS = {
    "emotic_head_dsct": "EMOTIC, head boxes of the older release, as the DSCT paper's numbers (chance on its test set: 21.9 mAP)",
    "emotic_body_pami": "EMOTIC, body boxes of Annotations.mat (PAMI 2019)",
    "emotic_body_cvpr17": "EMOTIC, body boxes of CVPR17_Annotations.mat",
    "caer_s": "CAER-S, one face box an image",
    "ncaer_s": "NCAER-S, frames of the CAER videos, no video in two splits",
    "custom": "data of your own: compare with nothing but itself",
}

# Category names in the wild -> the name that is meant; letters and digits only, small.
_SPELLINGS = {
    "disquietement": "disquietment",
    "disquitement": "disquietment",
    "doubtconfuzion": "doubtconfusion",
}


@dataclasses.dataclass(frozen=True)
class AnnotationFile:
    """One file of annotations and the folder that the image names in it start from."""

    path: Path
    root: Path
    prefix: str  # of the image names, so that they read from data_dir ("" = they do already)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The fields of configs/base.py `data` (meanings, units and defaults are told there), plus
    `class_names` and `multi_label` of the top level.

    Raises:
        UserError: a value that no run could use; the line names the field as it is written on the
            command line.
    """

    class_names: tuple[str, ...]
    multi_label: bool
    source: str
    data_dir: str
    train: str | int
    val: str | int
    test: str | int
    label_format: str
    max_targets: int
    short_sides: tuple[int, ...]
    max_long_side: int
    crop_resize: tuple[int, ...]
    crop_size: tuple[int, int]
    crop_probability: float
    flip_probability: float
    color_jitter: float
    grayscale_probability: float
    eval_short_side: int
    buckets: tuple[tuple[int, int], ...]
    num_workers: int
    cache: bool
    skip_corrupt: bool
    protocol: str
    person_box: str
    drop_unrated: bool

    def __post_init__(self) -> None:
        self._require(self.source in SOURCES, "source", f"one of {', '.join(SOURCES)}")
        self._require(
            self.protocol in ("auto", *PROTOCOLS),
            "protocol",
            f"auto, or one of {', '.join(PROTOCOLS)}",
        )
        self._require(
            self.person_box in PERSON_BOXES, "person_box", f"one of {', '.join(PERSON_BOXES)}"
        )
        self._require(
            self.source != "emotic" or self.multi_label,
            "source",
            "another one unless multi_label is True (an EMOTIC person has several labels)",
        )
        single = self.source != "ncaer_s" or not self.multi_label
        self._require(
            single,
            "source",
            "another one unless multi_label is False (an NCAER-S face has one label)",
        )
        self._require(
            self.label_format in LABEL_FORMATS, "label_format", f"one of {', '.join(LABEL_FORMATS)}"
        )
        self._require(
            len(set(self.class_names)) == len(self.class_names) > 0,
            "class_names",
            "at least one name, none twice",
        )
        self._require(
            self.label_format == "ids" or self.multi_label,
            "label_format",
            "'ids' unless multi_label is True (a bit mask holds several labels)",
        )
        for name in ("max_targets", "max_long_side", "eval_short_side"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("short_sides", "crop_resize"):
            sides = getattr(self, name)
            self._require(
                len(sides) > 0 and min(sides) >= 1, name, "a list of pixel counts, at least one"
            )
        self._require(
            len(self.crop_size) == 2 and 1 <= self.crop_size[0] <= self.crop_size[1],
            "crop_size",
            "(smallest, largest) in pixels",
        )
        for name in (
            "crop_probability",
            "flip_probability",
            "color_jitter",
            "grayscale_probability",
        ):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        pairs = all(len(bucket) == 2 and min(bucket) >= 1 for bucket in self.buckets)
        self._require(
            len(self.buckets) > 0 and pairs,
            "buckets",
            "a list of (height, width) in pixels, at least one",
        )
        self._require(self.num_workers >= 0, "num_workers", "0 or more")

    def _require(self, condition: bool, field: str, remedy: str) -> None:
        if not condition:
            prefix = "" if field == "class_names" else "data."
            raise UserError(
                f"config.{prefix}{field}={getattr(self, field)!r} cannot be used: must be {remedy}"
            )

    def annotation_file(self, split: str) -> str:
        """The value of the split's own field: an annotation file below `data_dir`, or for scenes a
        number of images.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
        return str(getattr(self, split))

    def annotation_files(self, split: str) -> list[AnnotationFile]:
        """The split's own field taken apart: `FILE`, or `ROOT:FILE` where the image names in FILE
        start at ROOT, or several of these with commas.

        Both are paths below `data_dir`. Raises UserError when the field names no file.
        """
        top, value = Path(self.data_dir), self.annotation_file(split)
        files = []
        for part in (part.strip() for part in value.split(",")):
            root, colon, name = part.rpartition(":")
            if len(root) == 1:  # the drive of an absolute path
                root, colon, name = "", "", part
            if not name:
                raise UserError(
                    f"config.data.{split}={value!r} cannot be used: must be an annotation file, "
                    "or ROOT:FILE, below config.data.data_dir"
                )
            files.append(
                AnnotationFile(top / name, top / root, f"{root}/" if colon and root else "")
            )
        return files


def class_lookup(class_names: tuple[str, ...]) -> Callable[[str], int | None]:
    """A function from a category's name in the files to the number of its class, or None.

    Capitals, spaces, slashes and the known misspellings of EMOTIC do not matter, unless two classes
    differ in nothing else.
    """
    exact = {name: index for index, name in enumerate(class_names)}
    loose = {_loosely(name): index for index, name in enumerate(class_names)}
    if len(loose) < len(class_names):
        return exact.get
    return lambda name: exact.get(name, loose.get(_loosely(name)))


def _loosely(name: str) -> str:
    letters = "".join(letter for letter in name.casefold() if letter.isalnum())
    return _SPELLINGS.get(letters, letters)
