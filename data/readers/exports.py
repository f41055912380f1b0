"""What annotation tools export, as COCO documents: the XML of CVAT for images, Label Studio's JSON
and JSON-MIN, and the json and csv of the VGG Image Annotator (VIA).

Where a tool gives people attributes, those are in `attributes` of an annotation, as CVAT's own COCO
export has them; `name_classes` makes one of them the class.
"""

import cmath
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from data.readers.frames import UPRIGHT
from data.readers.records import reading
from dsct_jax.errors import UserError

Document = dict[str, Any]
Point = tuple[float, float]
_VIA_COLUMNS = ("filename", "region_shape_attributes", "region_attributes")
_SHOWN = 8  # names in a message
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def load_export(path: Path) -> Any:
    """A COCO document from one of these files; any other json as it is. Raises UserError naming a
    file that is missing, or damaged, or of a tool whose export is none of these.
    """
    with reading(path, "annotations"):
        content = path.read_bytes()
    suffix = path.suffix.lower()
    kind = {".xml": "XML of CVAT", ".csv": "csv of VIA"}.get(suffix, "json")
    try:
        if suffix == ".xml":
            return _of_cvat(ElementTree.fromstring(content))
        if suffix == ".csv":
            return _of_via_csv(content.decode("utf-8-sig"))
        value = json.loads(content)
    except (*_DAMAGED, ElementTree.ParseError) as error:
        hint = "the file may be empty or cut short"
        raise UserError(f"{path}: not valid {kind} ({error}); {hint}") from None
    try:
        if isinstance(value, list) and value:
            return _of_label_studio(value)
        if isinstance(value, dict) and "images" not in value:
            files = value.get("_via_img_metadata", value).values()
            if files and all("regions" in one and "filename" in one for one in files):
                return _of_via(files)
    except _DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: neither COCO, Label Studio nor VIA ({reason})") from None
    return value


class _Collector:
    """Images and people in the order of the file -> a COCO document."""

    def __init__(self) -> None:
        self.images: list[Document] = []
        self.people: list[Document] = []
        self._categories: dict[str, int] = {}

    def image(self, name: str, size: Sequence[float] = (), frame: str = UPRIGHT) -> None:
        """`size`: (width, height). Tools in a browser show an image upright."""
        about = {"id": len(self.images) + 1, "file_name": name, "exif": frame}
        sides = dict(zip(("width", "height"), (round(side) for side in size), strict=False))
        self.images.append(about | sides)

    def person(
        self, points: Iterable[Point], attributes: Mapping[str, Any], label: str | None = None
    ) -> None:
        """The box around the points, on the last image."""
        xs, ys = zip(*points, strict=True)
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        category = {} if label is None else {"category_id": self._category(label)}
        number, image = len(self.people) + 1, len(self.images)
        about = {"id": number, "image_id": image, "bbox": box, "attributes": dict(attributes)}
        self.people.append(about | category)

    def _category(self, label: str) -> int:
        return self._categories.setdefault(label, len(self._categories) + 1)

    def document(self) -> Document:
        """Without images that nobody was marked on: they may not have been looked at yet."""
        marked = {one["image_id"] for one in self.people}
        images = [one for one in self.images if one["id"] in marked]
        categories = [{"id": number, "name": name} for name, number in self._categories.items()]
        lists = {"images": images, "annotations": self.people, "categories": categories}
        return {**lists, "unmarked": len(self.images) - len(images)}


def _corners(x: float, y: float, width: float, height: float) -> list[Point]:
    return [(x, y), (x + width, y + height)]


def _of_cvat(root: ElementTree.Element) -> Document:
    if root.find("track") is not None:
        raise ValueError("tracks of a video: export it as CVAT for images")
    found = _Collector()
    for image in root.iter("image"):
        sides = [float(image.attrib[side]) for side in ("width", "height")]
        found.image(image.attrib["name"], sides)
        for shape in image:
            about = shape.attrib
            if shape.tag == "box":
                corners = [float(about[side]) for side in ("xtl", "ytl", "xbr", "ybr")]
                points = [(corners[0], corners[1]), (corners[2], corners[3])]
            elif shape.tag in ("polygon", "polyline"):
                points = [_pair(pair.split(",")) for pair in about["points"].split(";")]
            else:
                continue
            values = {one.attrib["name"]: one.text or "" for one in shape.iter("attribute")}
            found.person(points, values, about["label"])
    return found.document()


def _pair(values: Sequence[Any]) -> Point:
    x, y = map(float, values)
    return x, y


def _of_label_studio(tasks: list[dict]) -> Document:
    found = _Collector()
    for task in tasks:
        data = task.get("data", task)
        if "data" in task:
            answers = task.get("annotations") or task.get("completions") or []
            answers = [one for one in answers if not one.get("was_cancelled")]
            results = answers[0]["result"] if answers else []
        else:  # JSON-MIN: a key for each control
            results = [
                {"id": f"{name} {number}", "from_name": name, "value": one, **one}
                for name, values in task.items()
                for number, one in enumerate(values if isinstance(values, list) else ())
                if isinstance(one, dict)
            ]
        boxes = [one for one in results if "x" in one["value"]]
        sizes = [(one["original_width"], one["original_height"]) for one in boxes]
        found.image(_image_of(data), sizes[0] if sizes else ())
        regions: dict[str, dict[str, Any]] = {}
        for result in results:  # those of one region share its id
            region = regions.setdefault(result["id"], {"labels": {}})
            value = result["value"]
            if "x" in value:
                region["points"] = _percent(value, *sizes[0])
            labels = [one for key, one in value.items() if key.endswith(("labels", "choices"))]
            if labels:
                region["labels"][result["from_name"]] = labels[0]
        for region in regions.values():
            if "points" in region:
                found.person(region["points"], region["labels"])
    return found.document()


