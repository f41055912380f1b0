"""Finds the people in images and videos, and their emotions; draws them and writes predictions.json
and predictions.csv.

    python -m dsct_jax predict photo.jpg folder/ 'more/*.png' film.mp4 --checkpoint=runs/demo --output=predictions
    python -m dsct_jax predict --camera=0 --seconds=30 --checkpoint=runs/demo --output=predictions

Nothing but the pictures is needed: the model finds the people itself. The library function is
    `dsct_jax.predict` (in dsct_jax/inference/predict.py).
"""

import argparse
import csv
import dataclasses
import glob
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from dsct_jax.batch import Predictions
from dsct_jax.cli import Parser, run_command
from dsct_jax.config import read_config
from dsct_jax.errors import UserError
from dsct_jax.inference import video
from dsct_jax.inference.load import load
from dsct_jax.inference.predict import BATCH_SIZE, Detector, predict_each
from dsct_jax.inference.video import Video, opencv, video_writer
from dsct_jax.postprocess import Selection, Subject
from dsct_jax.preprocess import decode_image
from dsct_jax.visualization.drawing import contact_sheet, draw_subjects, sort_left_to_right

SHEET_IMAGES = 24  # at most that many go on the contact sheet
_SECONDS_BETWEEN_LINES = 5.0


class TimedDetector:
    """A model that also keeps how long each call took, and of what shape it was: the first of a
    shape is its compilation.
    """

    def __init__(self, model: Detector):
        self._model = model
        self.decoder, self.preprocessing = model.decoder, model.preprocessing
        self._seconds: dict[tuple[int, ...], list[float]] = {}

    def __call__(self, images: Any, padding_mask: Any) -> Predictions:
        """The model's answer, waited for."""
        start = time.perf_counter()
        answer = jax.block_until_ready(self._model(images, padding_mask))
        self._seconds.setdefault(np.shape(images), []).append(time.perf_counter() - start)
        return answer

    def report(self) -> str:
        """One line: the median latency of a call and the 95th percentile, without the calls that
        compiled.
        """
        calls = [seconds for shape in self._seconds.values() for seconds in shape[1:]]
        first = sum(shape[0] for shape in self._seconds.values())
        compiled = f"{len(self._seconds)} shape(s) compiled and run once in {first:.1f} s"
        if not calls:
            return f"latency: every call was the first of its shape; {compiled}"
        batch = max(shape[0] for shape in self._seconds)
        images = sum(shape[0] * (len(seconds) - 1) for shape, seconds in self._seconds.items())
        median, high = 1000 * np.quantile(calls, [0.5, 0.95])
        speed = f"{images / sum(calls):.1f} images/s"
        return f"latency of the model: {median:.1f} ms a batch of {batch} (median; 95 % below {high:.1f} ms), {speed}; {compiled}"


def read_image(path: Path) -> Image.Image:
    """The RGB image in a file, upright: its EXIF orientation is applied, as every viewer does.
    Raises UserError for a file that is no image.
    """
    return decode_image(path, upright=True)


def predict_files(
    model: Detector,
    files: Sequence[Path],
    output: Path,
    *,
    selection: Selection,
    batch_size: int,
    skip_unreadable: bool,
) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """Draws every image into output/drawn, and returns what predictions.json says of each, and the
    files left out with the reason.

    Raises:
        UserError: a file is no image and `skip_unreadable` is off.
    """
    entries: dict[Path, dict[str, Any]] = {}
    unreadable: dict[Path, str] = {}
    read: list[Path] = []

    def images() -> Iterator[Image.Image]:
        for file in files:
            try:
                image = read_image(file)
            except UserError as error:
                if not skip_unreadable:
                    raise
                unreadable[file] = str(error)
                continue
            read.append(file)
            yield image

    names = drawing_names(files, ".png")
    progress = Progress(len(files), "image")
    for index, image, subjects in predict_each(
        model, images(), selection=selection, batch_size=batch_size
    ):
        file = read[index]
        target = output / "drawn" / names[file]
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_subjects(image, subjects).save(target)
        drawn = target.relative_to(output).as_posix()
        entries[file] = {
            "file": str(file),
            "width": image.width,
            "height": image.height,
            "drawn": drawn,
            "subjects": describe(subjects),
        }
        progress.advance(len(entries) + len(unreadable))
    progress.close()
    return {file: entries[file] for file in files if file in entries}, unreadable


