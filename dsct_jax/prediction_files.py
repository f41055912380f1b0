"""Which files a prediction looks at, and what it writes of them: predictions.json, predictions.csv, and the names of the drawings."""

import csv
import dataclasses
import glob
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsct_jax import video
from dsct_jax.errors import UserError
from dsct_jax.subjects import Subject

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # of images, looked for in folders


def find_inputs(paths: Sequence[str], *, leave_out: Path) -> tuple[list[Path], list[Path]]:
    """(images, videos) meant by files, folders (searched to the bottom) and glob patterns, each once, in a fixed order; none below `leave_out`.

    A file is a video by its suffix (`video.SUFFIXES`), and an image by any other.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a folder holds neither images nor videos; the line names it.
    """
    found: dict[Path, None] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            known = (*SUFFIXES, *video.SUFFIXES)
            files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in known and file.is_file()]
            files = [file for file in files if leave_out.resolve() not in file.resolve().parents]
            if not files:
                raise UserError(f"{path}: the folder holds no image or video ({', '.join(known)})")
        elif path.exists():
            files = [path]
        elif glob.has_magic(text):
            files = [Path(match) for match in sorted(glob.glob(text, recursive=True)) if Path(match).is_file()]
            if not files:
                raise UserError(f"{text}: the pattern matches no file")
        else:
            raise UserError(f"{path}: no such file or folder")
        found |= dict.fromkeys(files)
    videos = [file for file in found if file.suffix.lower() in video.SUFFIXES]
    return [file for file in found if file not in videos], videos


def drawing_names(files: Sequence[Path], suffix: str) -> dict[Path, Path]:
    """Where each drawing goes: the path below the folder that holds them all, with `suffix`; equal names of another type keep theirs (a.jpg.png)."""
    if not files:
        return {}
    top = Path(os.path.commonpath([file.resolve().parent for file in files]))
    relative = {file: file.resolve().relative_to(top) for file in files}
    stems = [path.with_suffix("") for path in relative.values()]
    return {file: path.with_suffix(suffix) if stems.count(path.with_suffix("")) == 1 else Path(f"{path}{suffix}") for file, path in relative.items()}


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def write_csv(path: Path, class_names: Sequence[str], rows: Iterable[tuple[str, int | None, dict[str, Any]]]) -> None:
    """One line a person of (file, frame, entry of the person in predictions.json); frame is empty for images. Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "frame", "x1", "y1", "x2", "y2", "score", "certainty", "labels", *class_names])
        for name, frame, subject in rows:
            numbers = [f"{number:.6g}" for number in (*subject["box"], subject["score"], subject["certainty"])]
            probabilities = [f"{subject['scores'][class_name]:.6g}" for class_name in class_names]
            writer.writerow([name, "" if frame is None else frame, *numbers, "; ".join(subject["labels"]), *probabilities])
    temporary.replace(path)


def describe(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """The people of one picture as predictions.json says them; boxes are (x1, y1, x2, y2) in pixels of the upright picture."""
    return [dataclasses.asdict(subject) for subject in subjects]
