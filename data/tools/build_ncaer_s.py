"""Makes NCAER-S from the CAER videos: one random frame of each part of a video, its face, and no
video in two splits. docs/datasets.md describes the folders."""

import argparse
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.command import require_at_least
from dsct_jax.cli import progress, whole_file
from dsct_jax.errors import UserError
from dsct_jax.faces import FaceDetector, largest_face, make_detector, opencv

# of the videos -> split
FOLDERS = {"train": "train", "validation": "val", "val": "val", "test": "test"}
SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")
_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result, besides the videos."""

    parts: int
    seed: int
    detector: str


@dataclasses.dataclass(frozen=True)
class Video:
    """One video of the folders."""

    path: Path
    name: str  # below the folder of the videos
    split: str
    label: str
    digest: str


# of the manifest; `frame` is an index in the video, from 0, `image` a path below images/
COLUMNS = (
    *("split", "label", "video", "video_hash", "part", "frame", "image", "image_hash"),
    *("x1", "y1", "x2", "y2"),
)
Row = dict[str, Any]  # column -> value, or its text where it was read from a file


def find_videos(root: Path) -> tuple[list[Video], list[str]]:
    """The videos by split and class, each content once, and a line for each that was skipped.

    Of equal videos that of test stays, then that of val, then the first, so that no split but train
    loses anything to another. Raises UserError when the folder is missing or holds no videos.
    """
    if not root.is_dir():
        raise UserError(f"--videos={root}: no such folder")
    split_of = {
        path: FOLDERS[folder.name.lower()]
        for folder in sorted(root.iterdir())
        if folder.is_dir() and folder.name.lower() in FOLDERS
        for path in sorted(folder.glob("*/*"))
        if path.suffix.lower() in SUFFIXES
    }
    if not split_of:
        files = f"{{train,validation,test}}/<Class>/*.avi ({', '.join(SUFFIXES)})"
        raise UserError(f"--videos={root}: holds no {files}")
    found: dict[str, Video] = {}
    skipped = []
    targets: dict[tuple[str, str, str], Path] = {}
    rank = {"test": 0, "val": 1, "train": 2}
    paths = sorted(split_of, key=lambda path: (rank[split_of[path]], path))
    for path in progress(paths, total=len(paths), what="looking for equal videos", unit="video"):
        name, split, label = path.relative_to(root).as_posix(), split_of[path], path.parent.name
        twin = targets.setdefault((split, label, path.stem), path)
        if twin != path:
            raise UserError(f"{path} and {twin} would give images of the same names: rename one")
        digest = _digest(path)
        first = found.setdefault(digest, Video(path, name, split, label, digest))
        if first.path != path:
            skipped.append(f"{name} is the same video as {first.name}")
    return sorted(found.values(), key=lambda video: video.name), skipped


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def choose_frames(count: int, parts: int, seed: Sequence[int]) -> list[tuple[int, int]]:
    """(part, frame) of one random frame in each of `parts` equal stretches that have a frame."""
    rng = np.random.default_rng(seed)
    bounds = itertools.pairwise(count * part // parts for part in range(parts + 1))
    stretches = [(part, start, end) for part, (start, end) in enumerate(bounds) if end > start]
    return [(part, int(rng.integers(start, end))) for part, start, end in stretches]


def read_frames(
    path: Path, parts: int, seed: Sequence[int]
) -> list[tuple[int, int, UInt8[np.ndarray, "h w 3"]]]:
    """(part, frame, RGB image) of the chosen frames of a video. Videos are read from their
    beginning: seeking is inexact in many formats. Raises UserError for other files.
    """
    cv2 = opencv()
    count = int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))
    while count > 0:
        wanted = {frame: part for part, frame in choose_frames(count, parts, seed)}
        found, read = [], 0
        video = cv2.VideoCapture(str(path))
        while read <= max(wanted) and video.grab():
            if read in wanted:
                decoded, image = video.retrieve()
                if not decoded:
                    break
                found.append((wanted[read], read, np.ascontiguousarray(image[..., ::-1])))
            read += 1
        if len(found) == len(wanted):
            return found
        count = read  # the header promised more than there is
    raise UserError(f"{path}: cannot be read as a video")


def build_video(video: Video, output: Path, settings: Settings, detect: FaceDetector) -> list[Row]:
    """Writes the images and crops of one video and returns their rows. Raises UserError."""
    # of its name, so that other videos change nothing for this one
    name_seed = int.from_bytes(hashlib.sha256(video.name.encode()).digest()[:8], "little")
    rows = []
    for part, frame, pixels in read_frames(video.path, settings.parts, (settings.seed, name_seed)):
        name = f"{video.split}/{video.label}/{video.path.stem}_{part:02}"
        image, crop = output / "images" / f"{name}.jpg", output / "crop" / f"{name}.txt"
        for file in (image, crop):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image, quality=_JPEG_QUALITY)
        box = largest_face(detect(pixels), *pixels.shape[:2]) or (0, 0, 0, 0)
        crop.write_text(",".join(map(str, box)) + "\n", encoding="utf-8")
        source = (video.split, video.label, video.name, video.digest)
        values = (*source, part, frame, f"{name}.jpg", _digest(image), *box)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    opencv().setNumThreads(1)


_detector = functools.cache(make_detector)  # one per worker process


def _work(video: Video, output: Path, settings: Settings) -> list[Row] | str:
    try:
        return build_video(video, output, settings, _detector(settings.detector))
    except UserError as error:
        return str(error)


def build_all(
    videos: Sequence[Video], output: Path, settings: Settings, workers: int
) -> Iterator[list[Row] | str]:
    """The rows of each video as it is done, in any order, or why it cannot be used."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_worker) as pool:
        jobs = [pool.submit(_work, video, output, settings) for video in videos]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def open_build(output: Path, settings: Settings) -> list[Row]:
    """What an interrupted build of these settings has finished. Raises UserError for others."""
    output.mkdir(parents=True, exist_ok=True)
    path, values = output / "settings.json", dataclasses.asdict(settings)
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != values:
        other = f"holds a build of other settings ({path.read_text(encoding='utf-8').strip()})"
        raise UserError(f"--output={output}: {other}; name another folder")
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
    for source in (output / "manifest.part.csv", output / "manifest.csv"):
        if source.exists():
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
            rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
            # of the last video some lines may be lost
            return [row for row in rows if row["video"] != rows[-1]["video"]]
    return []


