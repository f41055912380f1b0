"""EMOTIC's own files -> records: Annotations.mat and CVPR17_Annotations.mat, the older Torch7
files, and the CSV of a widely used converter.

The labels of a training person are those of its one annotator; of a validation or test person, the
union over the annotators (`combined_categories` where the file has it). Annotations.mat marks
bodies, the Torch7 files heads too: `config.data.person_box` says which task is meant. The
COCO-style json with 26-bit masks that the released DSCT code reads is handled in
data/readers/coco.py.
"""

import ast
import csv
import dataclasses
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from data.config import DataConfig
from data.readers.records import ReadReport, Record, RecordBuilder, reading
from data.readers.torch7 import load_torch7
from dsct_jax.errors import UserError

_NO_BOX = (float("nan"),) * 4
_LISTS = ("Image Size", "BBox", "Categorical_Labels", "Continuous_Labels")  # columns of the CSV
_MAT_ERRORS = (ValueError, TypeError, LookupError, EOFError, zlib.error, MatReadError)
_OTHER_TASK = "marks bodies; set config.data.person_box='body', which is another task"


@dataclasses.dataclass(frozen=True)
class _Person:
    where: str  # file and place, for messages
    image: str  # folder/filename
    size: tuple[int, int] | None  # (height, width) as annotated
    box: tuple[float, ...]  # x1 y1 x2 y2; NaN = not marked
    labels: Sequence[str | int]  # category names, or their numbers from 1
    rated: bool  # valence, arousal and dominance are all numbers


def read_emotic(config: DataConfig, split: str) -> tuple[list[Record], ReadReport]:
    """The records of one split, by first appearance. Raises UserError naming file and person."""
    files = config.annotation_files(split)
    protocol = _protocol(files[0].path, config)
    builder = RecordBuilder([file.path for file in files], config, protocol=protocol)
    for file in files:
        images: dict[str, list[_Person]] = defaultdict(list)
        for person in _people(file.path, split, config):
            images[person.image].append(person)
        for name, group in images.items():
            people = [person for person in group if person.rated or not config.drop_unrated]
            builder.report.unrated += len(group) - len(people)
            builder.report.without_people += not people
            if people:
                boxes = [person.box for person in people]
                labels = [_classes(person, builder, len(config.class_names)) for person in people]
                path, name, size = file.root / name, file.prefix + name, group[0].size
                builder.add(path, name, boxes, labels, annotated_size=size)
    return builder.finish()


def _protocol(path: Path, config: DataConfig) -> str:
    if path.suffix == ".t7":
        return "emotic_head_dsct" if config.person_box == "head" else "custom"
    if config.person_box == "head":
        return "custom"
    return "emotic_body_cvpr17" if "cvpr17" in path.name.casefold() else "emotic_body_pami"


def _people(path: Path, split: str, config: DataConfig) -> Iterator[_Person]:
    readers = {".mat": _read_mat, ".t7": _read_t7, ".csv": _read_csv}
    if path.suffix not in readers:
        raise UserError(
            f"{path}: neither .mat, .t7 nor .csv; set config.data.{split} to one of EMOTIC's files "
            "(a .json is config.data.source='coco')"
        )
    return readers[path.suffix](path, split, config)


def _classes(person: _Person, builder: RecordBuilder, num_classes: int) -> list[int]:
    where = f"{person.where} ({person.image}): category"
    return sorted(
        {
            label - 1
            if isinstance(label, int) and 1 <= label <= num_classes
            else builder.class_index(label, where)
            for label in person.labels
        }
    )


def _is_number(value: Any) -> bool:
    number = np.ravel(value)[0] if np.size(value) == 1 else None
    return isinstance(number, int | float | np.number) and not np.isnan(number)


def _corners(value: Any, where: str) -> tuple[float, ...]:
    """(x1, y1, x2, y2) of a list or an array."""
    if value is None or np.size(value) == 0:  # a box without area, which is dropped and counted
        return _NO_BOX
    try:
        x1, y1, x2, y2 = (float(one) for one in np.ravel(value))
    except (TypeError, ValueError):
        raise UserError(f"{where} needs a box x1 y1 x2 y2 in pixels, not {value!r}") from None
    return x1, y1, x2, y2


