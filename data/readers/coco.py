"""COCO-style json <-> records: plain class ids, lists of ids, or the 26-bit masks of the EMOTIC
head-box annotations.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig
from data.readers.find_images import ImageFinder
from data.readers.records import ReadReport, Record, RecordBuilder, reading
from dsct_jax.errors import UserError

EMOTIC_BITS = 26


def decode_bits(mask: int, num_classes: int) -> list[int]:
    """Class indices in a bit mask whose most significant of `num_classes` bits is class 0 (EMOTIC:
    Affection).
    """
    return [index for index in range(num_classes) if mask >> (num_classes - 1 - index) & 1]


def read_coco(
    config: DataConfig, split: str, *, locate: Callable[[Path, str], Path] = Path.__truediv__
) -> tuple[list[Record], ReadReport]:
    """The records of one split, in the order of the json's `images`.

    Args:
        config: `data_dir` holds the images and the annotation files named by the split's field.
        split: train, val or test.
        locate: (folder that the names start from, file_name) -> path of an image.

    Raises:
        UserError: the json, an image or a category cannot be used; one line naming the file and the
            annotation.
    """
    files = config.annotation_files(split)
    builder = RecordBuilder([file.path for file in files], config, protocol=_protocol(config))
    finder = ImageFinder(Path(config.data_dir), locate)
    for file in files:
        document = load_json(file.path)
        to_classes = _label_decoder(file.path, document, config, builder)
        people = _people_of_images(file.path, document)
        for entry in document["images"]:
            boxes, labels = [], []
            for annotation in people.get(_whole(entry["id"]), ()):
                if annotation.get("iscrowd"):
                    builder.report.crowds += 1
                    continue
                boxes.append(_corners(file.path, annotation))
                labels.append(to_classes(annotation))
            name = entry["file_name"]
            builder.add(
                finder.find(file.root, name),
                file.prefix + name,
                boxes,
                labels,
                annotated_size=_annotated_size(entry),
            )
    builder.report.notes += finder.notes()
    return builder.finish()


def _protocol(config: DataConfig) -> str:
    if config.source == "caer_s":
        return "caer_s"
    is_emotic = config.label_format == "bits" and len(config.class_names) == EMOTIC_BITS
    return "emotic_head_dsct" if is_emotic else "custom"


def load_json(path: Path) -> dict[str, Any]:
    """A COCO document with its `images` and `annotations` lists present; in UTF-8 or UTF-16, with
    or without a byte order mark. Raises UserError naming the file.
    """
    try:
        with reading(path, "json"):
            document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid json ({error}); the file may be empty or cut short"
        ) from None
    for field in ("images", "annotations"):
        if not isinstance(document, dict) or not isinstance(document.get(field), list):
            raise UserError(f"{path}: not a COCO-style document: the list '{field}' is missing")
        if not all(isinstance(entry, dict) for entry in document[field]):
            raise UserError(f"{path}: not a COCO-style document: '{field}' must hold objects")
    if not document["images"]:
        raise UserError(f"{path}: lists no images")
    return document


def _whole(value: Any) -> Any:
    """An id as tools write it: 1, 1.0 and "1" are the same one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isdecimal() and value == str(int(value)):
        return int(value)
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _annotated_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = _whole(entry.get("height")), _whole(entry.get("width"))
    return (height, width) if _is_id(height) and _is_id(width) else None


def _people_of_images(path: Path, document: dict) -> dict[Any, list[dict]]:
    """image id -> its annotations, after checking that ids are there, unique and refer to each
    other.
    """
    known: set[Any] = set()
    for place, entry in enumerate(document["images"]):
        image_id = _whole(entry.get("id"))
        if not _is_id(image_id) or not isinstance(entry.get("file_name"), str):
            raise UserError(
                f"{path}: images[{place}] needs an id (a whole number or a text) and a file_name, "
                f"not id {entry.get('id')!r} and file_name {entry.get('file_name')!r}"
            )
        if image_id in known:
            raise UserError(f"{path}: two images have the id {image_id}: ids must be unique")
        known.add(image_id)
    people: dict[Any, list[dict]] = defaultdict(list)
    for annotation in document["annotations"]:
        image_id = _whole(annotation.get("image_id"))
        if not _is_id(image_id) or image_id not in known:
            example = document["images"][0]["id"]
            raise UserError(
                f"{path}: annotation {annotation.get('id')} names image_id "
                f"{annotation.get('image_id')!r}, which is not among the images (their ids are "
                f"such as {example!r})"
            )
        people[image_id].append(annotation)
    return people