def _write_rows(file: IO[str], rows: Sequence[Row]) -> None:
    csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
    file.flush()


def write_manifest(rows: Sequence[Row], path: Path) -> None:
    """The manifest of these rows, there in full or not at all."""
    with whole_file(path, newline="") as file:
        _write_rows(file, [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows])


def run(arguments: argparse.Namespace) -> int:
    """Builds the data set; status 1 when a video cannot be read."""
    require_at_least(arguments, 1, "parts", "workers")
    require_at_least(arguments, 0, "seed")
    settings = Settings(arguments.parts, arguments.seed, arguments.detector)
    opencv()
    make_detector(settings.detector)  # a mistake is reported before anything is read
    videos, skipped = find_videos(arguments.videos)
    output: Path = arguments.output
    known = {video.name for video in videos}
    rows = [row for row in open_build(output, settings) if row["video"] in known]
    done = {row["video"] for row in rows}
    rest = [video for video in videos if video.name not in done]
    unfinished, unusable = output / "manifest.part.csv", []
    write_manifest(rows, unfinished)
    results = build_all(rest, output, settings, arguments.workers)
    with unfinished.open("a", newline="", encoding="utf-8") as file:
        for result in progress(results, total=len(rest), what="frames", unit="video"):
            if isinstance(result, str):
                unusable.append(result)
            else:
                _write_rows(file, result)
                rows += result
    rows.sort(key=lambda row: (row["video"], int(row["part"])))
    write_manifest(rows, output / "manifest.csv")
    unfinished.unlink()
    for split in dict.fromkeys(FOLDERS.values()):
        own = [row for row in rows if row["split"] == split]
        faces = sum(int(row["x2"]) > int(row["x1"]) for row in own)
        num_videos = len({row["video"] for row in own})
        print(f"{split}: {num_videos} videos, {len(own)} images, {faces} with a face")
    lines = [f"- skipped: {line}" for line in skipped] + [f"! {line}" for line in sorted(unusable)]
    print("\n".join([*lines, f"every frame: {output / 'manifest.csv'}"]))
    return 1 if unusable else 0
