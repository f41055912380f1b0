"""NCAER-S: the folders read back, and built from videos made here (where OpenCV is installed)."""

import csv
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs import base, ncaer_s_r50
from data.__main__ import main as data_main
from data.config import DataConfig
from data.readers.ncaer_s import read_ncaer_s
from data.tools import build_ncaer_s
from data.tools.build_ncaer_s import choose_frames
from dsct_jax.errors import UserError
from dsct_jax.faces import largest_face, make_detector


def main(argv: list[str]) -> int:
    return data_main(["build_ncaer_s", *argv])


with_opencv = pytest.mark.skipif(
    importlib.util.find_spec("cv2") is None, reason="OpenCV is not installed (the video extra)"
)


def make_config(root: Path, **changes: Any) -> DataConfig:
    config = ncaer_s_r50.get_config()
    values = config.data.to_dict() | {
        "data_dir": str(root),
        "class_names": base.CAER_S_CLASSES,
        "multi_label": config.multi_label,
    }
    return DataConfig(**(values | changes))


def write(root: Path, name: str, crop: str | None) -> None:
    image, text = (
        root / kind / f"{name}{suffix}" for kind, suffix in (("images", ".jpg"), ("crop", ".txt"))
    )
    for file in (image, text):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (90, 120, 150)).save(image)
    if crop is not None:
        text.write_text(crop)


def one_line(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders(tmp_path):
    for name, crop in {
        "Sad/b": "1,2,11,12\n",
        "Sad/a": "-4,2,11.5,12",
        "Anger/c": "0,0,0,0\n",
        "Anger/d": "0,0,0,0\n3,4,8,9\n",
    }.items():
        write(tmp_path, f"train/{name}", crop)
    (tmp_path / "images/train/Sad/notes.md").write_text("no image")
    records, report = read_ncaer_s(make_config(tmp_path), "train")
    assert [record.name for record in records] == [
        "images/train/Anger/d.jpg",
        "images/train/Sad/a.jpg",
        "images/train/Sad/b.jpg",
    ]
    assert [record.labels.argmax(1).tolist() for record in records] == [[0], [5], [5]]
    assert [record.boxes.tolist() for record in records] == [
        [[3, 4, 8, 9]],
        [[0, 2, 11.5, 12]],
        [[1, 2, 11, 12]],
    ]
    assert (report.without_people, report.clipped, report.protocol) == (1, 1, "ncaer_s")


@pytest.mark.parametrize(
    ("crop", "says"),
    [
        (None, "train/Sad/a.txt: no such file"),
        ("", "is empty"),
        ("1,2,3", "a.txt:1: needs x1,y1,x2,y2"),
        ("1,2,3,x", "a.txt:1: needs x1,y1,x2,y2"),
    ],
)
def test_crops_that_cannot_be_used(tmp_path, crop, says):
    write(tmp_path, "train/Sad/a", crop)
    assert says in one_line(lambda: read_ncaer_s(make_config(tmp_path), "train"))


def test_folders_that_cannot_be_used(tmp_path):
    assert "images/train: no such folder" in one_line(
        lambda: read_ncaer_s(make_config(tmp_path), "train")
    )
    (tmp_path / "images/train").mkdir(parents=True)
    assert "no usable image" in one_line(lambda: read_ncaer_s(make_config(tmp_path), "train"))
    write(tmp_path, "train/Joy/a", "1,2,3,4")
    assert "class 'Joy' is not in config.class_names" in one_line(
        lambda: read_ncaer_s(make_config(tmp_path), "train")
    )
    assert "config.data.source='ncaer_s'" in one_line(
        lambda: make_config(tmp_path, multi_label=True)
    )


@given(st.integers(1, 500), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_one_frame_of_each_part(count, parts, seed):
    chosen = choose_frames(count, parts, (seed, 1))
    assert len(chosen) == min(count, parts) and chosen == choose_frames(count, parts, (seed, 1))
    for part, frame in chosen:
        assert count * part // parts <= frame < count * (part + 1) // parts
    assert [frame for _, frame in chosen] == sorted({frame for _, frame in chosen})


def test_the_largest_face_inside_the_image():
    faces = np.array(
        [[0, 0, 10, 10, 0.9], [30, 20, 300, 300, 0.8], [5, 5, 4, 4, 1], [np.nan, 0, 50, 50, 1]],
        np.float32,
    )
    faces[0, 2] = 9
    assert largest_face(faces, 30, 40) == (30, 20, 40, 30)  # 10x10 of it; the first is 9x10
    assert (
        largest_face(faces[:1], 30, 40) == (0, 0, 9, 10) and largest_face(faces[2:], 30, 40) is None
    )
    assert largest_face(np.zeros((0, 5), np.float32), 30, 40) is None
    assert "(2, 4), and must return an array [n 5]" in one_line(
        lambda: largest_face(np.zeros((2, 4), np.float32), 30, 40)
    )


def test_detectors_that_do_not_exist():
    assert "must be haar, yunet:MODEL.onnx or MODULE:NAME" in one_line(
        lambda: make_detector("retina")
    )
    assert "cannot be loaded" in one_line(lambda: make_detector("no_such_module:detect"))
    assert "cannot be loaded" in one_line(lambda: make_detector("json:no_such_name"))
    assert make_detector("json:loads") is json.loads


FRAMES = 24


def write_video(path: Path, seed: int, *, bright: bool = True) -> None:
    """24 frames of 64x48: a grey ground whose brightness tells the frame, and a white rectangle."""
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12, (64, 48))
    assert video.isOpened()
    for frame in range(FRAMES):
        image = np.full((48, 64, 3), 6 * frame + seed % 5, np.uint8)
        if bright:
            image[8:32, 16 + seed % 3 * 8 : 40 + seed % 3 * 8] = 255
        video.write(image)
    video.release()


@pytest.fixture
def caer(tmp_path, monkeypatch) -> Path:
    """Videos in CAER's folders, two classes in three splits; one test video is in train again, one
    shows no face; and a detector in a module.
    """
    videos = tmp_path / "CAER"
    for split, label, number in (
        ("train", "Happy", 1),
        ("train", "Sad", 2),
        ("train", "Sad", 3),
        ("validation", "Sad", 4),
        ("test", "Happy", 5),
    ):
        write_video(videos / split / label / f"{number:04}.avi", number, bright=number != 3)
    (videos / "train/Happy/0009.avi").write_bytes((videos / "test/Happy/0005.avi").read_bytes())
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(__file__).parents[2])
    )  # for the workers, as the working directory changes
    (tmp_path / "bright_detector.py").write_text(
        "import numpy as np\n\n\ndef detect(image):\n    rows, columns = np.nonzero(image.min(-1) "
        "> 200)\n"
        "    return np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, 1]] "
        "if len(rows) else np.zeros((0, 5)), np.float32)\n"
    )
    monkeypatch.chdir(tmp_path)
    return videos


