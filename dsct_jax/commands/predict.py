"""Finds the people in images and videos, and their emotions; draws them and writes predictions.json
and predictions.csv."""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from dsct_jax.batch import Predictions
from dsct_jax.cli import progress, whole_file
from dsct_jax.commands.flags import finder_of, load_model, selection
from dsct_jax.commands.frames import FOLDER, Frames, write_document
from dsct_jax.commands.inputs import DRAWN, drawing_names, find_inputs
from dsct_jax.commands.unfinished import Unfinished
from dsct_jax.errors import UserError
from dsct_jax.inference.finders import Finder
from dsct_jax.inference.predict import Detector, predict_each, read_rgb
from dsct_jax.inference.video import Video, opencv, video_writer
from dsct_jax.postprocess import Selection, Subject
from dsct_jax.visualization.attention import draw_attention
from dsct_jax.visualization.drawing import contact_sheet, draw_subjects, sort_left_to_right
from dsct_jax.weights.hub import local_path
from dsct_jax.weights.run_directory import DIRECTORY

INTERRUPTED = "interrupted; the same command goes on where it stopped"
SHEET_IMAGES = 24  # at most that many go on the contact sheet


class TimedDetector:
    """A model that keeps how long each call took; the first of a shape is its compilation."""

    def __init__(self, model: Detector):
        self._model, self.preprocessing, self.decoder = model, model.preprocessing, model.decoder
        self.crops = getattr(model, "crops", None)
        self._seconds: dict[tuple[int, ...], list[float]] = {}
        self.calls = 0

    def __call__(self, images: Any, padding_mask: Any, **options: Any) -> Predictions:
        self.calls += 1
        start = time.perf_counter()
        answer = jax.block_until_ready(self._model(images, padding_mask, **options))
        self._seconds.setdefault(np.shape(images), []).append(time.perf_counter() - start)
        return answer

    def report(self) -> str:
        """One line: median and 95th percentile of the calls that did not compile."""
        calls = [seconds for times in self._seconds.values() for seconds in times[1:]]
        first = sum(times[0] for times in self._seconds.values())
        compiled = f"{len(self._seconds)} shape(s) compiled and run once in {first:.1f} s"
        if not calls:
            return f"latency: every call was the first of its shape; {compiled}"
        batch = max(shape[0] for shape in self._seconds)
        images = sum(shape[0] * (len(times) - 1) for shape, times in self._seconds.items())
        median, high = 1000 * np.quantile(calls, [0.5, 0.95])
        return (
            f"latency of the model: {median:.1f} ms per batch of {batch} (median; 95 % below "
            f"{high:.1f} ms), {images / sum(calls):.1f} images/s; {compiled}"
        )


@dataclasses.dataclass(frozen=True)
class Answers:
    """A model and how it is asked; `unreadable` collects file -> reason, None: an error."""

    model: TimedDetector
    selection: Selection
    batch_size: int
    unreadable: dict[Path, str] | None
    unfinished: Unfinished
    finder: Finder | None = None  # of the people, for a two-stage network
    follow: bool = False  # whether people of videos get numbers

    def people(
        self,
        images: Iterable[Image.Image],
        *,
        names: Sequence[Path] = (),
        batch_size: int | None = None,
        selection: Selection | None = None,
    ) -> Iterator[tuple[int, Image.Image, list[Subject]]]:
        """`names` are the files of the images as far as they are read; none of a video."""
        size, finder = batch_size or self.batch_size, self.finder

        def find(image: Image.Image, index: int) -> Any:
            assert finder is not None
            return finder(image, str(names[index]) if names else "a video")

        how: dict[str, Any] = {"selection": selection or self.selection, "batch_size": size}
        return predict_each(self.model, images, find=find if finder else None, **how)

    def skip(self, file: Path | int, error: UserError) -> None:
        """Notes a file that cannot be read; raises the error where that is not allowed."""
        if self.unreadable is None or isinstance(file, int):
            raise error
        self.unreadable[file] = str(error)


def predict_images(
    answers: Answers, files: Sequence[Path], output: Path, *, max_megapixels: float
) -> list[dict[str, Any]]:
    """Draws every image into output/drawn; returns the entries of predictions.json, in order."""
    read: list[Path] = []
    names = drawing_names(files, ".png")
    entries = answers.unfinished.done(names)
    if entries:
        print(f"{len(entries)} of {len(files)} images were done before", flush=True)

    def images() -> Iterator[Image.Image]:
        for file in progress(files, total=len(files)):
            if file in entries:
                continue
            try:
                image = read_rgb(file, max_megapixels=max_megapixels)
            except UserError as error:
                answers.skip(file, error)
            else:
                read.append(file)
                yield image

    batch: list[dict[str, Any]] = []
    calls = 0
    for index, image, subjects in answers.people(images(), names=read):
        if answers.model.calls > calls:
            answers.unfinished.add(batch)
            batch, calls = [], answers.model.calls
        target = output / DRAWN / names[read[index]]
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_subjects(image, subjects).save(target)
        if answers.model.crops and (maps := draw_attention(image, subjects, answers.model.crops)):
            contact_sheet(maps, 4).save(target.with_name(f"{target.stem}_attention.png"))
        entries[read[index]] = entry = {
            "file": str(read[index]),
            "width": image.width,
            "height": image.height,
            "drawn": target.relative_to(output).as_posix(),
            "subjects": [dataclasses.asdict(subject) for subject in subjects],
        }
        batch.append(entry)
    answers.unfinished.add(batch)
    return [entries[file] for file in files if file in entries]


