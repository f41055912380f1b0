"""Finds the people in photographs and their emotions; draws them and writes predictions.json.

    python -m dsct_jax.predict photo.jpg folder/ 'more/*.png' --checkpoint=runs/demo --output=predictions

The library function is `dsct_jax.predict` (in dsct_jax/subjects.py).
"""

import argparse
import dataclasses
import glob
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from dsct_jax.drawing import contact_sheet, draw_subjects
from dsct_jax.errors import UserError
from dsct_jax.load import load
from dsct_jax.preprocess import decode_image
from dsct_jax.settings import read_config
from dsct_jax.startup import start_process
from dsct_jax.subjects import BATCH_SIZE, Detector, Selection, Subject, predict_each

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what is looked for in folders
SHEET_IMAGES = 24  # at most that many go on the contact sheet
_SECONDS_BETWEEN_LINES = 5.0


def find_images(paths: Sequence[str], *, leave_out: Path) -> list[Path]:
    """The image files meant by files, folders (searched to the bottom) and glob patterns, each once, in a fixed order; none below `leave_out`.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a folder holds no image; the line names it.
    """
    found: dict[Path, None] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
            files = [file for file in files if leave_out.resolve() not in file.resolve().parents]
            if not files:
                raise UserError(f"{path}: the folder holds no image ({', '.join(SUFFIXES)})")
        elif path.exists():
            files = [path]
        elif glob.has_magic(text):
            files = [Path(match) for match in sorted(glob.glob(text, recursive=True)) if Path(match).is_file()]
            if not files:
                raise UserError(f"{text}: the pattern matches no file")
        else:
            raise UserError(f"{path}: no such file or folder")
        found |= dict.fromkeys(files)
    return list(found)


def read_photograph(path: Path) -> Image.Image:
    """The RGB image in a file, upright: its EXIF orientation is applied, as every viewer does. Raises UserError for a file that is no image."""
    return ImageOps.exif_transpose(decode_image(path))


def predict_files(
    model: Detector, files: Sequence[Path], output: Path, *, selection: Selection, batch_size: int, skip_unreadable: bool
) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """Draws every image into output/drawn, and returns what predictions.json says of each, and the files left out with the reason.

    Raises:
        UserError: a file is no image and `skip_unreadable` is off.
    """
    entries: dict[Path, dict[str, Any]] = {}
    unreadable: dict[Path, str] = {}
    read: list[Path] = []

    def photographs() -> Iterator[Image.Image]:
        for file in files:
            try:
                image = read_photograph(file)
            except UserError as error:
                if not skip_unreadable:
                    raise
                unreadable[file] = str(error)
                continue
            read.append(file)
            yield image

    names = drawing_names(files)
    progress = Progress(len(files))
    for index, image, subjects in predict_each(model, photographs(), selection=selection, batch_size=batch_size):
        file = read[index]
        target = output / "drawn" / names[file]
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_subjects(image, subjects).save(target)
        entries[file] = describe(file, image, subjects, drawn=target.relative_to(output))
        progress.advance(len(entries) + len(unreadable))
    progress.close()
    return {file: entries[file] for file in files if file in entries}, unreadable


def drawing_names(files: Sequence[Path]) -> dict[Path, Path]:
    """Where each drawing goes: the path below the folder that holds them all, as .png; equal names of another type keep theirs (a.jpg.png)."""
    top = Path(os.path.commonpath([file.resolve().parent for file in files]))
    relative = {file: file.resolve().relative_to(top) for file in files}
    stems = [path.with_suffix("") for path in relative.values()]
    return {file: path.with_suffix(".png") if stems.count(path.with_suffix("")) == 1 else Path(f"{path}.png") for file, path in relative.items()}


def describe(file: Path, image: Image.Image, subjects: Sequence[Subject], *, drawn: Path) -> dict[str, Any]:
    """One image's entry of predictions.json; boxes are (x1, y1, x2, y2) in pixels of the upright image."""
    return {
        "file": str(file),
        "width": image.width,
        "height": image.height,
        "drawn": drawn.as_posix(),
        "subjects": [dataclasses.asdict(subject) for subject in subjects],
    }


class Progress:
    """A bar on a terminal, now and then a plain line elsewhere."""

    def __init__(self, total: int):
        self._total, self._start, self._next_line = total, time.monotonic(), time.monotonic() + _SECONDS_BETWEEN_LINES
        self._bar = tqdm(total=total, unit="image") if sys.stderr.isatty() else None

    def advance(self, done: int) -> None:
        """`done` images are finished."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif now >= self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            print(f"{done}/{self._total} images, {done / (now - self._start):.1f} images/s", flush=True)

    def close(self) -> None:
        """Leaves the terminal in order."""
        if self._bar is not None:
            self._bar.close()


def run(arguments: argparse.Namespace) -> None:
    """The command with its arguments parsed. Raises UserError for what cannot be used."""
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file; name a folder")
    selection = Selection(threshold=arguments.threshold, min_score=arguments.min_score, nms=arguments.nms)
    files = find_images(arguments.paths, leave_out=output)
    config = None if arguments.config is None else read_config(Path(arguments.config))
    start = time.monotonic()
    model = load(arguments.checkpoint, config)
    print(f"{arguments.checkpoint}: loaded in {time.monotonic() - start:.1f} s; {len(files)} images to look at", flush=True)
    start = time.monotonic()
    entries, unreadable = predict_files(
        model, files, output, selection=selection, batch_size=arguments.batch_size, skip_unreadable=arguments.skip_unreadable
    )
    seconds = time.monotonic() - start
    for reason in unreadable.values():
        print(f"left out: {reason}")
    if not entries:
        raise UserError(f"none of the {len(files)} files could be read as an image")
    document = {
        "checkpoint": str(arguments.checkpoint),
        "class_names": list(model.class_names),
        "multi_label": model.multi_label,
        "selection": dataclasses.asdict(selection),
        "images": list(entries.values()),
        "unreadable": list(unreadable.values()),
    }
    temporary = output / "predictions.json.tmp"
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(output / "predictions.json")
    shown = list(entries.values())[:SHEET_IMAGES]
    pictures = [Image.open(output / entry["drawn"]) for entry in shown]
    contact_sheet(pictures, 4, captions=[Path(entry["file"]).name for entry in shown]).save(output / "contact_sheet.png")
    people = sum(len(entry["subjects"]) for entry in entries.values())
    print(f"{len(entries)} images, {people} people in {seconds:.1f} s ({len(entries) / seconds:.1f} images/s, compilation included)")
    print(f"drawings: {output / 'drawn'}   overview: {output / 'contact_sheet.png'}   numbers: {output / 'predictions.json'}")


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m dsct_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, folder of images, or quoted glob pattern")
    parser.add_argument("--checkpoint", required=True, help="run directory, .safetensors file, or released .pth (with --config)")
    parser.add_argument("--output", required=True, help="folder for predictions.json, contact_sheet.png and drawn/")
    parser.add_argument("--config", help="configuration (.py or .json) that describes the weights; needed for .pth only")
    parser.add_argument("--threshold", type=float, default=Selection.threshold, help="multi-label: probability that makes a class a label")
    parser.add_argument("--min-score", type=float, default=Selection.min_score, help="score below which a query is nobody")
    parser.add_argument("--nms", type=float, default=Selection.nms, help="overlap (IoU) above which two boxes are the same person; 1 = keep all")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="images a call of the model")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out and list files that are no images, instead of stopping")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a user's mistake is one line on stderr and exit status 2."""
    try:
        run(make_parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    start_process()
    sys.exit(main())
