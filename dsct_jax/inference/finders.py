"""Where the people of a two-stage network come from: `faces`, another run, or a json of boxes."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsct_jax.config import FACES, expanded_path
from dsct_jax.errors import UserError
from dsct_jax.faces import haar
from dsct_jax.inference.load import load
from dsct_jax.inference.predict import predict

# (image, name of its file) -> [n 4], (x1, y1, x2, y2) in pixels
Finder = Callable[[Image.Image, str], Any]


def make_finder(source: str) -> Finder:
    """The finder that --boxes names: `faces` (OpenCV's cascade, of the video extra); a json, the
    predictions.json of `dsct predict` or {file: [[x1, y1, x2, y2], ...]}; otherwise a model of ours
    that finds people. Raises UserError.
    """
    if source == FACES:
        detect = haar()
        return lambda image, _: detect(np.asarray(image))[:, :4]
    path = expanded_path(source)
    if path.suffix == ".json":
        return _listed(path)
    model = load(path)
    if model.crops is not None:
        raise UserError(f"--boxes={source}: a two-stage network finds nobody; name another run")
    # as an array, which has no orientation left to apply
    return lambda image, _: [person.box for person in predict(model, np.asarray(image))]


def _listed(path: Path) -> Finder:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "images" in document:
            boxes = {
                str(entry["file"]): [person["box"] for person in entry["subjects"]]
                for entry in document["images"]
            }
        else:
            boxes = dict(document)
        arrays = {name: np.array(rows, np.float32).reshape(-1, 4) for name, rows in boxes.items()}
    except OSError as error:
        raise UserError(f"--boxes={path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        wanted = "the predictions.json of dsct predict or {file: [[x1, y1, x2, y2], ...]}"
        raise UserError(f"--boxes={path}: is neither {wanted} ({error})") from None
    count = Counter(Path(name).name for name in arrays)
    short = {Path(name).name: rows for name, rows in arrays.items() if count[Path(name).name] == 1}

    def find(_: Image.Image, name: str) -> np.ndarray:
        rows = arrays.get(name, short.get(Path(name).name))
        if rows is None:
            raise UserError(f"--boxes={path}: has no entry for {name}")
        return rows

    return find
