"""Video files and cameras as images one after the other, and images as a video file; through
OpenCV (the video extra).
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsct_jax.errors import UserError

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_USUAL_RATE = 25.0  # frames per second where a file or camera does not say


def opencv() -> Any:
    """The module cv2, its own warnings silenced. Raises UserError when it is not installed."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg reads it at the first video
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError:
        raise UserError(
            "videos and cameras need OpenCV: pip install 'dsct-jax[video]' (or "
            "opencv-python-headless)"
        ) from None
    if hasattr(cv2, "setLogLevel"):
        cv2.setLogLevel(0)
    return cv2


class Video:
    """An open video file (a path) or camera (its number). Close it, or use it in a `with`.

    Attributes:
        name: the path, or camera0.
        rate: frames per second.
        live: whether it is a camera.
        frames: how many the file says it has; None for a camera or where it does not say.

    Raises:
        UserError: OpenCV is missing, or the file or camera cannot be opened, or gives no frame.
    """

    def __init__(self, source: Path | int):
        cv2 = opencv()
        self.name = f"camera{source}" if isinstance(source, int) else str(source)
        if isinstance(source, Path) and not source.is_file():
            raise UserError(f"{source}: no such video file")
        self._cv2, self.live = cv2, isinstance(source, int)
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        self._first: Any = self._capture.read()[1] if self._capture.isOpened() else None
        if self._first is None:
            self._capture.release()
            if isinstance(source, int):
                raise UserError(f"--camera={source}: no such camera, or another program uses it")
            raise UserError(f"{source}: cannot be read as a video")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        frames = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = float(rate) if np.isfinite(rate) and 0 < rate < 1000 else _USUAL_RATE
        self.frames = int(frames) if isinstance(source, Path) and frames >= 1 else None

    def __iter__(self) -> Iterator[Image.Image]:
        """Every frame from the first one on, RGB; can be iterated over once."""
        frame: Any = self._first
        while frame is not None:
            yield Image.fromarray(self._cv2.cvtColor(frame, self._cv2.COLOR_BGR2RGB))
            ready, frame = self._capture.read()
            frame = frame if ready else None

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file or camera."""
        self._capture.release()


@contextlib.contextmanager
def video_writer(path: Path, rate: float) -> Iterator["VideoWriter"]:
    """A writer of an .mp4 at `path`, which appears there when the block ends, also by an exception
    or Ctrl-C: what was written can be watched.
    """
    writer = VideoWriter(path, rate)
    try:
        yield writer
    finally:
        writer.close()


class VideoWriter:
    """Writes images of one size as an .mp4; the size is that of the first."""

    def __init__(self, path: Path, rate: float):
        self._path, self._rate, self._cv2 = path, rate, opencv()
        self._temporary = path.with_name(f".{path.name}.part.mp4")
        self._writer: Any = None

    def add(self, image: Image.Image) -> None:
        """Appends one RGB image. Raises UserError when the file cannot be written."""
        cv2 = self._cv2
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # the encoder wants even sides
            self._size = size = image.width // 2 * 2, image.height // 2 * 2
            self._writer = cv2.VideoWriter(
                str(self._temporary), cv2.VideoWriter_fourcc(*"mp4v"), self._rate, size
            )
            if not self._writer.isOpened():
                raise UserError(f"{self._path}: this OpenCV cannot write .mp4 here")
        frame = np.asarray(image.convert("RGB"))[: self._size[1], : self._size[0], ::-1]
        self._writer.write(np.ascontiguousarray(frame))

    def close(self) -> None:
        """Finishes the file; without a image there is none."""
        if self._writer is not None:
            self._writer.release()
            self._temporary.replace(self._path)
