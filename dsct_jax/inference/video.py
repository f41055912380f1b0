"""Video files and cameras as images one after the other, and images as a video file; through
OpenCV (the video extra).
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
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
    """An open video file (a path) or camera (its number). Use it in a `with`.

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
        self._capture.release()


@contextlib.contextmanager
def video_writer(path: Path, rate: float) -> Iterator[Callable[[Image.Image], None]]:
    """A function that appends an RGB image to an .mp4 of the first one's size (UserError where it
    cannot be written). The file appears at `path` when the block ends, also by an exception or
    Ctrl-C, so that what was written can be watched; without an image there is none.
    """
    cv2, temporary = opencv(), path.with_name(f".{path.name}.part.mp4")
    writers: list[Any] = []  # none before the first image says the size
    size = (0, 0)

    def add(image: Image.Image) -> None:
        nonlocal size
        if not writers:
            path.parent.mkdir(parents=True, exist_ok=True)
            size = image.width // 2 * 2, image.height // 2 * 2  # the encoder wants even sides
            code = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(temporary), code, rate, size)
            if not writer.isOpened():
                raise UserError(f"{path}: this OpenCV cannot write .mp4 here")
            writers.append(writer)
        frame = np.asarray(image.convert("RGB"))[: size[1], : size[0], ::-1]
        writers[0].write(np.ascontiguousarray(frame))

    try:
        yield add
    finally:
        for writer in writers:
            writer.release()
            temporary.replace(path)
