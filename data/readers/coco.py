"""COCO-style json <-> records: class ids, lists of ids, or the 26-bit masks of EMOTIC's json; other
tools' exports as data/readers/exports.py makes them COCO.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.config import SPLITS, AnnotationFile, DataConfig, class_lookup
from data.readers.exports import Document, attribute_names, load_export, name_classes
from data.readers.find_images import ImageFinder
from data.readers.frames import FRAMES
from data.readers.records import ReadReport, Record, RecordBuilder
from dsct_jax.errors import UserError

EMOTIC_BITS = 26
_Shown = tuple[str, list[tuple[float, ...]], list[list[int]]]  # name, boxes and labels of an image
_LARGEST = 1e9  # pixels: more, as infinity, is no number of pixels


def decode_bits(mask: int, num_classes: int) -> list[int]:
    """Class indices in a mask whose most significant bit is class 0 (EMOTIC: Affection)."""
    return [index for index in range(num_classes) if mask >> (num_classes - 1 - index) & 1]


def read_coco(
    config: DataConfig, split: str, *, locate: Callable[[Path, str], Path] = Path.__truediv__
) -> tuple[list[Record], ReadReport]:
    """The records of one split, in the order of the json's `images`. `locate`: (folder that the
    names start from, file_name) -> path of an image. Raises UserError naming file and annotation.
    """
    files = config.annotation_files(split)
    attribute = config.label_attribute
    documents = [(file, load_document(file.path, attribute)) for file in files]
    return read_documents(documents, config, locate=locate)


def read_documents(
    documents: Sequence[tuple[AnnotationFile, Document]],
    config: DataConfig,
    *,
    locate: Callable[[Path, str], Path] = Path.__truediv__,
) -> tuple[list[Record], ReadReport]:
    """The same of documents that `load_document` returned, and the files they are of."""
    builder = RecordBuilder(
        [file.path for file, _ in documents], config, protocol=_protocol(config)
    )
    finder = ImageFinder(config.root, locate)
    for file, document in documents:
        to_classes = _label_decoder(file.path, document, config, builder)
        people = _people_of_images(file.path, document)
        ids = Counter(
            str(one["id"]) for one in document["annotations"] if one.get("id") is not None
        )
        if again := ids.total() - len(ids):
            first = next(name for name, count in ids.items() if count > 1)
            note = (
                f"{again} annotations of {file.path.name} have the id of another (first: {first})"
            )
            builder.report.notes.append(note)
        shown: dict[Any, _Shown] = {}
        for entry in document["images"]:
            path, size = finder.find(file.root, entry["file_name"]), _annotated_size(entry)
            frame = entry["exif"] if entry.get("exif") in FRAMES else ""
            boxes, labels = shown.setdefault((path, size, frame), (entry["file_name"], [], []))[1:]
            for annotation in people.get(_whole(entry["id"]), ()):
                if annotation.get("iscrowd"):
                    builder.report.crowds += 1
                    continue
                boxes.append(_corners(file.path, annotation))
                labels.append(to_classes(annotation))
        if again := len(document["images"]) - len(shown):
            builder.report.notes.append(
                f"{again} images of {file.path.name} named twice or more, taken as one"
            )
        for (path, size, frame), (name, boxes, labels) in shown.items():
            builder.add(path, file.prefix + name, boxes, labels, annotated_size=size, frame=frame)
    builder.report.notes += finder.notes()
    return builder.finish()


def _protocol(config: DataConfig) -> str:
    if config.source == "caer_s":
        return "caer_s"
    is_emotic = config.label_format == "bits" and len(config.class_names) == EMOTIC_BITS
    return "emotic_head_dsct" if is_emotic else "custom"


def load_document(path: Path, attribute: str = "") -> Document:
    """A COCO document with its lists, in UTF-8 or UTF-16, or another tool's export as one; the
    classes in `attribute`, if any. Raises UserError naming the file.
    """
    document = load_export(path)
    if not isinstance(document, dict):
        document = {}
    document["categories"] = document.get("categories") or []
    problem = f"{path}: not a COCO-style document:"
    for field in ("images", "annotations", "categories"):
        if not isinstance(document.get(field), list):
            raise UserError(f"{problem} the list '{field}' is missing")
        if not all(isinstance(entry, dict) for entry in document[field]):
            raise UserError(f"{problem} '{field}' must hold objects")
    if not document["images"]:
        raise UserError(f"{path}: lists no images")
    return name_classes(document, path, attribute)


def _whole(value: Any) -> Any:
    """An id as tools write it: 1, 1.0 and "1" are the same one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and len(value) < 20 and value.isdecimal():
        return int(value)
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _annotated_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = _whole(entry.get("height")), _whole(entry.get("width"))
    known = all(isinstance(side, int) and side > 0 for side in (height, width))
    return (height, width) if known else None


def _people_of_images(path: Path, document: dict) -> dict[Any, list[dict]]:
    """image id -> its annotations; ids must be there, be unique and refer to each other."""
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
        given = annotation.get("image_id")
        image_id = _whole(given)
        if not _is_id(image_id) or image_id not in known:
            example = document["images"][0]["id"]
            raise UserError(
                f"{path}: annotation {annotation.get('id')} names image_id {given!r}, which is not "
                f"among the images (their ids are such as {example!r})"
            )
        people[image_id].append(annotation)
    return people


