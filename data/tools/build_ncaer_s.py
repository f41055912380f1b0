"""Makes NCAER-S from the CAER videos: one random frame of each part of a video, its face, and no
video in two splits.

    python -m data build_ncaer_s --videos=CAER --output=NCAER-S [--parts=4] [--seed=0] [--detector=haar]

CAER holds {train,validation,test}/<Class>/NNNN.avi. Written are images/ and
crop/{train,val,test}/<Class>/NNNN_PP.{jpg,txt} (a crop is x1,y1,x2,y2, or 0,0,0,0 where no face was
found) and manifest.csv: video, part, frame and hash of every image. The same videos, parts, seed
and detector give the same files whatever the number of workers; an interrupted build goes on where
it was. The authors' number of parts and detector are not published.
"""

import argparse
import csv
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.command import progress
from data.tools.faces import FaceDetector, largest_face, make_detector, opencv
from dsct_jax.cli import Parser, run_command
from dsct_jax.errors import UserError

FOLDERS = {
    "train": "train",
    "validation": "val",
    "val": "val",
    "test": "test",
}  # of the videos -> split
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


@dataclasses.dataclass(frozen=True)
class Frame:
    """One line of the manifest."""

    split: str
    label: str
    video: str
    video_hash: str
    part: int
    frame: int  # index in the video, from 0
    image: str  # below images/
    image_hash: str
    x1: int
    y1: int
    x2: int
    y2: int


COLUMNS = tuple(field.name for field in dataclasses.fields(Frame))


