"""CAER-S folders -> records: `{train,val,test}/<Class>/NNNN.png`, with the face boxes in COCO-style
json or in lists of lines.

A line of a list is `path,label,x1,y1,x2,y2` (no header; pixels; label = class name or class
number). The paths of a list start at a folder of its own (config.data.train="ROOT:LIST"), and it
may name files of any folder: the split is what the list says, never what the folder is called.
Images that no list names (no face was found) are no records.
"""

from collections import defaultdict
from pathlib import Path

from data.config import AnnotationFile, DataConfig
from data.readers.coco import read_coco
from data.readers.records import ReadReport, Record, RecordBuilder, read_rows
from dsct_jax.errors import UserError

_Face = tuple[tuple[float, ...], list[int]]  # (x1, y1, x2, y2) and class numbers
_LOOKED_FOR = 100  # images of a list; when none exists the list belongs to another root


def read_caer_s(config: DataConfig, split: str) -> tuple[list[Record], ReadReport]:
    """The records of one split, of json files or lists. Raises UserError naming file and line."""
    files = config.annotation_files(split)
    are_json = {file.path.suffix == ".json" for file in files}
    if len(are_json) == 2:
        value, mixed = config.annotation_file(split), "json files and lists cannot be mixed"
        raise UserError(f"config.data.{split}={value!r} cannot be used: {mixed} in one split")
    if are_json == {True}:
        return read_coco(config, split, locate=locate)
    builder = RecordBuilder([file.path for file in files], config, protocol="caer_s")
    for file in files:
        faces = _read_list(file.path, builder, len(config.class_names))
        _require_root(file, list(faces), split)
        for name, entries in faces.items():
            boxes, labels = zip(*entries, strict=True)
            builder.add(locate(file.root, name), file.prefix + name, boxes, labels)
    return builder.finish()


def locate(root: Path, name: str) -> Path:
    """The file `name` below `root`; the split's folder may be called Train as in the archive."""
    path = root / name
    if path.exists():
        return path
    first, *rest = Path(name).parts
    for spelling in (first.capitalize(), first.lower()):
        if (candidate := root.joinpath(spelling, *rest)).exists():
            return candidate
    return path


def _read_list(path: Path, builder: RecordBuilder, num_classes: int) -> dict[str, list[_Face]]:
    """Image name -> its lines, in the order of the list."""
    rows = read_rows(path, "a box list")
    if not rows:
        raise UserError(f"{path}: lists no images")
    numbers = {str(index): index for index in range(num_classes)}
    faces: dict[str, list[_Face]] = defaultdict(list)
    for number, row in rows:
        try:
            name, label, *corners = row
            x1, y1, x2, y2 = map(float, corners)
        except ValueError:
            needs = f"needs path,label,x1,y1,x2,y2 and not {','.join(row)!r}"
            raise UserError(f"{path}:{number}: {needs}") from None
        index = numbers.get(label)
        if index is None:
            index = builder.class_index(label, f"{path}:{number}: class")
        faces[name.replace("\\", "/")].append(((x1, y1, x2, y2), [index]))
    return faces


def _require_root(file: AnnotationFile, names: list[str], split: str) -> None:
    """Raises UserError when none of the first images of a list lies below its root."""
    if not any(locate(file.root, name).exists() for name in names[:_LOOKED_FOR]):
        raise UserError(
            f"{file.path}: {file.root / names[0]}: no such image file, nor the next of this list: "
            "its paths start at another folder; check config.data.data_dir, or write "
            f"config.data.{split}=ROOT:{file.path.name}"
        )
