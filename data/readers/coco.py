"""COCO-style json -> records: plain class ids, lists of ids, or the 26-bit masks of the EMOTIC
head-box annotations.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.config import DataConfig, class_lookup
from data.readers.records import ReadReport, Record, RecordBuilder
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
    builder = RecordBuilder(
        ", ".join(str(file.path) for file in files), config, protocol=_protocol(config)
    )
    for file in files:
        document = load_json(file.path)
        to_classes = _label_decoder(file.path, document, config)
        people = _people_of_images(file.path, document)
        for entry in document["images"]:
            boxes, labels = [], []
            for annotation in people.get(entry["id"], ()):
                if annotation.get("iscrowd"):
                    builder.report.crowds += 1
                    continue
                boxes.append(_corners(file.path, annotation))
                labels.append(to_classes(annotation))
            size = (
                (entry["height"], entry["width"]) if {"height", "width"} <= entry.keys() else None
            )
            name = file.prefix + entry["file_name"]
            builder.add(
                locate(file.root, entry["file_name"]), name, boxes, labels, annotated_size=size
            )
    return builder.finish()


def _protocol(config: DataConfig) -> str:
    if config.source == "caer_s":
        return "caer_s"
    return (
        "emotic_head_dsct"
        if config.label_format == "bits" and len(config.class_names) == EMOTIC_BITS
        else "custom"
    )


def load_json(path: Path) -> dict[str, Any]:
    """A COCO document with its `images` and `annotations` lists present. Raises UserError naming
    the file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such annotation file; set config.data.data_dir and the split's file name"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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


def _people_of_images(path: Path, document: dict) -> dict[int | str, list[dict]]:
    """image id -> its annotations, after checking that ids are there, unique and refer to each
    other.
    """
    known: set[int | str] = set()
    for place, entry in enumerate(document["images"]):
        if not isinstance(entry.get("id"), int | str) or not isinstance(
            entry.get("file_name"), str
        ):
            raise UserError(f"{path}: images[{place}] needs an id and a file_name")
        if entry["id"] in known:
            raise UserError(f"{path}: two images have the id {entry['id']}: ids must be unique")
        known.add(entry["id"])
    people: dict[int | str, list[dict]] = defaultdict(list)
    for annotation in document["annotations"]:
        image_id = annotation.get("image_id")
        if not isinstance(image_id, int | str) or image_id not in known:
            raise UserError(
                f"{path}: annotation {annotation.get('id')} names image_id {image_id!r}, which is "
                "not among the images"
            )
        people[image_id].append(annotation)
    return people


def _corners(path: Path, annotation: dict) -> tuple[float, float, float, float]:
    box = annotation.get("bbox")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(value, int | float) for value in box)
    ):
        raise UserError(
            f"{path}: annotation {annotation.get('id')} needs a bbox [x, y, width, height] in "
            f"pixels, not {box!r}"
        )
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height


def _label_decoder(path: Path, document: dict, config: DataConfig) -> Callable[[dict], list[int]]:
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
        mask = annotation.get("category_id")
        if type(mask) is not int or not 0 <= mask < 2**num_classes:
            raise fail(
                annotation,
                f"config.data.label_format='bits' needs a mask of {num_classes} bits, one a class",
            )
        return decode_bits(mask, num_classes)

    class_of = _class_of_category(path, document, config)

    def from_ids(annotation: dict) -> list[int]:
        category = annotation.get("category_id")
        ids: list[Any] = category if isinstance(category, list) else [category]
        for one in ids:
            if type(one) is not int or one not in class_of:
                known = ", ".join(map(str, sorted(class_of)[:8])) + (
                    ", ..." if len(class_of) > 8 else ""
                )
                hint = (
                    " (is this a bit mask? then set config.data.label_format='bits')"
                    if type(one) is int and one >= 2 * num_classes
                    else ""
                )
                raise fail(annotation, f"unknown category; known ids are {known}{hint}")
        if not config.multi_label and len(ids) != 1:
            raise fail(annotation, "exactly one class is needed when config.multi_label is False")
        return sorted({class_of[one] for one in ids})

    return from_bits if config.label_format == "bits" else from_ids


def _class_of_category(path: Path, document: dict, config: DataConfig) -> dict[int, int]:
    """category id -> class index: by name where the document has `categories`, else the id is the
    index.
    """
    categories = document.get("categories") or []
    if not categories or config.label_format == "bits":
        return {index: index for index in range(len(config.class_names))}
    find = class_lookup(config.class_names)
    result: dict[int, int] = {}
    for category in categories:
        name = category.get("name") if isinstance(category, dict) else None
        index = find(name) if isinstance(name, str) else None
        if index is None:
            raise UserError(
                f"{path}: category {name!r} is not in config.class_names "
                f"({', '.join(config.class_names)})"
            )
        if type(category.get("id")) is not int:
            raise UserError(
                f"{path}: category {name!r} needs a whole number as its id, not "
                f"{category.get('id')!r}"
            )
        result[category["id"]] = index
    return result
