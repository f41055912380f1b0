"""Makes NCAER-S from the CAER videos: one random frame of each part of a video, its face, and no
video in two splits.

    python -m data build_ncaer_s --videos=CAER --output=NCAER-S [--parts=4] [--detector=haar]

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
from typing import Any, TextIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.command import require_at_least
from data.tools.faces import FaceDetector, largest_face, make_detector, opencv
from dsct_jax.cli import Parser, expanded_path, progress, whole_file
from dsct_jax.errors import UserError

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
    """The videos by split and class, each content once, and a line for each that was skipped
    because another has its content.

    Of equal videos that of test stays, then that of val, then the first, so that no split but train
    loses anything to another.

    Raises:
        UserError: the folder is missing or holds no videos.
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
        suffixes = ", ".join(SUFFIXES)
        raise UserError(
            f"--videos={root}: holds no {{train,validation,test}}/<Class>/*.avi ({suffixes})"
        )
    found: dict[str, Video] = {}
    skipped = []
    targets: dict[tuple[str, str, str], Path] = {}
    in_order = sorted(
        split_of, key=lambda path: (("test", "val", "train").index(split_of[path]), path)
    )
    for path in progress(
        in_order, total=len(in_order), what="looking for equal videos", unit="video"
    ):
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
    # of its name, so that other videos change nothing for this one
    name_seed = int.from_bytes(hashlib.sha256(video.name.encode()).digest()[:8], "little")
    frames = []
    for part, frame, pixels in read_frames(video.path, settings.parts, (settings.seed, name_seed)):
        name = f"{video.split}/{video.label}/{video.path.stem}_{part:02}"
        image, crop = output / "images" / f"{name}.jpg", output / "crop" / f"{name}.txt"
        for file in (image, crop):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image, quality=_JPEG_QUALITY)
        box = largest_face(detect(pixels), *pixels.shape[:2]) or (0, 0, 0, 0)
        crop.write_text(",".join(map(str, box)) + "\n")
        source = (video.split, video.label, video.name, video.digest)
        frames.append(Frame(*source, part, frame, f"{name}.jpg", _digest(image), *box))
    return frames


_detect: FaceDetector | None = None  # of this worker process


def _start_worker(detector: str) -> None:
    global _detect
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
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
    source = output / "manifest.part.csv"
    if not source.exists():
        source = output / "manifest.csv"
    if not source.exists():
        return []
    kinds: list[Any] = [field.type for field in dataclasses.fields(Frame)]
    whole = [line for line in source.read_text().splitlines(keepends=True) if line.endswith("\n")]
    frames = [
        Frame(*(kind(cell) for cell, kind in zip(row, kinds, strict=True)))
        for row in csv.reader(whole[1:])
    ]
    # of the last video some lines may be lost
    return [frame for frame in frames if frame.video != frames[-1].video]


def _write_rows(file: TextIO, rows: Sequence[Sequence[Any]]) -> None:
    csv.writer(file, lineterminator="\n").writerows(rows)
    file.flush()


def write_manifest(frames: Sequence[Frame], path: Path) -> None:
    """The manifest of these frames, there in full or not at all."""
    with whole_file(path, newline="") as file:
        _write_rows(file, [COLUMNS, *map(dataclasses.astuple, frames)])


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--videos",
        type=expanded_path,
        required=True,
        help="folder with {train,validation,test}/<Class>/*.avi",
    )
    parser.add_output(
        "--output", folder=True, required=True, help="folder for images/, crop/ and manifest.csv"
    )
    parser.add_argument(
        "--parts", type=int, default=4, help="stretches of a video that give one frame each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--detector",
        default="haar",
        help="haar, yunet:MODEL.onnx, or MODULE:NAME, a function of your own (data/tools/faces.py)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    return parser


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
    frames = [frame for frame in open_build(output, settings) if frame.video in known]
    done = {frame.video for frame in frames}
    rest = [video for video in videos if video.name not in done]
    unfinished = output / "manifest.part.csv"
    write_manifest(frames, unfinished)
    unusable = []
    results = build_all(rest, output, settings, arguments.workers)
    with unfinished.open("a", newline="") as file:
        for result in progress(results, total=len(rest), what="frames", unit="video"):
            if isinstance(result, str):
                unusable.append(result)
                continue
            _write_rows(file, [dataclasses.astuple(frame) for frame in result])
            frames += result
    frames.sort(key=lambda frame: (frame.video, frame.part))
    write_manifest(frames, output / "manifest.csv")
    unfinished.unlink()
    for split in dict.fromkeys(FOLDERS.values()):
        own = [frame for frame in frames if frame.split == split]
        faces = sum(frame.x2 > frame.x1 for frame in own)
        num_videos = len({frame.video for frame in own})
        print(f"{split}: {num_videos} videos, {len(own)} images, {faces} with a face")
    for line in (
        *(f"- skipped: {line}" for line in skipped),
        *(f"! {one}" for one in sorted(unusable)),
    ):
        print(line)
    print(f"every frame: {output / 'manifest.csv'}")
    return 1 if unusable else 0
