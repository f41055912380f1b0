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
from data.readers.records import ReadReport, Record, require_room
from dsct_jax.errors import UserError
from dsct_jax.preprocess import decode_image

if TYPE_CHECKING:
    from tensorflow_datasets.features import FeaturesDict

NAME = "dsct"
VERSION = "1.0.0"  # changes with the form, so that no program reads one that it does not know
SUMMARY = "prepared.json"
AGAIN = "remove the folder and run python -m data prepare again"
SHARD_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def folder(data_dir: str | Path) -> Path:
    """Where the files of a prepared data set lie below the folder that the user names."""
    return Path(data_dir, NAME, VERSION)


def features(num_classes: int) -> "FeaturesDict":
    """One image. `image` holds the bytes of the original file; boxes are (x1, y1, x2, y2) in
    pixels, labels multi-hot.
    """
    # here, because it takes a second that reading raw files need not wait for
    import tensorflow_datasets as tfds

    f = tfds.features
    return f.FeaturesDict(
        {
            "image": f.Image(shape=(None, None, 3)),
            "name": f.Text(),
            "boxes": f.Tensor(shape=(None, 4), dtype=np.float32),
            "labels": f.Tensor(shape=(None, num_classes), dtype=np.float32),
            "cues": f.Sequence(f.Text()),
        }
    )


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """Decodes one image of a prepared split when a record is loaded; travels to worker processes as
    three plain values.
    """

    directory: str
    split: str
    place: int

    def __call__(self) -> Image.Image:
        path = Path(self.directory, f"{self.split}, image {self.place}")
        try:
            encoded = _data_source(self.directory, self.split)[self.place]["image"]
        # array_record's errors for a shard that is damaged
        except (RuntimeError, OSError, IndexError, ValueError) as error:
            raise damaged(path, error) from None
        return decode_image(path, encoded)


def damaged(path: Path, error: Exception) -> UserError:
    """The one line about a file of the prepared form that cannot be used."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path}: damaged ({reason}); {AGAIN}")


@functools.lru_cache(maxsize=8)
def _data_source(directory: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(directory).as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )


def write_index(path: Path, records: list[Record]) -> None:
    """The annotations of a split as flat arrays; `offsets` [images + 1] says whose people are
    where.
    """
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
    """What prepared.json says, its files being all there in full length.

    Raises:
        UserError: nothing was prepared here, or not to the end, or a file is missing or of another
            length.
    """
    path = directory / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; set config.data.data_dir to the --output of python -m data "
            "prepare"
        ) from None
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
    """The records of a split as `python -m data prepare` got them from the raw files;
    `config.data_dir` is its --output.

    Raises:
        UserError: the form is incomplete or damaged, was made for other classes, or lacks the
            split.
    """
    directory = folder(config.data_dir)
    summary = read_summary(directory)
    for field in ("class_names", "multi_label"):
        if (made := summary[field]) != json.loads(json.dumps(getattr(config, field))):
            raise UserError(
                f"{directory / SUMMARY}: prepared for config.{field}={made!r}, the configuration "
                f"has {getattr(config, field)!r}"
            )
    if split not in summary["splits"]:
        raise UserError(
            f"{directory / SUMMARY}: holds the splits {', '.join(summary['splits'])} and no {split}"
        )
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
        image = PreparedImage(str(directory), split, place)
        about = (boxes, labels, name, tuple(cues.tolist()))
        records.append(Record(place, image, width, height, *about))
    return records, ReadReport(**summary["splits"][split])