def _corners(path: Path, annotation: dict) -> tuple[float, float, float, float]:
    box = annotation.get("bbox")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(value, int | float) and not math.isinf(value) for value in box)
    ):
        raise UserError(
            f"{path}: annotation {annotation.get('id')} needs a bbox [x, y, width, height] in "
            f"pixels, not {box!r}"
        )
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height


def _label_decoder(
    path: Path, document: dict, config: DataConfig, builder: RecordBuilder
) -> Callable[[dict], list[int]]:
    """A function from an annotation to the class indices of its person, checked against the classes
    of the run.
    """
    num_classes = len(config.class_names)

    def fail(annotation: dict, reason: str) -> UserError:
        return UserError(
            f"{path}: annotation {annotation.get('id')} has category_id "
            f"{annotation.get('category_id')!r}: {reason}"
        )

    def from_bits(annotation: dict) -> list[int]:
        mask = _whole(annotation.get("category_id"))
        if type(mask) is not int or not 0 <= mask < 2**num_classes:
            needs = f"a mask of {num_classes} bits, one per class"
            raise fail(annotation, f"config.data.label_format='bits' needs {needs}")
        return decode_bits(mask, num_classes)

    if config.label_format == "bits":
        return from_bits
    class_of = _class_of_category(path, document, config, builder)

    def from_ids(annotation: dict) -> list[int]:
        ids = _category_ids(annotation)
        for one in ids:
            if not _is_id(one) or one not in class_of:
                known = ", ".join(map(str, list(class_of)[:8])) + ", ..." * (len(class_of) > 8)
                hint = ""
                if one is None:
                    hint = "; [] says that a person has no label (config.multi_label=True)"
                elif type(one) is int and one >= 2 * num_classes:
                    hint = " (is this a bit mask? then set config.data.label_format='bits')"
                raise fail(annotation, f"unknown category; known ids are {known}{hint}")
        if not config.multi_label and len(ids) != 1:
            raise fail(annotation, "exactly one class is needed when config.multi_label is False")
        return sorted({class_of[one] for one in ids})

    return from_ids


def _category_ids(annotation: dict) -> list[Any]:
    category = annotation.get("category_id")
    return [_whole(one) for one in (category if isinstance(category, list) else [category])]


def _class_of_category(
    path: Path, document: dict, config: DataConfig, builder: RecordBuilder
) -> dict[Any, int]:
    """category id -> class index: by name where the document has `categories`, else the id is the
    index. A category of another name that nobody has is skipped, as the super-category of Roboflow.
    """
    used = {
        one
        for annotation in document["annotations"]
        for one in _category_ids(annotation)
        if _is_id(one)
    }
    categories = document.get("categories") or []
    if not categories:
        if used and 0 not in used and 1 in used:
            builder.report.suspicious.append(
                f"{path.name} has no categories, and no annotation has category_id 0: ids are "
                "taken as class numbers from 0; if they start at 1, add categories with their names"
            )
        return {index: index for index in range(len(config.class_names))}
    result: dict[Any, int] = {}
    for category in categories:
        name = category.get("name") if isinstance(category, dict) else None
        category_id = _whole(category.get("id")) if isinstance(category, dict) else None
        if category_id not in used and builder.find_class(name) is None:
            builder.report.notes.append(f"category {name!r} of {path.name} skipped, nobody has it")
            continue
        index = builder.class_index(name, f"{path}: category")
        if type(category_id) is not int:
            raise UserError(
                f"{path}: category {name!r} needs a whole number as its id, not "
                f"{category.get('id')!r}"
            )
        result[category_id] = index
    return result


def to_coco(
    records: Sequence[Record], file_names: Sequence[str], config: DataConfig, **more: Any
) -> dict[str, Any]:
    """A COCO-style document of these images: class numbers as category ids, a list of them where
    there may be several.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (record, name) in enumerate(zip(records, file_names, strict=True), 1):
        size = {"width": record.width, "height": record.height}
        images.append({"id": image_id, "file_name": name, **size})
        for box, row in zip(record.boxes.astype(float).tolist(), record.labels, strict=True):
            classes = np.flatnonzero(row).tolist()
            width, height = box[2] - box[0], box[3] - box[1]
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCO's own evaluation takes 0 for "nobody"
                    "image_id": image_id,
                    "category_id": classes if config.multi_label else classes[0],
                    "bbox": [box[0], box[1], width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(config.class_names)]
    return {**more, "images": images, "annotations": annotations, "categories": categories}
