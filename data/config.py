"""What the input pipeline needs to know: the `data` section of a configuration and the classes, as one frozen value."""

import dataclasses

from dsct_jax.errors import UserError

SOURCES = ("coco", "caer_s", "scenes")
LABEL_FORMATS = ("ids", "bits")
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The fields of configs/base.py `data` (meanings, units and defaults are told there), plus `class_names` and `multi_label` of the top level.

    Raises:
        UserError: a value that no run could use; the line names the field as it is written on the command line.
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

    def __post_init__(self) -> None:
        self._require(self.source in SOURCES, "source", f"one of {', '.join(SOURCES)}")
        self._require(self.label_format in LABEL_FORMATS, "label_format", f"one of {', '.join(LABEL_FORMATS)}")
        self._require(len(set(self.class_names)) == len(self.class_names) > 0, "class_names", "at least one name, none twice")
        self._require(
            self.label_format == "ids" or self.multi_label, "label_format", "'ids' unless multi_label is True (a bit mask holds several labels)"
        )
        for name in ("max_targets", "max_long_side", "eval_short_side"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("short_sides", "crop_resize"):
            sides = getattr(self, name)
            self._require(len(sides) > 0 and min(sides) >= 1, name, "a list of pixel counts, at least one")
        self._require(len(self.crop_size) == 2 and 1 <= self.crop_size[0] <= self.crop_size[1], "crop_size", "(smallest, largest) in pixels")
        for name in ("crop_probability", "flip_probability", "color_jitter", "grayscale_probability"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        pairs = all(len(bucket) == 2 and min(bucket) >= 1 for bucket in self.buckets)
        self._require(len(self.buckets) > 0 and pairs, "buckets", "a list of (height, width) in pixels, at least one")
        self._require(self.num_workers >= 0, "num_workers", "0 or more")

    def _require(self, condition: bool, field: str, remedy: str) -> None:
        if not condition:
            prefix = "" if field == "class_names" else "data."
            raise UserError(f"config.{prefix}{field}={getattr(self, field)!r} cannot be used: must be {remedy}")

    def annotation_file(self, split: str) -> str:
        """The value of the split's own field: an annotation file below `data_dir`, or for scenes a number of images."""
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
        return str(getattr(self, split))