def build(videos: Path, output: Path, *more: str) -> int:
    return main(
        [
            f"--videos={videos}",
            f"--output={output}",
            "--parts=3",
            "--detector=bright_detector:detect",
            "--workers=2",
            *more,
        ]
    )


@with_opencv
def test_build_and_read_back(caer, tmp_path, capsys):
    assert build(caer, tmp_path / "built") == 0
    out = capsys.readouterr().out
    assert (
        "train: 3 videos, 9 images, 6 with a face" in out
        and "skipped: train/Happy/0009.avi is the same video as test/Happy/0005.avi" in out
    )
    rows = list(csv.DictReader((tmp_path / "built/manifest.csv").read_text().splitlines()))
    assert len(rows) == 15 and len({row["image_hash"] for row in rows}) == 15
    by_split = {
        split: {row["video_hash"] for row in rows if row["split"] == split}
        for split in ("train", "val", "test")
    }
    assert [len(hashes) for hashes in by_split.values()] == [3, 1, 1] and len(
        set.union(*by_split.values())
    ) == 5
    for row in rows:
        part, frame, number = int(row["part"]), int(row["frame"]), int(Path(row["video"]).stem)
        assert FRAMES * part // 3 <= frame < FRAMES * (part + 1) // 3
        ground = np.asarray(Image.open(tmp_path / "built/images" / row["image"]))[40:].mean()
        assert (
            abs(ground - (6 * frame + number % 5)) < 2.5
        )  # the very frame that the manifest names
    records, report = read_ncaer_s(make_config(tmp_path / "built"), "train")
    assert len(records) == 6 and report.without_people == 3
    np.testing.assert_allclose(records[0].boxes, [[24, 8, 48, 32]], atol=1)