def predict_videos(
    answers: Answers, sources: Sequence[Path | int], output: Path, **limits: Any
) -> list[dict[str, Any]]:
    """Draws every N-th frame of videos (paths) and cameras (numbers) into output/drawn; returns
    their entries of predictions.json. After `seconds`, or Ctrl-C, a video ends but loses nothing.
    """
    names = drawing_names([source for source in sources if isinstance(source, Path)], ".mp4")
    done = answers.unfinished.done(names)
    entries = []
    for source in sources:
        name = f"camera{source}.mp4" if isinstance(source, int) else names[source]
        target, frames = output / DRAWN / name, Path(FOLDER, f"{name}.jsonl")
        if source in done and (output / frames).is_file():
            entries.append(done[source] | {"frames": Frames(output / frames)})
            continue
        try:
            with Video(source) as video:
                number = video.frames or "unknown number of"
                print(f"{video.name}: {number} frames, {video.rate:.4g} frames/s", flush=True)
                found = Frames(output / frames, fresh=True)
                entry = _predict_video(answers, video, target, found, **limits)
        except UserError as error:
            answers.skip(source, error)
        else:
            entry |= {"drawn": target.relative_to(output).as_posix()}
            answers.unfinished.add([entry])
            entries.append(entry | {"frames": found})
    return entries