def predict_video(
    model: Detector,
    video: Video,
    target: Path,
    *,
    selection: Selection,
    batch_size: int,
    every: int = 1,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Draws the frames of a video or camera into the video file `target`, and returns what
    predictions.json says of them.

    Args:
        every: only each so many-th frame is looked at and drawn.
        seconds: how long a camera is watched, or how much of a file; None = to the end, or to
            Ctrl-C, which ends the video but loses nothing.
    """
    frames: list[dict[str, Any]] = []
    size = (0, 0)
    total = None if video.frames is None else -(-video.frames // every)
    progress = Progress(total, "frame")
    try:
        with video_writer(target, video.rate / every) as writer:
            pictures = _limit_duration(
                itertools.islice(video, 0, None, every), video, every, seconds
            )
            for index, image, subjects in predict_each(
                model, pictures, selection=selection, batch_size=batch_size
            ):
                size = image.size
                writer.add(draw_subjects(image, sort_left_to_right(subjects)))
                frames.append(
                    {
                        "frame": index * every,
                        "seconds": round(index * every / video.rate, 3),
                        "subjects": describe(subjects),
                    }
                )
                progress.advance(len(frames))
    except KeyboardInterrupt:
        if not frames:
            raise
    progress.close()
    return {
        "file": video.name,
        "width": size[0],
        "height": size[1],
        "frames_per_second": video.rate,
        "every": every,
        "frames": frames,
    }


def _limit_duration(
    pictures: Iterable[Image.Image], video: Video, every: int, seconds: float | None
) -> Iterator[Image.Image]:
    """A file's first `seconds` by its frame rate; a camera's by the clock."""
    start = time.monotonic()
    for index, picture in enumerate(pictures):
        passed = time.monotonic() - start if video.live else index * every / video.rate
        if seconds is not None and passed >= seconds:
            return
        yield picture


class Progress:
    """A bar on a terminal, now and then a plain line elsewhere; `total` None = no end is known."""

    def __init__(self, total: int | None, unit: str):
        self._total, self._unit, self._start = total, unit, time.monotonic()
        self._next_line = self._start + _SECONDS_BETWEEN_LINES
        self._bar = tqdm(total=total, unit=unit) if sys.stderr.isatty() else None

    def advance(self, done: int) -> None:
        """`done` pictures are finished."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif now >= self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            of = "" if self._total is None else f"/{self._total}"
            print(
                f"{done}{of} {self._unit}s, {done / (now - self._start):.1f} {self._unit}s/s",
                flush=True,
            )

    def close(self) -> None:
        """Leaves the terminal in order."""
        if self._bar is not None:
            self._bar.close()


def run(arguments: argparse.Namespace) -> None:
    """The command with its arguments parsed. Raises UserError for what cannot be used."""
    output = Path(arguments.output)
    selection = Selection(
        threshold=arguments.threshold, min_confidence=arguments.min_confidence, nms=arguments.nms
    )
    _check(arguments, output)
    files, videos = find_inputs(arguments.paths, exclude=output)
    sources: list[Path | int] = [*videos, *([] if arguments.camera is None else [arguments.camera])]
    if sources:
        opencv()
    config = None if arguments.config is None else read_config(Path(arguments.config))
    start = time.monotonic()
    model = TimedDetector(load(arguments.checkpoint, config))
    decoder = model.decoder
    print(
        f"{arguments.checkpoint}: loaded in {time.monotonic() - start:.1f} s; {len(files)} images "
        f"and {len(sources)} videos to look at",
        flush=True,
    )
    start = time.monotonic()
    options: dict[str, Any] = {"selection": selection, "batch_size": arguments.batch_size}
    entries, unreadable = predict_files(
        model, files, output, skip_unreadable=arguments.skip_unreadable, **options
    )
    watched = _predict_videos(model, sources, videos, output, arguments, options, unreadable)
    seconds = time.monotonic() - start
    for reason in unreadable.values():
        print(f"left out: {reason}")
    if not entries and not watched:
        raise UserError(
            f"none of the {len(files) + len(sources)} files could be read as an image or video"
        )
    document = {
        "checkpoint": str(arguments.checkpoint),
        "class_names": list(decoder.class_names),
        "multi_label": decoder.multi_label,
        "selection": dataclasses.asdict(selection)
        | {"min_confidence": decoder.resolve_min_confidence(selection)},
        "thresholds": decoder.resolve_thresholds(selection),
        "images": list(entries.values()),
        "videos": watched,
        "unreadable": list(unreadable.values()),
    }
    write_json(output / "predictions.json", document)
    rows = [*_rows(entries.values(), watched)]
    write_csv(output / "predictions.csv", decoder.class_names, rows)
    if entries:
        _draw_sheet(list(entries.values()), output)
    pictures = len(entries) + sum(len(entry["frames"]) for entry in watched)
    counted = f"{len(entries)} images" + (
        f", {pictures - len(entries)} frames of {len(watched)} videos" if watched else ""
    )
    print(
        f"{counted}, {len(rows)} people in {seconds:.1f} s ({pictures / seconds:.1f} images/s, "
        "with reading, drawing and compilation)"
    )
    if not rows:
        print(
            _no_people_hint(
                decoder.resolve_min_confidence(selection),
                fitted=decoder.min_confidence is not None,
            )
        )
    print(model.report())
    print(
        f"drawings: {output / 'drawn'}   numbers: {output / 'predictions.json'}, "
        f"{output / 'predictions.csv'}"
    )


def _no_people_hint(cut: float, *, fitted: bool) -> str:
    remedy = "" if fitted else "; train.py --mode=eval --split=val fits it to the weights"
    return f"nobody was found: no query was as sure as {cut:.3g}. A lower --min-confidence shows what there was{remedy}"


def _check(arguments: argparse.Namespace, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file; name a folder")
    if not arguments.paths and arguments.camera is None:
        raise UserError(
            "nothing to look at: name images, folders, patterns or videos, or give --camera=0"
        )
    if arguments.every < 1:
        raise UserError(f"--every={arguments.every} must be at least 1")
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise UserError(f"--seconds={arguments.seconds} must be more than 0")


def _predict_videos(
    model: Detector,
    sources: Sequence[Path | int],
    videos: Sequence[Path],
    output: Path,
    arguments: argparse.Namespace,
    options: dict[str, Any],
    unreadable: dict[Path, str],
) -> list[dict[str, Any]]:
    """The entries of all videos and of the camera; what is no video is noted in `unreadable` where
    that is allowed.
    """
    names = drawing_names(videos, ".mp4")
    watched = []
    for source in sources:
        target = (
            output
            / "drawn"
            / (Path(f"camera{source}.mp4") if isinstance(source, int) else names[source])
        )
        try:
            with Video(source) as video:
                print(
                    f"{video.name}: {video.frames or 'unknown number of'} frames, "
                    f"{video.rate:.4g} frames/s",
                    flush=True,
                )
                live = {"batch_size": 1} if video.live else {}
                entry = predict_video(
                    model,
                    video,
                    target,
                    every=arguments.every,
                    seconds=arguments.seconds,
                    **(options | live),
                )
        except UserError as error:
            if isinstance(source, int) or not arguments.skip_unreadable:
                raise
            unreadable[source] = str(error)
            continue
        watched.append(entry | {"drawn": target.relative_to(output).as_posix()})
    return watched


def _rows(
    images: Iterable[dict[str, Any]], videos: Iterable[dict[str, Any]]
) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    for entry in images:
        yield from ((entry["file"], None, subject) for subject in entry["subjects"])
    for entry in videos:
        yield from (
            (entry["file"], frame["frame"], subject)
            for frame in entry["frames"]
            for subject in frame["subjects"]
        )


def _draw_sheet(entries: Sequence[dict[str, Any]], output: Path) -> None:
    """contact_sheet.png of the first images."""
    shown = entries[:SHEET_IMAGES]
    pictures = [Image.open(output / entry["drawn"]) for entry in shown]
    contact_sheet(pictures, 4, captions=[Path(entry["file"]).name for entry in shown]).save(
        output / "contact_sheet.png"
    )
    print(f"overview: {output / 'contact_sheet.png'}")


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="python -m dsct_jax predict", description=__doc__)
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="image, video, folder of both, or quoted glob pattern",
    )
    parser.add_argument(
        "--camera",
        type=int,
        help="number of a camera to watch, usually 0; one frame at a time, until --seconds or "
        "Ctrl-C",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="run directory, .safetensors file, or released .pth (with --config)",
    )
    parser.add_argument(
        "--output",
        required=True,
        help="folder for predictions.json, predictions.csv, contact_sheet.png and drawn/",
    )
    parser.add_argument(
        "--config",
        help="configuration (.py or .json) that describes the weights; needed for .pth only",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="multi-label: probability that makes a class a label; default: as fitted on "
        "validation, or 0.5",
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        help="confidence below which a query is nobody; default: as fitted on validation, or 0.3",
    )
    parser.add_argument(
        "--nms",
        type=float,
        default=Selection.nms,
        help="overlap (IoU) above which two boxes are the same person; 1 = keep all",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        help="images a call of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--every", type=int, default=1, help="videos: look at each so many-th frame only"
    )
    parser.add_argument(
        "--seconds", type=float, help="videos and camera: stop after so many seconds"
    )
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out and list files that are no images or videos, instead of stopping",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a user's mistake is one line on stderr and exit status 2."""
    interrupted = "interrupted; nothing was written but the drawings made so far"
    return run_command(lambda: run(make_parser().parse_args(argv)), interrupted=interrupted)