def _corners(path: Path, annotation: dict) -> tuple[float, float, float, float]:
    def is_length(value: Any) -> bool:
        return isinstance(value, int | float) and not abs(value) > _LARGEST

    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_length, box)):
        needs = f"needs a bbox [x, y, width, height] in pixels, not {box!r}"
        raise UserError(f"{path}: annotation {annotation.get('id')} {needs}")
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height


def _label_decoder(
    path: Path, document: dict, config: DataConfig, builder: RecordBuilder
) -> Callable[[dict], list[int]]:
    """A function from an annotation to the class indices of its person."""
    num_classes = len(config.class_names)

    def fail(annotation: dict, reason: str) -> UserError:
        number, category = annotation.get("id"), annotation.get("category_id")
        return UserError(f"{path}: annotation {number} has category_id {category!r}: {reason}")

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
        ids = category_ids(annotation)
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


def category_ids(annotation: Document) -> list[Any]:
    """The one or several of a person, as whole numbers where they mean such."""
    category = annotation.get("category_id")
    return [_whole(one) for one in (category if isinstance(category, list) else [category])]


def _used_ids(document: dict) -> set[Any]:
    ids = (one for annotation in document["annotations"] for one in category_ids(annotation))
    return {one for one in ids if _is_id(one)}


def _class_of_category(
    path: Path, document: dict, config: DataConfig, builder: RecordBuilder
) -> dict[Any, int]:
    """category id -> class index: by name where the document has `categories`, else the id is the
    index. A category of another name that nobody has is skipped, as the super-category of Roboflow.
    """
    used = _used_ids(document)
    if not document["categories"]:
        if used and 0 not in used and 1 in used:
            builder.report.suspicious.append(
                f"{path.name} has no categories, and no annotation has category_id 0: ids are "
                "taken as class numbers from 0; if they start at 1, add categories with their names"
            )
        return {index: index for index in range(len(config.class_names))}
    result: dict[Any, int] = {}
    for category in document["categories"]:
        name, category_id = category.get("name"), _whole(category.get("id"))
        is_used = _is_id(category_id) and category_id in used
        if not is_used and builder.find_class(name) is None:
            builder.report.notes.append(f"category {name!r} of {path.name} skipped, nobody has it")
            continue
        index = builder.class_index(name, f"{path}: category", _attribute_hint(document))
        if type(category_id) is not int:
            needs = f"needs a whole number as its id, not {category.get('id')!r}"
            raise UserError(f"{path}: category {name!r} {needs}")
        result[category_id] = index
    return result


def _attribute_hint(document: dict) -> str:
    names = ", ".join(attribute_names(document))
    return f"; if a person's {names} is the class, name it in config.data.label_attribute" * bool(
        names
    )


def annotated_classes(config: DataConfig) -> tuple[str, ...]:
    """What config.class_names=("auto",) stands for: the classes of all splits whose files are
    there. Raises UserError where there are none.
    """
    if config.source not in ("coco", "caer_s"):
        raise UserError(f"config.class_names='auto': {config.source!r} names no classes; list them")
    files = [(split, file.path) for split in SPLITS for file in config.annotation_files(split)]
    paths = [path for split, path in files if split == SPLITS[0] or path.exists()]
    found = classes_of([load_document(path, config.label_attribute) for path in paths])
    if not found:
        raise UserError(f"{paths[0]}: nobody has a category with a name; list config.class_names")
    return found


def classes_of(documents: Sequence[Document]) -> tuple[str, ...]:
    """The names of the categories that somebody has, in the order of their ids."""
    found: list[str] = []
    for document in documents:
        ids = [(_whole(one.get("id")), one.get("name")) for one in document["categories"]]
        names = {number: str(name) for number, name in ids if type(number) is int}
        for number in sorted(names.keys() & _used_ids(document)):
            if class_lookup(tuple(found))(names[number]) is None:
                found.append(names[number].strip())
    return tuple(found)


def to_coco(
    records: Sequence[Record], file_names: Sequence[str], config: DataConfig, **more: Any
) -> dict[str, Any]:
    """A COCO-style document of these images; category ids are class numbers, or lists of them."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (record, name) in enumerate(zip(records, file_names, strict=True), 1):
        about: dict[str, Any] = {"width": record.width, "height": record.height}
        about |= {"exif": record.exif} if record.exif else {}
        images.append({"id": image_id, "file_name": name, **about})
        for box, row in zip(record.boxes.astype(float).tolist(), record.labels, strict=True):
            classes = np.flatnonzero(row).tolist()
            width, height = box[2] - box[0], box[3] - box[1]
            number = len(annotations) + 1  # COCO's own evaluation takes 0 for "nobody"
            category = classes if config.multi_label else classes[0]
            person = {"id": number, "image_id": image_id, "category_id": category}
            region = {"bbox": [*box[:2], width, height], "area": width * height, "iscrowd": 0}
            annotations.append(person | region)
    categories = [{"id": index, "name": name} for index, name in enumerate(config.class_names)]
    return {**more, "images": images, "annotations": annotations, "categories": categories}
