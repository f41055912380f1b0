"""CAER-S folders -> records: `{train,val,test}/<Class>/NNNN.png`, with the face boxes in COCO-style
json or in lists of lines.

A line of a list is `path,label,x1,y1,x2,y2` (no header; pixels; label = class name or class
number). The paths of a list start at a folder of its own (config.data.train="ROOT:LIST"), and it
may name files of any folder: the split is what the list says, never what the folder is called.
Images that no list names (no face was found) are no records.
"""

import csv
from collections import defaultdict
from pathlib import Path

from data.config import AnnotationFile, DataConfig
from data.readers.coco import read_coco
from data.readers.records import ReadReport, Record, RecordBuilder, reading
from dsct_jax.errors import UserError

_LOOKED_FOR = 100  # images of a list; when none exists the list belongs to another root


def read_caer_s(config: DataConfig, split: str) -> tuple[list[Record], ReadReport]:
    """The records of one split from `data_dir` and the split's json files or lists.

    Raises:
        UserError: a file, a line or a class name cannot be used; one line naming it.
    """
    files = config.annotation_files(split)
    are_json = {file.path.suffix == ".json" for file in files}
    if len(are_json) == 2:
        raise UserError(
            f"config.data.{split}={config.annotation_file(split)!r} cannot be used: json files "
            "and lists cannot be mixed in one split"
        )
    if are_json == {True}:
        return read_coco(config, split, locate=locate)
    builder = RecordBuilder([file.path for file in files], config, protocol="caer_s")
    for file in files:
        faces = _read_list(file.path, builder, len(config.class_names))
        _require_root(file, list(faces), split)
        for name, entries in faces.items():
            boxes, labels = zip(*entries, strict=True)
            builder.add(
                locate(file.root, name), file.prefix + name, boxes, [[label] for label in labels]
            )
    return builder.finish()


def locate(root: Path, name: str) -> Path:
    """The file `name` below `root`; the folder of the split may be written Train, Test as in the
    original archive.
    """
    path = root / name
    if path.exists():
        return path
    first, *rest = Path(name).parts
    for spelling in (first.capitalize(), first.lower()):
        if (candidate := root.joinpath(spelling, *rest)).exists():
            return candidate
    return path


def _read_list(
    path: Path, builder: RecordBuilder, num_classes: int
) -> dict[str, list[tuple[tuple[float, ...], int]]]:
    """Image name -> the (x1, y1, x2, y2) box and the class number of each of its lines, in the
    order of the list.
    """
    with (
        reading(path, "a box list", csv.Error),
        path.open(newline="", encoding="utf-8-sig") as file,
    ):
        rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    if not rows:
        raise UserError(f"{path}: lists no images")
    numbers = {str(index): index for index in range(num_classes)}
    faces: dict[str, list[tuple[tuple[float, ...], int]]] = defaultdict(list)
    for number, row in rows:
        try:
            name, label, *corners = (cell.strip() for cell in row)
            x1, y1, x2, y2 = map(float, corners)
        except ValueError:
            raise UserError(
                f"{path}:{number}: needs path,label,x1,y1,x2,y2 and not {','.join(row)!r}"
            ) from None
        index = numbers.get(label)
        if index is None:
            index = builder.class_index(label, f"{path}:{number}: class")
        faces[name.replace("\\", "/")].append(((x1, y1, x2, y2), index))
    return faces


def _require_root(file: AnnotationFile, names: list[str], split: str) -> None:
    """Raises UserError when none of the first images of a list lies below its root."""
    if not any(locate(file.root, name).exists() for name in names[:_LOOKED_FOR]):
        raise UserError(
            f"{file.path}: {file.root / names[0]}: no such image file, nor the next of this list: "
            "its paths start at another folder; check "
            f"config.data.data_dir, or write config.data.{split}=ROOT:{file.path.name}"
        )