SUFFIXES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)  # of images, looked for in folders


def find_inputs(paths: Sequence[str], *, exclude: Path) -> tuple[list[Path], list[Path]]:
    """(images, videos) meant by files, folders (searched to the bottom) and glob patterns, each
    once, in a fixed order; none below `exclude`.

    A file is a video by its suffix (`video.SUFFIXES`), and an image by any other.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a folder holds neither
            images nor videos; the line names it.
    """
    found: dict[Path, None] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            known = (*SUFFIXES, *video.SUFFIXES)
            files = [
                file
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in known and file.is_file()
            ]
            files = [file for file in files if exclude.resolve() not in file.resolve().parents]
            if not files:
                raise UserError(f"{path}: the folder holds no image or video ({', '.join(known)})")
        elif path.exists():
            files = [path]
        elif glob.has_magic(text):
            files = [
                Path(match)
                for match in sorted(glob.glob(text, recursive=True))
                if Path(match).is_file()
            ]
            if not files:
                raise UserError(f"{text}: the pattern matches no file")
        else:
            raise UserError(f"{path}: no such file or folder")
        found |= dict.fromkeys(files)
    videos = [file for file in found if file.suffix.lower() in video.SUFFIXES]
    return [file for file in found if file not in videos], videos


def drawing_names(files: Sequence[Path], suffix: str) -> dict[Path, Path]:
    """Where each drawing goes: the path below the folder that holds them all, with `suffix`; equal
    names of another type keep theirs (a.jpg.png).
    """
    if not files:
        return {}
    top = Path(os.path.commonpath([file.resolve().parent for file in files]))
    relative = {file: file.resolve().relative_to(top) for file in files}
    stems = [path.with_suffix("") for path in relative.values()]
    return {
        file: path.with_suffix(suffix)
        if stems.count(path.with_suffix("")) == 1
        else Path(f"{path}{suffix}")
        for file, path in relative.items()
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def write_csv(
    path: Path, class_names: Sequence[str], rows: Iterable[tuple[str, int | None, dict[str, Any]]]
) -> None:
    """One line a person of (file, frame, entry of the person in predictions.json); frame is empty
    for images. Whole or not at all.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["file", "frame", "x1", "y1", "x2", "y2", "score", "confidence", "labels", *class_names]
        )
        for name, frame, subject in rows:
            numbers = [
                f"{number:.6g}"
                for number in (*subject["box"], subject["score"], subject["confidence"])
            ]
            probabilities = [f"{subject['scores'][class_name]:.6g}" for class_name in class_names]
            writer.writerow(
                [
                    name,
                    "" if frame is None else frame,
                    *numbers,
                    "; ".join(subject["labels"]),
                    *probabilities,
                ]
            )
    temporary.replace(path)


def describe(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """The people of one picture as predictions.json says them; boxes are (x1, y1, x2, y2) in pixels
    of the upright picture.
    """
    return [dataclasses.asdict(subject) for subject in subjects]
