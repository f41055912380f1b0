"""The `data` section of a configuration and the classes, as one frozen value."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from dsct_jax.config import (
    MAX_MEGAPIXELS,
    cannot_be_used,
    check_settings,
    expanded_path,
    setting,
)
from dsct_jax.errors import UserError

SOURCES = ("coco", "caer_s", "ncaer_s", "emotic", "scenes", "prepared")
SPLITS = ("train", "val", "test")
PROTOCOLS = {
    "emotic_head_dsct": "EMOTIC, head boxes of the older release, as the DSCT paper's numbers "
    "(chance on its test set: 21.9 mAP)",
    "emotic_body_pami": "EMOTIC, body boxes of Annotations.mat (PAMI 2019)",
    "emotic_body_cvpr17": "EMOTIC, body boxes of CVPR17_Annotations.mat",
    "caer_s": "CAER-S, one face box per image",
    "ncaer_s": "NCAER-S, frames of the CAER videos, no video in two splits",
    "custom": "data of your own: compare with nothing but itself",
}

# Category names in the wild -> the name that is meant; letters and digits only, small.
_SPELLINGS = {
    "disquietement": "disquietment",
    "disquitement": "disquietment",
    "doubtconfuzion": "doubtconfusion",
}
# what a source or a format of labels says about each person
_LABELS = (
    ("source", "emotic", "several labels"),
    ("source", "ncaer_s", "one label"),
    ("label_format", "bits", "several labels"),
)


@dataclasses.dataclass(frozen=True)
class AnnotationFile:
    """One file of annotations and the folder that the image names in it start from."""

    path: Path
    root: Path
    prefix: str  # of the image names, so that they read from data_dir ("" = they do already)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data section, and two fields of the top level. Raises UserError naming a wrong field."""

    class_names: tuple[str, ...] = setting(doc="of the top level", shared=True)
    multi_label: bool = setting(doc="of the top level", shared=True)
    source: str = setting("coco", "prepared: the --output of data prepare", choices=SOURCES)
    protocol: str = setting(
        "auto", "the task named with every result; auto: by the files", choices=("auto", *PROTOCOLS)
    )
    data_dir: str = setting("", "root of the images; for scenes unused")
    # below data_dir; scenes: a number of images, ncaer_s: a folder
    train: str | int = setting("train.json", "FILE, ROOT:FILE or several with commas")
    val: str | int = setting("val.json", "the same for validation")
    test: str | int = setting("test.json", "the same for the test")
    exif: str = setting(
        "auto",
        "the picture that boxes mean where a file carries an EXIF orientation; auto: by its "
        "annotated size and boxes",
        choices=("auto", "upright", "stored"),
    )
    # ids: category_id is a class number, or a list of them; bits: the 26-bit masks of EMOTIC's json
    label_format: str = setting("ids", "of a json's category_id", choices=("ids", "bits"))
    label_attribute: str = setting(
        "", "of a json's people: the attribute that holds the class (CVAT); empty: the category"
    )
    # head: the paper's task, of Torch7 files; body: Annotations.mat, .csv or Torch7
    person_box: str = setting("head", "emotic only: the box of a person", choices=("head", "body"))
    drop_unrated: bool = setting(
        False, "emotic only. True: exclude people without valence, arousal or dominance"
    )
    max_targets: int = setting(16, "t: people per image; more is an error", low=1)
    short_sides: tuple[int, ...] = setting(
        tuple(range(480, 801, 32)), "pixels; training: one is drawn (DETR)", low=1
    )
    max_long_side: int = setting(1333, "pixels", low=1)
    crop_resize: tuple[int, ...] = setting(
        (400, 500, 600), "short side before the random crop, pixels", low=1
    )
    crop_size: tuple[int, int] = setting(
        (384, 600), "smallest and largest side of the random crop, pixels", low=1
    )
    crop_probability: float = setting(0.5, "of the random crop (DETR)", low=0, high=1)
    flip_probability: float = setting(0.5, "of the mirror image", low=0, high=1)
    # the next three are not in the paper: for training from scratch
    color_jitter: float = setting(
        0.0, "strength of random brightness, contrast and saturation", low=0, high=1
    )
    grayscale_probability: float = setting(0.0, "of an image without color", low=0, high=1)
    erase_probability: float = setting(
        0.0, "of a gray rectangle over a part of each person (Zhong et al. 2020)", low=0, high=1
    )
    eval_short_side: int = setting(800, "pixels", low=1)
    buckets: tuple[tuple[int, int], ...] = setting(
        ((800, 1344), (1344, 800), (1088, 1088)),
        "(height, width) of the padded canvases; one compiled program each",
        low=1,
    )
    max_megapixels: float = setting(
        MAX_MEGAPIXELS, "of an image file; larger is an error", above=0, finite=False
    )
    num_workers: int = setting(2, "processes; 0 = in this one", low=0)
    cache: bool = setting(False, "True: keep decoded images in memory (in each worker)")
    skip_corrupt: bool = setting(
        False, "True: a damaged file is counted and excluded instead of stopping the run"
    )

    def __post_init__(self) -> None:
        check_settings(self, "data")
        names, sizes = self.class_names, "a list of pixel counts, at least one"
        rules: list[tuple[str, object, str]] = [
            ("short_sides", self.short_sides, sizes),
            ("crop_resize", self.crop_resize, sizes),
            ("crop_size", self.crop_size[0] <= self.crop_size[1], "(smallest, largest) in pixels"),
            ("buckets", self.buckets, "a list of (height, width) in pixels, at least one"),
        ]
        for field, fits, wanted in rules:
            if not fits:
                raise cannot_be_used(f"data.{field}", getattr(self, field), wanted)
        if not names or len(set(names)) < len(names):
            raise cannot_be_used("class_names", names, "at least one name, none twice")
        for field, value, labels in _LABELS:
            if getattr(self, field) == value and self.multi_label != (labels == "several labels"):
                raise UserError(
                    f"config.data.{field}={value!r} requires config.multi_label="
                    f"{not self.multi_label}: a person has {labels}"
                )

    @property
    def root(self) -> Path:
        """`data_dir`, with ~ and $VARIABLES expanded."""
        return expanded_path(self.data_dir)

    def annotation_file(self, split: str) -> str:
        """The value of the split's own field, as text."""
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
        return str(getattr(self, split))

    def annotation_files(self, split: str) -> list[AnnotationFile]:
        """The split's own field taken apart: `FILE`, or `ROOT:FILE` where the image names in FILE
        start at ROOT, or several of these with commas, all below `data_dir`. Raises UserError.
        """
        top, value = self.root, self.annotation_file(split)
        files = []
        for part in (part.strip() for part in value.split(",")):
            root, colon, name = os.path.expandvars(part).rpartition(":")
            if len(root) == 1:  # the drive of an absolute path
                root, colon, name = "", "", part
            if not name:
                wanted = "an annotation file, or ROOT:FILE, below config.data.data_dir"
                raise cannot_be_used(f"data.{split}", value, wanted)
            prefix, folder = f"{root}/" if colon and root else "", top / expanded_path(root)
            files.append(AnnotationFile(top / expanded_path(name), folder, prefix))
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