def find_videos(root: Path) -> tuple[list[Video], list[str]]:
    """The videos by split and class, each content once, and a line for each that was left out
    because another has its content.

    Of equal videos that of test stays, then that of val, then the first, so that no split but train
    loses anything to another.

    Raises:
        UserError: the folder is missing or holds no videos.
    """
    if not root.is_dir():
        raise UserError(f"--videos={root}: no such folder")
    folders = sorted(
        path for path in root.iterdir() if path.is_dir() and path.name.lower() in FOLDERS
    )
    paths = [
        path
        for folder in folders
        for path in sorted(folder.glob("*/*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not paths:
        raise UserError(
            f"--videos={root}: holds no {{train,validation,test}}/<Class>/*.avi "
            f"({', '.join(SUFFIXES)})"
        )
    found: dict[str, Video] = {}
    left_out = []
    targets: dict[tuple[str, str, str], Path] = {}
    order = {"test": 0, "val": 1, "train": 2}
    split_of = {path: FOLDERS[path.relative_to(root).parts[0].lower()] for path in paths}
    for path in progress(
        sorted(paths, key=lambda path: (order[split_of[path]], path)),
        total=len(paths),
        what="looking for equal videos",
        unit="video",
    ):
        name = path.relative_to(root).as_posix()
        twin = targets.setdefault((split_of[path], path.parent.name, path.stem), path)
        if twin != path:
            raise UserError(f"{path} and {twin} would give images of the same names: rename one")
        digest = _digest(path)
        if digest in found:
            left_out.append(f"{name} is the same video as {found[digest].name}")
            continue
        found[digest] = Video(path, name, split_of[path], path.parent.name, digest)
    return sorted(found.values(), key=lambda video: video.name), left_out


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def choose_frames(count: int, parts: int, seed: Sequence[int]) -> list[tuple[int, int]]:
    """(part, frame) of one random frame in each of `parts` equal stretches of a video of `count`
    frames; a stretch without a frame gives none.
    """
    rng = np.random.default_rng(seed)
    bounds = [count * part // parts for part in range(parts + 1)]
    return [
        (part, int(rng.integers(start, end)))
        for part, (start, end) in enumerate(itertools.pairwise(bounds))
        if end > start
    ]


def read_frames(
    path: Path, parts: int, seed: Sequence[int]
) -> list[tuple[int, int, UInt8[np.ndarray, "h w 3"]]]:
    """(part, frame, RGB image) of the chosen frames of a video. Videos are read from their
    beginning: seeking is inexact in many formats.

    Raises:
        UserError: the file cannot be read as a video.
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


def build_video(
    video: Video, output: Path, settings: Settings, detect: FaceDetector
) -> list[Frame]:
    """Writes the images and crops of one video and returns their lines of the manifest. Raises
    UserError naming a video that cannot be read.
    """
    name_seed = int.from_bytes(
        hashlib.sha256(video.name.encode()).digest()[:8], "little"
    )  # so that other videos change nothing for this one
    frames = []
    for part, frame, pixels in read_frames(video.path, settings.parts, (settings.seed, name_seed)):
        name = f"{video.split}/{video.label}/{video.path.stem}_{part:02}"
        image, crop = output / "images" / f"{name}.jpg", output / "crop" / f"{name}.txt"
        for file in (image, crop):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image, quality=_JPEG_QUALITY)
        box = largest_face(detect(pixels), *pixels.shape[:2]) or (0, 0, 0, 0)
        crop.write_text(",".join(map(str, box)) + "\n")
        frames.append(
            Frame(
                video.split,
                video.label,
                video.name,
                video.digest,
                part,
                frame,
                f"{name}.jpg",
                _digest(image),
                *box,
            )
        )
    return frames


_detect: FaceDetector | None = None  # of this worker process


def _start_worker(detector: str) -> None:
    global _detect
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    opencv().setNumThreads(1)
    _detect = make_detector(detector)


def _work(video: Video, output: Path, settings: Settings) -> list[Frame] | str:
    assert _detect is not None
    try:
        return build_video(video, output, settings, _detect)
    except UserError as error:
        return str(error)


def build_all(
    videos: Sequence[Video], output: Path, settings: Settings, workers: int
) -> Iterator[list[Frame] | str]:
    """The lines of each video as it is done, in any order, or why it cannot be used."""
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (settings.detector,)
    ) as pool:
        jobs = [pool.submit(_work, video, output, settings) for video in videos]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def open_build(output: Path, settings: Settings) -> list[Frame]:
    """What an interrupted build of these settings has finished. Raises UserError when the folder
    holds a build of other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    path, values = output / "settings.json", dataclasses.asdict(settings)
    if path.exists() and json.loads(path.read_text()) != values:
        raise UserError(
            f"--output={output}: holds a build of other settings ({path.read_text().strip()}); "
            "name another folder"
        )
    path.write_text(json.dumps(values) + "\n")
    unfinished, finished = output / "manifest.part.csv", output / "manifest.csv"
    source = unfinished if unfinished.exists() else finished
    if not source.exists():
        return []
    kinds: list[Any] = [field.type for field in dataclasses.fields(Frame)]
    rows = [
        next(csv.reader([line]))
        for line in source.read_text().splitlines(keepends=True)[1:]
        if line.endswith("\n")
    ]
    frames = [Frame(*(kind(cell) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    return [
        frame for frame in frames if frame.video != frames[-1].video
    ]  # of the last video some lines may be lost


def write_manifest(frames: Sequence[Frame], path: Path) -> None:
    """The whole file, or after an interruption the one before it."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(map(dataclasses.astuple, frames))
    temporary.replace(path)


def run(arguments: argparse.Namespace) -> int:
    """The command with its arguments parsed."""
    settings = Settings(arguments.parts, arguments.seed, arguments.detector)
    if settings.parts < 1 or settings.seed < 0 or arguments.workers < 1:
        raise UserError(
            f"--parts={settings.parts} and --workers={arguments.workers} must be at least 1, "
            f"--seed={settings.seed} at least 0"
        )
    opencv()
    make_detector(settings.detector)  # a mistake is told before anything is read
    videos, left_out = find_videos(arguments.videos)
    output: Path = arguments.output
    known = {video.name for video in videos}
    frames = [frame for frame in open_build(output, settings) if frame.video in known]
    done = {frame.video for frame in frames}
    rest = [video for video in videos if video.name not in done]
    unfinished = output / "manifest.part.csv"
    write_manifest(frames, unfinished)
    unusable = []
    with unfinished.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for result in progress(
            build_all(rest, output, settings, arguments.workers),
            total=len(rest),
            what="frames",
            unit="video",
        ):
            if isinstance(result, str):
                unusable.append(result)
                continue
            writer.writerows(map(dataclasses.astuple, result))
            file.flush()
            frames += result
    frames.sort(key=lambda frame: (frame.video, frame.part))
    write_manifest(frames, unfinished)
    unfinished.replace(output / "manifest.csv")
    _tell(frames, left_out, sorted(unusable), output)
    return 1 if unusable else 0


def _tell(
    frames: Sequence[Frame], left_out: Sequence[str], unusable: Sequence[str], output: Path
) -> None:
    for split in ("train", "val", "test"):
        own = [frame for frame in frames if frame.split == split]
        faces = sum(frame.x2 > frame.x1 for frame in own)
        print(
            f"{split}: {len({frame.video for frame in own})} videos, {len(own)} images, {faces} "
            "with a face"
        )
    for line in left_out:
        print(f"- left out: {line}")
    for line in unusable:
        print(f"! {line}")
    print(f"every frame: {output / 'manifest.csv'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one line on stderr and exit status 2, a video that cannot be
    read status 1.
    """
    parser = Parser(prog="python -m data build_ncaer_s", description=__doc__)
    parser.add_argument(
        "--videos",
        type=Path,
        required=True,
        help="folder with {train,validation,test}/<Class>/*.avi",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for images/, crop/ and manifest.csv"
    )
    parser.add_argument(
        "--parts", type=int, default=4, help="stretches of a video that give a frame each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--detector",
        default="haar",
        help="haar, yunet:MODEL.onnx, or MODULE:NAME, a function of your own (data/tools/faces.py)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    return run_command(lambda: run(parser.parse_args(argv)))