@with_opencv
def test_the_same_whatever_the_workers_and_after_an_interruption(caer, tmp_path, capsys):
    assert build(caer, tmp_path / "one", "--workers=1") == 0
    whole = (tmp_path / "one/manifest.csv").read_bytes()
    lines = whole.splitlines(keepends=True)
    half = tmp_path / "half"
    half.mkdir()
    (half / "settings.json").write_bytes((tmp_path / "one/settings.json").read_bytes())
    (half / "manifest.part.csv").write_bytes(
        b"".join(lines[:5]) + lines[5][:20]
    )  # one video, one line of the next and a torn one
    assert (
        build(caer, half) == 0
        and (half / "manifest.csv").read_bytes() == whole
        and not (half / "manifest.part.csv").exists()
    )
    assert (
        len(list((half / "images").rglob("*.jpg"))) == 12
    )  # the first video's images were made before the interruption
    capsys.readouterr()
    assert build(caer, half, "--seed=1") == 2
    assert "holds a build of other settings" in capsys.readouterr().err


@with_opencv
def test_videos_that_cannot_be_read_are_told_at_the_end(caer, tmp_path, capsys):
    (caer / "train/Sad/0007.avi").write_bytes(b"no video")
    (caer / "train/Sad/0003.avi").write_bytes((caer / "train/Sad/0003.avi").read_bytes()[:12000])
    status = build(caer, tmp_path / "built")
    out = capsys.readouterr().out
    assert status == 1 and "! " in out and "0007.avi: cannot be read as a video" in out
    assert (tmp_path / "built/manifest.csv").exists()


@with_opencv
def test_the_cascade_finds_no_face_where_none_is():
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "CascadeClassifier"):
        assert "has no cascades" in one_line(lambda: make_detector("haar"))
    else:
        assert make_detector("haar")(np.full((48, 64, 3), 90, np.uint8)).shape == (0, 5)
    assert "no such file" in one_line(lambda: make_detector("yunet:missing.onnx"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parts=0"], "--parts=0"),
        (["--seed=-1"], "--seed=-1"),
        (["--detector=retina"], "--detector=retina"),
        (["--videos=nowhere"], "no such folder"),
    ],
)
def test_mistakes(tmp_path, arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(build_ncaer_s, "opencv", lambda: None)
    videos = tmp_path / "CAER/train/Sad"
    videos.mkdir(parents=True)
    assert (
        main(
            [
                f"--videos={tmp_path / 'CAER'}",
                f"--output={tmp_path / 'built'}",
                "--detector=json:loads",
                *arguments,
            ]
        )
        == 2
    )
    assert says in capsys.readouterr().err
    assert (
        main(
            [
                f"--videos={tmp_path / 'CAER'}",
                f"--output={tmp_path / 'built'}",
                "--detector=json:loads",
            ]
        )
        == 2
    )
    assert "holds no" in capsys.readouterr().err


def test_without_opencv_the_extra_is_named(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("dsct_jax.faces.importlib.import_module", missing)
    assert "pip install '.[video]'" in one_line(lambda: make_detector("haar"))


class YunetStandIn:
    """What cv2.FaceDetectorYN answers: rows of 15 numbers, or None."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None

    def setInputSize(self, size: tuple[int, int]) -> None:
        self.size = size

    def detect(self, image: np.ndarray) -> tuple[int, np.ndarray | None]:
        assert image.shape[:2] == (self.size[1], self.size[0]) and image.flags["C_CONTIGUOUS"]
        if image[0, 0, 2] != 255:  # the red of an OpenCV image is its last colour
            return 1, None
        return 1, np.array([[4, 5, 10, 20, *range(10), 0.9]], np.float32)


def test_yunet_boxes_have_corners_and_colours_are_in_opencvs_order(monkeypatch, tmp_path):
    create = SimpleNamespace(create=lambda model, config, size, score: YunetStandIn())
    monkeypatch.setattr(
        "dsct_jax.faces.opencv",
        lambda: SimpleNamespace(FaceDetectorYN=create, error=RuntimeError),
    )
    (tmp_path / "face.onnx").write_bytes(b"")
    detect = make_detector(f"yunet:{tmp_path / 'face.onnx'}")
    image = np.zeros((48, 64, 3), np.uint8)
    assert detect(image).shape == (0, 5)
    image[..., 0] = 255
    np.testing.assert_allclose(detect(image), [[4, 5, 14, 25, 0.9]], rtol=1e-6)