def _read_mat(path: Path, split: str, config: DataConfig) -> Iterator[_Person]:
    """Structs in structs; of one person or one label the array around it is gone."""
    try:
        with reading(path, "a MATLAB file", *_MAT_ERRORS), path.open("rb") as file:
            document = loadmat(
                file, struct_as_record=False, squeeze_me=True, variable_names=[split]
            )
    except NotImplementedError:
        reason = "is of MATLAB 7.3, and not EMOTIC's own file; save it with -v7"
        raise UserError(f"{path}: {reason}") from None
    if split not in document:
        own = "EMOTIC's own file has train, val and test"
        raise UserError(f"{path}: has no variable {split!r}; {own}")
    for number, image in enumerate(_structs(document[split]), 1):
        where = f"{path}: {split}({number})"
        folder, filename = (str(_field(image, name, where)) for name in ("folder", "filename"))
        annotated = getattr(image, "image_size", None)
        rows, columns = (getattr(annotated, name, None) for name in ("n_row", "n_col"))
        size = None if rows is None or columns is None else (int(rows), int(columns))
        for index, person in enumerate(_structs(_field(image, "person", where)), 1):
            whose = f"{where}.person({index})"
            if config.person_box == "head" and not hasattr(person, "head_bbox"):
                raise UserError(f"{whose} has no head_bbox: Annotations.mat {_OTHER_TASK}")
            box = _corners(_field(person, f"{config.person_box}_bbox", whose), whose)
            labels, rated = [*_mat_labels(person, whose)], _is_rated(person)
            yield _Person(whose, f"{folder}/{filename}", size, box, labels, rated)


def _structs(value: Any) -> list[Any]:
    """A struct, or an array of structs in which one alone or none has lost its array -> list."""
    if hasattr(value, "_fieldnames"):
        return [value]
    return [one for one in np.ravel(value) if hasattr(one, "_fieldnames")]


def _field(struct: Any, name: str, where: str) -> Any:
    if not hasattr(struct, name):
        raise UserError(f"{where} has no {name}; is this EMOTIC's own file?")
    return getattr(struct, name)


def _mat_labels(person: Any, where: str) -> Iterator[str]:
    if hasattr(person, "combined_categories"):
        lists = [person.combined_categories]
    else:
        annotators = _structs(_field(person, "annotations_categories", where))
        lists = [_field(annotator, "categories", where) for annotator in annotators]
    for texts in lists:  # each a text, an array of texts, or an empty array
        yield from (str(one).strip() for one in np.ravel(np.asarray(texts, object)) if np.size(one))


def _is_rated(person: Any) -> bool:
    ratings = getattr(person, "combined_continuous", None)
    if ratings is None:
        ratings = getattr(person, "annotations_continuous", ())
    names = ("valence", "arousal", "dominance")
    values = [getattr(one, name, None) for one in _structs(ratings) for name in names]
    return bool(values) and all(map(_is_number, values))


def _read_t7(path: Path, split: str, config: DataConfig) -> Iterator[_Person]:
    """One item per person."""
    document = load_torch7(path)
    if isinstance(document, dict):  # one file for all splits
        document = document.get(split, document)
    if not isinstance(document, list) or not document:
        raise UserError(f"{path}: must hold a table of people")
    field = f"{config.person_box}_bbox"
    for number, item in enumerate(document, 1):
        where = f"{path}: person {number}"
        item = item if isinstance(item, dict) else {}
        filename, workers = item.get("filename"), item.get("workers")
        if not isinstance(filename, str) or not isinstance(workers, list):
            raise UserError(f"{where} needs filename, folder, {field} and workers")
        labels, ratings = (
            [one for worker in workers if isinstance(worker, dict) for one in _values(worker, name)]
            for name in ("labels", "continuous")
        )
        if any(not _is_number(label) or label != int(label) for label in labels):
            must = "must be category numbers from 1"
            raise UserError(f"{where} ({filename}) has labels {labels}: {must}")
        image = "/".join(part for part in (item.get("folder"), filename) if part)
        rated = bool(ratings) and all(map(_is_number, ratings))
        box, numbers = _corners(item.get(field), where), [int(label) for label in labels]
        yield _Person(where, image, None, box, numbers, rated)


def _values(worker: dict, name: str) -> np.ndarray:
    return np.ravel(np.asarray(worker.get(name, ()), object))


def _read_csv(path: Path, _: str, config: DataConfig) -> Iterator[_Person]:
    """One line per person, lists written as Python writes them."""
    if config.person_box == "head":
        raise UserError(f"{path}: the csv of EMOTIC {_OTHER_TASK}")
    with reading(path, "csv", csv.Error), path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        names = rows.fieldnames or ()
        if missing := [name for name in ("Folder", "Filename", *_LISTS) if name not in names]:
            which = ", ".join(missing)
            raise UserError(f"{path}: has no column {which}; its first line must name them")
        lines = [(rows.line_num, row) for row in rows]
    for number, row in lines:
        where = f"{path}: line {number}"
        lists = (_literal(row[name], f"{where}, column {name}") for name in _LISTS)
        size, box, labels, ratings = lists
        image = f"{row['Folder']}/{row['Filename']}"
        annotated = (int(size[1]), int(size[0])) if len(size) == 2 else None
        names, rated = [str(label) for label in labels], len(ratings) == 3 and None not in ratings
        yield _Person(where, image, annotated, _corners(box, where), names, rated)


def _literal(cell: str | None, where: str) -> list[Any]:
    """A list as Python prints it, nan being None."""
    try:
        value = ast.literal_eval(re.sub(r"\bnan\b", "None", cell or ""))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: needs a list such as [1, 2] and not {cell!r}")
    return list(value)
