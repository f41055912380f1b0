"""Finding faces, by a detector of the user's choice: `haar`, `yunet:MODEL.onnx`, or `MODULE:NAME`,
a function of your own with this interface.

A detector is called with an image, uint8 [h w 3] RGB, and returns float32 [n 5], a row x1 y1 x2 y2
score for each face, in pixels:

    def detect(image):          # my_faces.py, named as --detector=my_faces:detect
        return np.array([[x1, y1, x2, y2, score], ...], np.float32).reshape(-1, 5)

The first two need OpenCV (the `video` extra).
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from dsct_jax.errors import UserError

FaceDetector = Callable[[UInt8[np.ndarray, "h w 3"]], Float32[np.ndarray, "n 5"]]

_SMALLEST = 0.05  # of the shorter side: smaller faces are not looked for by `haar`


def opencv() -> Any:
    """The module cv2. Raises UserError when it is not installed."""
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        reason = f"OpenCV is needed and cannot be imported ({error})"
        raise UserError(f"{reason}: pip install '.[video]'") from None


def make_detector(name: str) -> FaceDetector:
    """The detector that a command line names. Raises UserError when it cannot be loaded."""
    kind, _, detail = name.partition(":")
    if name == "haar":
        return haar()
    if kind == "yunet" and detail:
        return yunet(Path(detail))
    if not kind or not detail:
        raise UserError(
            f"--detector={name}: must be haar, yunet:MODEL.onnx or MODULE:NAME, a function of "
            "your own (see dsct_jax/faces.py)"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules of the working directory, as python -m finds them
    try:
        return getattr(importlib.import_module(kind), detail)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--detector={name}: cannot be loaded ({error})") from None


def haar() -> FaceDetector:
    """Viola and Jones' cascade as OpenCV 4 ships it: no download, upright frontal faces, quick. Its
    score is 1. Raises UserError when OpenCV is missing, or of version 5, which has no cascades.
    """
    cv2 = opencv()
    if not hasattr(cv2, "CascadeClassifier"):
        raise UserError(
            f"--detector=haar: OpenCV {cv2.__version__} has no cascades: install "
            "opencv-python-headless<5, or use yunet:MODEL.onnx"
        )
    file = Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"
    cascade = cv2.CascadeClassifier(str(file))

    def detect(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "n 5"]:
        smallest = max(20, round(_SMALLEST * min(image.shape[:2])))
        gray = cv2.equalizeHist(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
        found = cascade.detectMultiScale(
            gray, scaleFactor=1.1, minNeighbors=5, minSize=(smallest, smallest)
        )
        return _rows(np.array(found, np.float32).reshape(-1, 4))

    return detect


def yunet(model: Path, *, min_score: float = 0.7) -> FaceDetector:
    """OpenCV's YuNet; `model` is face_detection_yunet_*.onnx of the OpenCV zoo. Faces of any pose
    from about 10 pixels on. Raises UserError when OpenCV or the file is missing, or the file is no
    such model.
    """
    cv2 = opencv()
    if not model.is_file():
        source = "it is face_detection_yunet_*.onnx of the OpenCV zoo"
        raise UserError(f"--detector=yunet:{model}: no such file; {source}")
    try:
        network = cv2.FaceDetectorYN.create(str(model), "", (320, 320), min_score)
    except cv2.error as error:
        reason = f"is no YuNet model ({' '.join(str(error).split())})"
        raise UserError(f"--detector=yunet:{model}: {reason}") from None

    def detect(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "n 5"]:
        network.setInputSize((image.shape[1], image.shape[0]))
        # columns: x y w h, five landmarks, score; None = no face
        _, found = network.detect(np.ascontiguousarray(image[..., ::-1]))
        found = np.array([] if found is None else found, np.float32).reshape(-1, 15)
        return _rows(found, found[:, 14])

    return detect


def _rows(found: np.ndarray, scores: np.ndarray | float = 1.0) -> Float32[np.ndarray, "n 5"]:
    """x1 y1 x2 y2 score of faces given as x y w h ..."""
    rows = np.ones((len(found), 5), np.float32)
    rows[:, :2], rows[:, 2:4], rows[:, 4] = found[:, :2], found[:, :2] + found[:, 2:4], scores
    return rows


def largest_face(faces: np.ndarray, height: int, width: int) -> tuple[int, int, int, int] | None:
    """(x1, y1, x2, y2), in whole pixels inside the image, of the one of a detector's `faces` [n 5]
    with the largest area there; None without a face. Raises UserError when `faces` is no [n 5]
    array of numbers.
    """
    shape = getattr(faces, "shape", faces)
    if not isinstance(faces, np.ndarray) or shape[1:] != (5,) or faces.dtype.kind not in "fiu":
        raise UserError(
            f"--detector: returned {shape!r}, and must return an array [n 5]: x1 y1 x2 y2 score"
        )
    corners = np.round(faces[np.isfinite(faces).all(1), :4])
    boxes = np.clip(corners, 0, [width, height, width, height]).astype(int)
    areas = (boxes[:, 2] - boxes[:, 0]).clip(0) * (boxes[:, 3] - boxes[:, 1]).clip(0)
    if not areas.any():
        return None
    x1, y1, x2, y2 = boxes[areas.argmax()].tolist()
    return x1, y1, x2, y2
