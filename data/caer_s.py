"""CAER-S folders -> records: `{train,val,test}/<Class>/NNNN.png`, with the face boxes in a COCO-style json or in a list of lines.

A line of a list is `path,label,x1,y1,x2,y2` (no header; pixels; label = class name or class number). A list may name files of any folder: the
split is what the list says, never what the folder is called. Images that a list leaves out (no face was found) are no records.
"""

import csv
from collections import defaultdict
from pathlib import Path

from data.coco import read_coco
from data.config import DataConfig
from data.records import ReadReport, Record, RecordBuilder
from dsct_jax.errors import UserError


def read_caer_s(config: DataConfig, split: str) -> tuple[list[Record], ReadReport]:
    """The records of one split from `data_dir` and the split's json or list.

    Raises:
        UserError: a file, a line or a class name cannot be used; one line naming it.
    """
    path = Path(config.data_dir) / config.annotation_file(split)
    if path.suffix == ".json":
        return read_coco(config, split, locate=_locate)
    return _read_list(config, path)


def _locate(root: Path, name: str) -> Path:
    """The file below `root`; the split folder may be written Train, Test as in the original archive."""
    path = root / name
    if path.exists():
        return path
    first, *rest = Path(name).parts
    for spelling in (first.capitalize(), first.lower()):
        if (candidate := root.joinpath(spelling, *rest)).exists():
            return candidate
    return path


def _read_list(config: DataConfig, path: Path) -> tuple[list[Record], ReadReport]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except FileNotFoundError:
        raise UserError(f"{path}: no such box list; set config.data.data_dir and the split's file name") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a box list ({error})") from None
    if not rows:
        raise UserError(f"{path}: lists no images")
    classes = {name.casefold(): index for index, name in enumerate(config.class_names)}
    classes |= {str(index): index for index in range(len(config.class_names))}
    people: dict[str, list[tuple[tuple[float, ...], list[int]]]] = defaultdict(list)
    for number, row in rows:
        try:
            name, label, *corners = (cell.strip() for cell in row)
            x1, y1, x2, y2 = map(float, corners)
        except ValueError:
            raise UserError(f"{path}:{number}: needs path,label,x1,y1,x2,y2 and not {','.join(row)!r}") from None
        if label.casefold() not in classes:
            raise UserError(f"{path}:{number}: class {label!r} is not in config.class_names ({', '.join(config.class_names)})")
        people[name].append(((x1, y1, x2, y2), [classes[label.casefold()]]))
    builder = RecordBuilder(str(path), num_classes=len(config.class_names), max_targets=config.max_targets, skip_corrupt=config.skip_corrupt)
    for name, entries in people.items():
        builder.add(_locate(Path(config.data_dir), name), name, [box for box, _ in entries], [label for _, label in entries])
    if not builder.records:
        raise UserError(f"{path}: holds no usable image")
    return builder.records, builder.report
