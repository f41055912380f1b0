"""The prepared form of a data set: every image and its people in a few files that are read at
random without opening thousands of others.

A tensorflow-datasets data set (array_record, no TensorFlow needed) that anybody can read:

    tfds.data_source("dsct", split="train", data_dir=DIR)

DIR/dsct/VERSION/ holds the shards, what tensorflow-datasets asks for, `index_{split}.npz` (the
annotations again, so that opening a split needs no image) and `prepared.json`, which is written
last: classes, protocol, what the readers counted, size and SHA-256 of every file.
"""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data.config import DataConfig
from data.readers.records import ReadReport, Record, one_line, require_room
from dsct_jax.errors import UserError
from dsct_jax.preprocess import decode_image

if TYPE_CHECKING:
    from tensorflow_datasets.features import FeaturesDict

NAME = "dsct"
VERSION = "1.0.0"  # changes with the form, so that no program reads one that it does not know
SUMMARY = "prepared.json"
AGAIN = "remove the folder and run python -m data prepare again"


def folder(data_dir: str | Path) -> Path:
    """Where the files of a prepared data set lie below the folder that the user names."""
    return Path(data_dir, NAME, VERSION)


def features(num_classes: int) -> "FeaturesDict":
    """One image: the bytes of its file, and its record."""
    # here, because it takes a second that reading raw files need not wait for
    from tensorflow_datasets import features as f

    boxes, labels = (f.Tensor(shape=(None, n), dtype=np.float32) for n in (4, num_classes))
    image, cues = f.Image(shape=(None, None, 3)), f.Sequence(f.Text())
    return f.FeaturesDict(
        {"image": image, "name": f.Text(), "boxes": boxes, "labels": labels, "cues": cues}
    )


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """Decodes one image of a prepared split; travels to workers as three plain values."""

    directory: str
    split: str
    place: int

    def __call__(self) -> Image.Image:
        path = Path(self.directory, f"{self.split}, image {self.place}")
        try:
            encoded = _data_source(self.directory, self.split)[self.place]["image"]
        except (RuntimeError, OSError, IndexError, ValueError) as error:  # of array_record
            raise damaged(path, error) from None
        return decode_image(path, encoded)


def damaged(path: Path, error: Exception) -> UserError:
    """The one line about a file of the prepared form that cannot be used."""
    return UserError(f"{path}: damaged ({one_line(error)[:200]}); {AGAIN}")


@functools.lru_cache(maxsize=8)
def _data_source(directory: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(directory).as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )


def write_index(path: Path, records: list[Record]) -> None:
    """The annotations of a split as flat arrays; `offsets` [images + 1] divides the people."""
    cues = [cue for record in records for cue in record.cues]
    np.savez_compressed(
        path,
        names=np.array([record.name for record in records]),
        sizes=np.array([(record.height, record.width) for record in records], np.int32),
        offsets=np.cumsum([0] + [len(record.boxes) for record in records]),
        boxes=np.concatenate([record.boxes for record in records]),
        labels=np.concatenate([record.labels for record in records]),
        cues=np.array(cues, dtype=f"<U{max(map(len, cues), default=1)}"),
    )


def read_summary(directory: Path) -> dict[str, Any]:
    """What prepared.json says. Raises UserError unless it and all its files are there in full."""
    path = directory / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "set config.data.data_dir to the --output of python -m data prepare"
        raise UserError(f"{path}: no such file; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise damaged(path, error) from None
    for name, file in summary["files"].items():
        size = (directory / name).stat().st_size if (directory / name).exists() else None
        if size != file["bytes"]:
            found = "missing" if size is None else f"{size} bytes long"
            expected = f"should have {file['bytes']} bytes"
            raise UserError(f"{directory / name}: {found}, {expected}; {AGAIN}")
    return summary


def read_prepared(config: DataConfig, split: str) -> tuple[list[Record], ReadReport]:
    """The records of a split as `python -m data prepare` got them from the raw files. Raises
    UserError when the form is incomplete or damaged, lacks the split, or has other classes.
    """
    directory = folder(config.root)
    summary, where = read_summary(directory), directory / SUMMARY
    for field in ("class_names", "multi_label"):
        made, wanted = summary[field], getattr(config, field)
        if made != json.loads(json.dumps(wanted)):
            difference = f"config.{field}={made!r}, the configuration has {wanted!r}"
            raise UserError(f"{where}: prepared for {difference}")
    if split not in summary["splits"]:
        splits = ", ".join(summary["splits"])
        raise UserError(f"{where}: holds the splits {splits} and no {split}")
    path = directory / f"index_{split}.npz"
    try:
        with np.load(path) as index:
            arrays = {name: index[name] for name in index.files}
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, error) from None
    records = []
    for place, (start, end) in enumerate(itertools.pairwise(arrays["offsets"].tolist())):
        boxes, labels, cues = (arrays[name][start:end] for name in ("boxes", "labels", "cues"))
        name, (height, width) = str(arrays["names"][place]), arrays["sizes"][place].tolist()
        require_room(config, str(path), name, len(boxes))
        image, cues = PreparedImage(str(directory), split, place), tuple(cues.tolist())
        records.append(Record(place, image, width, height, boxes, labels, name, cues))
    return records, ReadReport(**summary["splits"][split])
