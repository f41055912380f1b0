"""EMOTIC's own files -> records: Annotations.mat and CVPR17_Annotations.mat, the older Torch7
files, and the CSV of a widely used converter.

The labels of a training person are those of its one annotator; of a validation or test person, the
union over the annotators (`combined_categories` where the file has it). Annotations.mat marks
bodies, the Torch7 files heads too: `config.data.person_box` says which task is meant. The
COCO-style json with 26-bit masks that the released DSCT code reads is the matter of
data/readers/coco.py.
"""

import ast
import csv
import dataclasses
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from data.config import AnnotationFile, DataConfig, class_lookup
from data.readers.records import ReadReport, Record, RecordBuilder
from data.readers.torch7 import load_torch7
from dsct_jax.errors import UserError

_NO_BOX = (float("nan"),) * 4
_CSV_COLUMNS = (
    "Folder",
    "Filename",
    "Image Size",
    "BBox",
    "Categorical_Labels",
    "Continuous_Labels",
)


@dataclasses.dataclass(frozen=True)
class _Person:
    place: str  # for messages
    image: str  # folder/filename
    size: tuple[int, int] | None  # (height, width) as annotated
    box: tuple[float, ...]  # x1 y1 x2 y2; NaN = not marked
    labels: list[str | int]  # category names, or their numbers from 1
    rated: bool  # valence, arousal and dominance are all numbers


def read_emotic(config: DataConfig, split: str) -> tuple[list[Record], ReadReport]:
    """The records of one split of a .mat, .t7 or .csv file, in the order in which the images first
    appear; people of one image need not be adjacent.

    Raises:
        UserError: the file, a person or a category cannot be used; one line naming the file and the
            person.
    """
    files = config.annotation_files(split)
    builder = RecordBuilder(
        ", ".join(str(file.path) for file in files),
        config,
        protocol=_protocol(files[0].path, config),
    )
    for file in files:
        _add_images(builder, file, config, _people(file.path, split, config))
    return builder.finish()


def _protocol(path: Path, config: DataConfig) -> str:
    if path.suffix == ".t7":
        return "emotic_head_dsct" if config.person_box == "head" else "custom"
    if config.person_box == "head":
        return "custom"
    return "emotic_body_cvpr17" if "cvpr17" in path.name.casefold() else "emotic_body_pami"


def _people(path: Path, split: str, config: DataConfig) -> Iterator[_Person]:
    if path.suffix == ".mat":
        return _read_mat(path, split, config)
    if path.suffix == ".t7":
        return _read_t7(path, split, config)
    if path.suffix == ".csv":
        return _read_csv(path, config)
    raise UserError(
        f"{path}: neither .mat, .t7 nor .csv; set config.data.{split} to one of EMOTIC's files (a "
        ".json is config.data.source='coco')"
    )


def _add_images(
    builder: RecordBuilder, file: AnnotationFile, config: DataConfig, people: Iterable[_Person]
) -> None:
    find = class_lookup(config.class_names)
    images: dict[str, list[_Person]] = {}
    for person in people:
        images.setdefault(person.image, []).append(person)
    for name, group in images.items():
        kept = [person for person in group if person.rated or not config.drop_unrated]
        builder.report.unrated += len(group) - len(kept)
        if not kept:
            builder.report.without_people += 1
            continue
        labels = [
            sorted({_class_of(label, find, file.path, person, config) for label in person.labels})
            for person in kept
        ]
        builder.add(
            file.root / name,
            file.prefix + name,
            [person.box for person in kept],
            labels,
            annotated_size=group[0].size,
        )


def _class_of(label: str | int, find, path: Path, person: _Person, config: DataConfig) -> int:
    if isinstance(label, int) and 1 <= label <= len(config.class_names):
        return label - 1
    index = find(label) if isinstance(label, str) else None
    if index is None:
        raise UserError(
            f"{path}: {person.place} ({person.image}): category {label!r} is not in "
            f"config.class_names ({', '.join(config.class_names)})"
        )
    return index


# --- Annotations.mat: structs in structs; of one person or one label the array around it is gone --


def _read_mat(path: Path, split: str, config: DataConfig) -> Iterator[_Person]:
    try:
        with path.open("rb") as file:
            document = scipy.io.loadmat(
                file, struct_as_record=False, squeeze_me=True, variable_names=[split]
            )
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such annotation file; set config.data.data_dir and the split's file name"
        ) from None
    except NotImplementedError:
        raise UserError(
            f"{path}: is of MATLAB 7.3, and not EMOTIC's own file; save it with -v7"
        ) from None
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        EOFError,
        zlib.error,
        scipy.io.matlab.MatReadError,
    ) as error:
        raise UserError(
            f"{path}: cannot be read as a MATLAB file "
            f"({' '.join(str(error).split()) or type(error).__name__})"
        ) from None
    if split not in document:
        raise UserError(
            f"{path}: has no variable {split!r}; EMOTIC's own file has train, val and test"
        )
    for number, image in enumerate(_structs(document[split]), 1):
        place = f"{split}({number})"
        folder, filename = (
            str(_field(image, name, path, place)) for name in ("folder", "filename")
        )
        annotated: Any = getattr(image, "image_size", None)
        size = (
            (int(annotated.n_row), int(annotated.n_col))
            if hasattr(annotated, "n_row") and hasattr(annotated, "n_col")
            else None
        )
        for index, person in enumerate(_structs(_field(image, "person", path, place)), 1):
            whose = f"{place}.person({index})"
            yield _Person(
                place=whose,
                image=f"{folder}/{filename}",
                size=size,
                box=_mat_box(person, path, whose, config),
                labels=list(_mat_labels(person, path, whose)),
                rated=_is_rated(person),
            )


