"""Annotated people, for figures that show them beside the predicted ones."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsct_jax.errors import UserError
from dsct_jax.postprocess import Subject

GroundTruth = dict[str, list[Subject]]  # file name -> annotated people


def read_ground_truth(path: Path, class_names: Sequence[str]) -> GroundTruth:
    """Annotated people by file name, from a COCO-style file: bbox [x y w h] in pixels, category_id
    a number or a list of them. Numbers are named by `categories`; without, they count the classes.

    Raises:
        UserError: the file is missing, damaged, or names a class that the model does not have.
    """
    if not path.is_file():
        raise UserError(f"--ground-truth={path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        label_of = _class_of_category(content.get("categories") or [], class_names)
        names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        truth: GroundTruth = {name: [] for name in names.values()}
        for person in content["annotations"]:
            x, y, w, h = map(float, person["bbox"])
            ids = person["category_id"]
            labels = tuple(map(label_of, ids if isinstance(ids, list) else [ids]))
            truth[names[person["image_id"]]].append(
                Subject(box=(x, y, x + w, y + h), probabilities={}, labels=labels, paper_score=1.0)
            )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"not COCO-style annotations for {len(class_names)} classes"
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--ground-truth={path}: {what} ({reason})") from None
    return truth


def _class_of_category(categories: list[Any], class_names: Sequence[str]) -> Callable[[Any], str]:
    """category id -> class, by name as the reader of the data does it: capitals, blanks and slashes
    do not matter.
    """
    if not categories:
        return dict(enumerate(class_names)).__getitem__
    known = {_loosely(name): name for name in class_names}
    names = {category["id"]: known.get(_loosely(category["name"])) for category in categories}
    return {number: name for number, name in names.items() if name}.__getitem__


def _loosely(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