def _image_of(data: Mapping[str, Any]) -> str:
    """The image among the values of a task."""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    named = [value for key, value in texts.items() if key in ("image", "img")]
    named += [value for value in texts.values() if re.search(r"\.\w{3,4}(\?.*)?$", value)]
    if not named:
        raise ValueError("a list whose entries name no image")
    return named[0]


def _percent(value: Mapping[str, Any], width: float, height: float) -> list[Point]:
    """The corners of a Label Studio rectangle, which may be turned about its first one."""
    sides = zip(("x", "y", "width", "height"), (width, height) * 2, strict=True)
    x, y, w, h = (value[name] * side / 100 for name, side in sides)
    turn = cmath.exp(1j * math.radians(value.get("rotation", 0)))
    corners = [complex(x, y) + turn * corner for corner in (0, w, w + 1j * h, 1j * h)]
    return [(corner.real, corner.imag) for corner in corners]


def _of_via(files: Iterable[Mapping[str, Any]]) -> Document:
    found = _Collector()
    for file in files:
        found.image(file["filename"])
        regions = file["regions"]
        for region in regions.values() if isinstance(regions, dict) else regions:
            if points := _via_points(region["shape_attributes"]):
                found.person(points, region["region_attributes"])
    return found.document()


def _of_via_csv(text: str) -> Document:
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or any(name not in rows[0] for name in _VIA_COLUMNS):
        raise ValueError(f"its first line must name {', '.join(_VIA_COLUMNS)}")
    files: dict[str, Any] = {}
    for row in rows:
        file = files.setdefault(row["filename"], {"filename": row["filename"], "regions": []})
        shape, values = (json.loads(row[name] or "{}") for name in _VIA_COLUMNS[1:])
        if shape:
            file["regions"].append({"shape_attributes": shape, "region_attributes": values})
    return _of_via(files.values())


def _via_points(shape: Mapping[str, Any]) -> list[Point]:
    """What lies around a shape; none around a point."""
    if "width" in shape:
        return _corners(*(shape[name] for name in ("x", "y", "width", "height")))
    if "all_points_x" in shape:
        return list(zip(shape["all_points_x"], shape["all_points_y"], strict=True))
    if "cx" in shape and shape["name"] != "point":
        x, y = (shape.get(name, shape.get("r")) for name in ("rx", "ry"))
        return _corners(shape["cx"] - x, shape["cy"] - y, 2 * x, 2 * y)
    return []


def box_polygons(document: Document) -> Document:
    """The document with the box around its polygons for people without `bbox`."""

    def boxed(person: Document) -> Document:
        parts = person.get("segmentation")
        if person.get("bbox") or not isinstance(parts, list) or not parts:
            return person
        xs, ys = ([x for part in parts for x in part[start::2]] for start in (0, 1))
        return {**person, "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]}

    return {**document, "annotations": [boxed(one) for one in document["annotations"]]}


def attribute_names(document: Document) -> list[str]:
    """Those of the people that hold texts, lists or choices, not numbers (a track's) or yes and no
    (occluded).
    """
    values = (item for one in document["annotations"] for item in _attributes(one).items())
    return sorted({name for name, value in values if not isinstance(value, int | float)})


def _attributes(person: Mapping[str, Any]) -> dict[str, Any]:
    found = person.get("attributes")
    return found if isinstance(found, dict) else {}


def name_classes(document: Document, path: Path, attribute: str) -> Document:
    """The document with the values of an attribute as categories ("": the categories it has, or
    else the only attribute). Raises UserError where that does not say which.
    """
    names = attribute_names(document)
    people = document["annotations"]
    if not attribute:
        if not people or any("category_id" in one for one in people) or not names:
            return document
        if len(names) > 1:
            remedy = "choose one with --label-attribute or config.data.label_attribute"
            raise UserError(f"{path}: people have the attributes {', '.join(names)}; {remedy}")
        attribute = names[0]
    if attribute not in names:
        there = f"there are {', '.join(names[:_SHOWN])}" if names else "none has any"
        raise UserError(f"{path}: nobody has the attribute {attribute!r}; {there}")
    labels = [_labels(_attributes(one).get(attribute)) for one in people]
    ids = {
        name: number for number, name in enumerate(sorted({n for one in labels for n in one}), 1)
    }
    named = [
        {**one, "category_id": [ids[name] for name in given] if len(given) != 1 else ids[given[0]]}
        for one, given in zip(people, labels, strict=True)
    ]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {**document, "annotations": named, "categories": categories}


def _labels(value: Any) -> list[str]:
    """Class names: a text (with commas: several), a list, or names with True."""
    if isinstance(value, dict):
        value = [name for name, chosen in value.items() if chosen]
    values = re.split("[,;]", value) if isinstance(value, str) else value or ()
    return list(dict.fromkeys(name for one in values if (name := str(one).strip())))