def _structs(value: Any) -> list[Any]:
    """A struct, or an array of structs in which one alone or none has lost its array -> list."""
    return (
        [value]
        if hasattr(value, "_fieldnames")
        else [one for one in np.ravel(value) if hasattr(one, "_fieldnames")]
    )


def _texts(value: Any) -> list[str]:
    """A text, an array of texts, or an empty array -> list."""
    return [str(one).strip() for one in np.ravel(np.asarray(value, object)) if np.size(one)]


def _field(struct: Any, name: str, path: Path, place: str) -> Any:
    if not hasattr(struct, name):
        raise UserError(f"{path}: {place} has no {name}; is this EMOTIC's own file?")
    return getattr(struct, name)


def _mat_box(person: Any, path: Path, place: str, config: DataConfig) -> tuple[float, ...]:
    if config.person_box == "head" and not hasattr(person, "head_bbox"):
        raise UserError(
            f"{path}: {place} has no head_bbox: Annotations.mat marks bodies; set "
            "config.data.person_box='body', which is another task"
        )
    return _corners(_field(person, f"{config.person_box}_bbox", path, place), path, place)


def _mat_labels(person: Any, path: Path, place: str) -> Iterator[str]:
    if hasattr(person, "combined_categories"):
        yield from _texts(person.combined_categories)
        return
    for annotator in _structs(_field(person, "annotations_categories", path, place)):
        yield from _texts(_field(annotator, "categories", path, place))


def _is_rated(person: Any) -> bool:
    combined = getattr(person, "combined_continuous", None)
    ratings = _structs(
        combined if combined is not None else getattr(person, "annotations_continuous", ())
    )
    return bool(ratings) and all(
        _is_number(getattr(rating, name, None))
        for rating in ratings
        for name in ("valence", "arousal", "dominance")
    )


def _is_number(value: Any) -> bool:
    return (
        np.size(value) == 1
        and isinstance(np.ravel(value)[0], int | float | np.number)
        and not np.isnan(np.ravel(value)[0])
    )


def _corners(value: Any, path: Path, place: str) -> tuple[float, ...]:
    """(x1, y1, x2, y2) of a list or an array; nothing at all is a box without area, which is
    dropped and counted.
    """
    if value is None or np.size(value) == 0:
        return _NO_BOX
    try:
        x1, y1, x2, y2 = (float(one) for one in np.ravel(value))
    except (TypeError, ValueError):
        raise UserError(
            f"{path}: {place} needs a box x1 y1 x2 y2 in pixels, not {value!r}"
        ) from None
    return x1, y1, x2, y2


# --- Torch7: one item a person --------------------------------------------------------------------


def _read_t7(path: Path, split: str, config: DataConfig) -> Iterator[_Person]:
    document = load_torch7(path)
    if isinstance(document, dict):  # one file for all splits
        document = document.get(split, document)
    if not isinstance(document, list) or not document:
        raise UserError(f"{path}: must hold a table of people")
    field = f"{config.person_box}_bbox"
    for number, item in enumerate(document, 1):
        place = f"person {number}"
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("filename"), str)
            or not isinstance(item.get("workers"), list)
        ):
            raise UserError(f"{path}: {place} needs filename, folder, {field} and workers")
        workers = [worker for worker in item["workers"] if isinstance(worker, dict)]
        labels = [
            label
            for worker in workers
            for label in np.ravel(np.asarray(worker.get("labels", ()), object))
        ]
        if any(not _is_number(label) or label != int(label) for label in labels):
            raise UserError(
                f"{path}: {place} ({item['filename']}) has labels {labels}: must be category "
                "numbers from 1"
            )
        ratings = [
            rating
            for worker in workers
            for rating in np.ravel(np.asarray(worker.get("continuous", ()), object))
        ]
        yield _Person(
            place=place,
            image="/".join(part for part in (item.get("folder"), item["filename"]) if part),
            size=None,
            box=_corners(item.get(field), path, place),
            labels=[int(label) for label in labels],
            rated=bool(ratings) and all(map(_is_number, ratings)),
        )


# --- CSV: one line a person, lists written as Python writes them ----------------------------------


def _read_csv(path: Path, config: DataConfig) -> Iterator[_Person]:
    if config.person_box == "head":
        raise UserError(
            f"{path}: the csv of EMOTIC marks bodies: set config.data.person_box='body', which is "
            "another task"
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = [name for name in _CSV_COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path}: has no column {', '.join(missing)}; its first line must name them"
                )
            lines = [(rows.line_num, row) for row in rows]
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such annotation file; set config.data.data_dir and the split's file name"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as csv ({error})") from None
    for number, row in lines:
        place = f"line {number}"
        cells = {name: _literal(row[name], path, place, name) for name in _CSV_COLUMNS[2:]}
        size = cells["Image Size"]
        labels = cells["Categorical_Labels"]
        ratings = np.array(
            [np.nan if one is None else one for one in cells["Continuous_Labels"]], float
        )
        yield _Person(
            place=place,
            image=f"{row['Folder']}/{row['Filename']}",
            size=(int(size[1]), int(size[0])) if len(size) == 2 else None,
            box=_corners(cells["BBox"], path, place),
            labels=[str(label) for label in labels],
            rated=ratings.size == 3 and not np.isnan(ratings).any(),
        )


def _literal(cell: str | None, path: Path, place: str, name: str) -> list[Any]:
    """A list as Python prints it, nan being None."""
    try:
        value = (
            ast.literal_eval(re.sub(r"\bnan\b", "None", cell or ""))
            if name == "Continuous_Labels"
            else ast.literal_eval(cell or "")
        )
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list | tuple):
        raise UserError(
            f"{path}: {place}, column {name}: needs a list such as [1, 2] and not {cell!r}"
        )
    return list(value)