def _predict_video(
    answers: Answers,
    video: Video,
    target: Path,
    frames: Frames,
    *,
    every: int,
    seconds: float | None,
) -> dict[str, Any]:
    """The video's entry without its frames, which go to `frames`."""
    size = (0, 0)
    total = None if video.frames is None else -(-video.frames // every)
    pictures = progress(_limit_duration(video, every, seconds), total=total, unit="frame")
    tracker, chosen = _tracker(answers) if answers.follow else (None, None)
    try:
        with (
            video_writer(target, video.rate / every) as add,
            frames.path.open("a", encoding="utf-8") as file,
        ):
            how: dict[str, Any] = {"batch_size": 1 if video.live else None, "selection": chosen}
            for index, image, subjects in answers.people(pictures, **how):
                size, frame = image.size, index * every
                if tracker is not None:
                    tracker.cut_at(image)
                    subjects = tracker.update(subjects, frame / video.rate)
                add(draw_subjects(image, sort_left_to_right(subjects)))
                entry = {"frame": frame, "seconds": round(frame / video.rate, 3)}
                people = [dataclasses.asdict(subject) for subject in subjects]
                file.write(json.dumps(entry | {"subjects": people}) + "\n")
    except KeyboardInterrupt:
        if size == (0, 0):
            raise
    if tracker is not None:
        frames.number(tracker.numbers)
    about = {"file": video.name, "width": size[0], "height": size[1]}
    return {**about, "frames_per_second": video.rate, "every": every}


def _tracker(answers: Answers) -> tuple[Any, Selection]:
    """A tracker, and the selection that also lets through those who may only go on."""
    from dsct_jax.inference.tracking import DOUBTFUL, Tracker  # scipy.optimize, with --follow only

    certain = answers.model.decoder.resolve_min_confidence(answers.selection)
    lowest = min(DOUBTFUL, certain)
    return Tracker(certain), dataclasses.replace(answers.selection, min_confidence=lowest)


def _limit_duration(video: Video, every: int, seconds: float | None) -> Iterator[Image.Image]:
    """Every N-th frame of the first `seconds`: a file's by its frame rate, a camera's by clock."""
    start = time.monotonic()
    for index, picture in enumerate(itertools.islice(video, 0, None, every)):
        passed = time.monotonic() - start if video.live else index * every / video.rate
        if seconds is not None and passed >= seconds:
            return
        yield picture


def _rows(document: Mapping[str, Any]) -> Iterator[tuple[str, int | str, dict[str, Any]]]:
    """(file, frame, "" for images, the person) for every person of predictions.json."""
    for entry in (*document["images"], *document["videos"]):
        for frame in entry.get("frames", [entry]):
            for subject in frame["subjects"]:
                yield entry["file"], frame.get("frame", ""), subject


def write_csv(path: Path, class_names: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """One line per person; returns how many they are."""
    count = 0
    numbers = ("x1", "y1", "x2", "y2", "paper_score", "confidence")
    with whole_file(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "frame", *numbers, "labels", *class_names])
        for name, frame, subject in rows:
            scores = [*subject["box"], subject["paper_score"], subject["confidence"]]
            probabilities = [subject["probabilities"][class_name] for class_name in class_names]
            first, last = ([f"{x:.6g}" for x in part] for part in (scores, probabilities))
            writer.writerow([name, frame, *first, "; ".join(subject["labels"]), *last])
            count += 1
    return count


def run(arguments: argparse.Namespace) -> None:
    output, chosen = arguments.output, selection(arguments)
    _check(arguments)
    files, films = find_inputs(arguments.paths, exclude=output)
    sources: list[Path | int] = [*films, *([] if arguments.camera is None else [arguments.camera])]
    if sources:
        opencv()
    start = time.monotonic()
    model, work = TimedDetector(load_model(arguments)), f"{len(files)} images and {len(sources)}"
    loaded = f"{arguments.checkpoint}: loaded in {time.monotonic() - start:.1f} s"
    print(f"{loaded}; {work} videos to look at", flush=True)
    start = time.monotonic()
    decoder = model.decoder
    finder = finder_of(arguments)
    cut = {"min_confidence": decoder.resolve_min_confidence(chosen)}
    about: dict[str, Any] = {
        "checkpoint": str(arguments.checkpoint),
        "class_names": decoder.class_names,
        "multi_label": decoder.multi_label,
        "boxes": arguments.boxes,
        "selection": dataclasses.asdict(chosen) | cut,
        "thresholds": decoder.resolve_thresholds(chosen),
    }
    limits = {"every": arguments.every, "seconds": arguments.seconds}
    about |= {"follow": True} if arguments.follow else {}
    weights = {"batch_size": arguments.batch_size, "weights": weights_state(arguments.checkpoint)}
    try:
        with Unfinished(output, about | limits | weights) as unfinished:
            unreadable: dict[Path, str] | None = {} if arguments.skip_unreadable else None
            answers = Answers(
                *(model, chosen, arguments.batch_size, unreadable, unfinished, finder),
                follow=arguments.follow,
            )
            images = predict_images(answers, files, output, max_megapixels=arguments.max_megapixels)
            videos = predict_videos(answers, sources, output, **limits)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(INTERRUPTED) from None
    found = {"images": images, "videos": videos, "unreadable": [*(unreadable or {}).values()]}
    document = about | found
    for reason in document["unreadable"]:
        print(f"left out: {reason}")
    if not images and not videos:
        number = len(files) + len(sources)
        raise UserError(f"none of the {number} files could be read as an image or video")
    seconds = time.monotonic() - start
    _write(document, output, seconds, fitted=decoder.min_confidence is not None)
    if arguments.follow:
        from dsct_jax.commands.timeline import write_timelines

        paths = write_timelines(videos, decoder.class_names, output)
        print(f"timelines: {'   '.join(map(str, paths))}")
    unfinished.finish()
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    print(model.report())


def weights_state(path: Path) -> list[Any]:
    """Other than before when other weights lie there."""
    path = local_path(path)
    files = [path] if path.is_file() else sorted((path / DIRECTORY).glob("*"))
    return [[file.name, file.stat().st_mtime_ns] for file in files]


def _write(document: Mapping[str, Any], output: Path, seconds: float, *, fitted: bool) -> None:
    """predictions.json, predictions.csv and contact_sheet.png, and what to know about them."""
    images, videos = document["images"], document["videos"]
    numbers, table = output / "predictions.json", output / "predictions.csv"
    write_document(numbers, document)
    people = write_csv(table, document["class_names"], _rows(document))
    if shown := images[:SHEET_IMAGES]:
        drawn = [output / entry["drawn"] for entry in shown]
        pictures = [read_rgb(path, max_megapixels=math.inf) for path in drawn]
        captions = [Path(entry["file"]).name for entry in shown]
        contact_sheet(pictures, 4, captions=captions).save(output / "contact_sheet.png")
        print(f"overview: {output / 'contact_sheet.png'}")
    frames = sum(len(entry["frames"]) for entry in videos)
    watched = f", {frames} frames of {len(videos)} videos" if videos else ""
    print(
        f"{len(images)} images{watched}, {people} people in {seconds:.1f} s "
        f"({(len(images) + frames) / seconds:.1f} images/s, with reading, drawing and compilation)"
    )
    if not people:
        cut = document["selection"]["min_confidence"]
        remedy = "" if fitted else "; train.py --mode=eval --split=val fits it"
        lower = f"a lower --min-confidence shows what there was{remedy}"
        print(f"no person detected above confidence {cut:.3g}; {lower}")
    print(f"drawings: {output / 'drawn'}   numbers: {numbers}, {table}")


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.paths and arguments.camera is None:
        remedy = "name images, folders, patterns or videos, or give --camera=0"
        raise UserError(f"nothing to look at: {remedy}")
    if arguments.every < 1:
        raise UserError(f"--every={arguments.every} must be at least 1")
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise UserError(f"--seconds={arguments.seconds} must be more than 0")
