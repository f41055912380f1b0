"""Prediction: geometry from image to canvas and back, selection of people and labels, and the
command with its errors.
"""

import csv
import dataclasses
import importlib
import importlib.util
import json
import re
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dsct_jax
from dsct_jax import cli
from dsct_jax.__main__ import main
from dsct_jax.batch import Predictions
from dsct_jax.boxes import pairwise_iou
from dsct_jax.commands import flags, predict
from dsct_jax.commands.inputs import drawing_names
from dsct_jax.commands.predict import TimedDetector
from dsct_jax.config import read_config
from dsct_jax.errors import UserError
from dsct_jax.inference.predict import predict_each
from dsct_jax.inference.video import Video
from dsct_jax.postprocess import Decoder, Selection
from dsct_jax.preprocess import MEAN, STD, Preprocessing

CLASSES = ("calm", "glad", "angry")
RED, GREEN = (230, 20, 20), (20, 60, 20)


class RedFinder:
    """A model by hand: its first query answers with the red rectangle in the image, the second
    repeats it less surely, the third finds nobody.

    The glad logit is the share of red in the image, so that an image mixed up with another would
    show.
    """

    decoder = Decoder(CLASSES, multi_label=True, subject_logit=True)
    preprocessing = Preprocessing(
        short_side=64, max_long_side=96, buckets=((64, 96), (96, 64), (72, 72))
    )

    def __init__(self):
        self.shapes = []

    def __call__(self, images, padding_mask):
        images, inside = np.asarray(images), ~np.asarray(padding_mask)
        self.shapes.append(images.shape)
        assert images.dtype == np.float32
        assert (images[~inside] == 0).all()
        pixels = images * np.array(STD, np.float32) + np.array(MEAN, np.float32)
        red = (pixels[..., 0] - pixels[..., 1] > 0.4) & inside
        boxes, logits = [], []
        for found, valid in zip(red, inside, strict=True):
            height, width = valid[:, 0].sum(), valid[0].sum()
            rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
            box = np.array(
                [
                    (columns[0] + columns[-1] + 1) / 2 / width,
                    (rows[0] + rows[-1] + 1) / 2 / height,
                    np.ptp(columns) / width,
                    np.ptp(rows) / height,
                ]
            )
            boxes.append([box, box * [1, 1, 0.9, 0.9], [0.5, 0.5, 1, 1]])
            glad = 4 * found.sum() / valid.sum()
            logits.append([[-1, glad, 2, 3], [5, 5, 5, 1], [5, 5, 5, -4]])
        return Predictions(
            jnp.asarray(logits, jnp.float32)[None], jnp.asarray(boxes, jnp.float32)[None]
        )


def scene(width, height, box):
    image = Image.new("RGB", (width, height), GREEN)
    image.paste(RED, box)
    return image


PHOTOGRAPHS = [  # size and where the red person is
    ((200, 150), (40, 30, 120, 130)),
    ((150, 200), (10, 50, 140, 190)),
    ((640, 200), (500, 20, 600, 180)),
    ((30, 30), (3, 3, 20, 27)),
    ((64, 64), (0, 0, 40, 64)),
    ((201, 150), (80, 10, 180, 100)),
]


def test_boxes_come_back_in_pixels_of_the_photograph_and_in_order():
    images = [scene(*size, box) for size, box in PHOTOGRAPHS]
    found = dsct_jax.predict(RedFinder(), images)
    assert [len(subjects) for subjects in found] == [1] * len(
        images
    )  # neither the duplicate nor the query that found nobody
    for (size, box), subjects in zip(PHOTOGRAPHS, found, strict=True):
        pixel = max(size) / 64  # one pixel of the canvas, in pixels of the image
        np.testing.assert_allclose(subjects[0].box, box, atol=1.6 * pixel)
        assert pairwise_iou(np.array([subjects[0].box]), np.array([box], float))[0, 0] > 0.85


def test_any_number_of_images_runs_in_one_shape_a_canvas_and_batches_change_nothing():
    images = [scene(*size, box) for size, box in PHOTOGRAPHS] * 2
    one_by_one, together = RedFinder(), RedFinder()
    singly = dsct_jax.predict(one_by_one, images, batch_size=1)
    assert dsct_jax.predict(together, images, batch_size=4) == singly
    assert set(together.shapes) == {(4, 64, 96, 3), (4, 96, 64, 3), (4, 72, 72, 3)}
    assert len(together.shapes) == 4  # 6 wide, 2 tall, 4 square ones
    assert len(one_by_one.shapes) == len(images)


def test_images_are_taken_as_they_are_needed():
    taken = []

    def stream():
        for i in range(100):
            taken.append(i)
            yield scene(90, 60, (10, 10, 40, 50))

    results = predict_each(RedFinder(), stream(), selection=Selection(), batch_size=3)
    assert next(results)[0] == 0
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "array"])
def test_images_of_every_kind(mode):
    image = scene(80, 60, (10, 10, 50, 40))
    given = np.asarray(image) if mode == "array" else image.convert(mode)
    if mode == "L":  # no red is left to find, but the image must be taken
        with pytest.raises(IndexError):
            dsct_jax.predict(RedFinder(), [given])
    else:
        assert dsct_jax.predict(RedFinder(), [given]) == dsct_jax.predict(RedFinder(), [image])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(UserError, match="image array"):
        dsct_jax.predict(RedFinder(), [array])


@pytest.mark.parametrize(
    "option", [{"threshold": 1.5}, {"min_confidence": -0.1}, {"nms": 2.0}, {"batch_size": 0}]
)
def test_numbers_out_of_range_are_refused(option):
    with pytest.raises(UserError, match=next(iter(option))):
        dsct_jax.predict(RedFinder(), [scene(80, 60, (10, 10, 50, 40))], **option)


def test_no_images_no_people():
    assert dsct_jax.predict(RedFinder(), []) == []


# --- which queries are people, and which classes become labels ------------------------------------

BOXES = np.array(
    [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.48], [0.9, 0.1, 0.4, 0.2], [0.2, 0.8, 0.1, 0.1]],
    np.float32,
)
LOGITS = np.array(
    [[0.2, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0], [-1.0, -2.0, -3.0, 0.5], [4.0, 4.0, 4.0, -3.0]],
    np.float32,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def select(selection=None, *, multi_label=True, subject_logit=True):
    decoder = Decoder(CLASSES, multi_label=multi_label, subject_logit=subject_logit)
    return decoder(LOGITS, BOXES, (100, 200), selection=selection or Selection())


def test_multi_label_takes_the_classes_above_the_threshold():
    first, second = select(Selection(threshold=0.55))
    # The second query overlaps the first by 0.96 and is surer of being a person; the fourth is
    # hardly one.
    np.testing.assert_allclose(
        [first.confidence, second.confidence], sigmoid([2.0, 0.5]), rtol=1e-6
    )
    assert first.labels == ()
    assert second.labels == ()
    np.testing.assert_allclose(list(first.probabilities.values()), [0.5, 0.5, 0.5])
    both = select(Selection(threshold=0.55, nms=1.0))
    assert [subject.labels for subject in both] == [
        (),
        ("glad", "angry"),
        (),
    ]  # most probable first; sigmoid(0.2) = 0.5498 stays below
    assert select(Selection(threshold=0.54, nms=1.0))[1].labels == ("glad", "angry", "calm")


def test_multi_class_takes_the_likeliest_class():
    subjects = select(Selection(nms=1.0, min_confidence=0.0), multi_label=False)
    assert [subject.labels for subject in subjects] == [
        ("calm",),
        ("glad",),
        ("calm",),
        ("calm",),
    ]  # by confidence: queries 1, 0, 2, 3
    for subject in subjects:
        assert sum(subject.probabilities.values()) == pytest.approx(1)
    np.testing.assert_allclose(
        subjects[1].probabilities["glad"], np.exp(3.0) / np.exp([0.2, 3.0, 1.0]).sum(), rtol=1e-6
    )


def test_without_a_trained_subject_logit_the_likeliest_class_counts():
    subjects = select(Selection(min_confidence=0.3), multi_label=False, subject_logit=False)
    np.testing.assert_allclose(
        [subject.confidence for subject in subjects], sigmoid([4.0, 3.0]), rtol=1e-6
    )  # query 2 has sigmoid(-1) = 0.27
    for multi_label, class_loss, expected in (
        (False, "focal", False),
        (False, "softmax", True),
        (True, "focal", True),
    ):
        decoder = Decoder.unfitted(CLASSES, multi_label=multi_label, class_loss=class_loss)
        assert decoder.subject_logit is expected


def test_boxes_end_at_the_border():
    box = select()[1].box
    np.testing.assert_allclose(box, [140, 0, 200, 20], atol=1e-4)  # (0.7, 0, 1.1, 0.2) of 200 x 100


def test_a_box_without_area_is_nobody():
    boxes = np.array([[1.5, 0.5, 0.2, 0.2]], np.float32)
    subjects = RedFinder.decoder(LOGITS[:1], boxes, (100, 200))
    assert subjects == []


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """Runs `python -m dsct_jax predict` in this process with RedFinder as the model of every
    checkpoint called "run".
    """

    def load_model(arguments):
        if arguments.checkpoint.name != "run":
            return flags.load_model(arguments)
        if arguments.config is not None:
            read_config(arguments.config)
        return RedFinder()

    monkeypatch.setattr(predict, "load_model", load_model)
    return lambda arguments: main(["predict", *arguments])


@pytest.fixture
def folder(tmp_path):
    for name, (size, box) in zip(["a.png", "sub/b.jpg", "sub/b.png"], PHOTOGRAPHS, strict=False):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(*size, box).save(path)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_command_writes_numbers_and_drawings(command, folder, tmp_path, capsys):
    output = folder / "out"  # below the images: a second run must not look at its own drawings
    for _ in range(2):
        assert command([str(folder), "--checkpoint=run", f"--output={output}"]) == 0
    assert "3 images, 3 people" in capsys.readouterr().out
    written = json.loads((output / "predictions.json").read_text())
    assert [entry["file"] for entry in written["images"]] == [
        str(folder / name) for name in ("a.png", "sub/b.jpg", "sub/b.png")
    ]
    assert written["class_names"] == list(CLASSES)
    for entry, (size, box) in zip(written["images"], PHOTOGRAPHS, strict=False):
        assert (entry["width"], entry["height"]) == size
        (subject,) = entry["subjects"]
        np.testing.assert_allclose(subject["box"], box, atol=1.6 * max(size) / 64)
        assert tuple(subject["probabilities"]) == CLASSES
        assert subject["labels"] == [
            name
            for name in sorted(CLASSES, key=subject["probabilities"].get, reverse=True)
            if subject["probabilities"][name] > 0.5
        ]
        with Image.open(output / entry["drawn"]) as drawing:
            assert min(drawing.size) >= 480
    assert sorted(path.name for path in (output / "drawn").rglob("*.png")) == [
        "a.png",
        "b.jpg.png",
        "b.png.png",
    ]
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 480


def test_command_takes_files_and_patterns_once(command, folder, tmp_path, capsys):
    assert (
        command(
            [
                str(folder / "a.png"),
                str(folder / "**/*.png"),
                "--checkpoint=run",
                f"--output={tmp_path / 'out'}",
            ]
        )
        == 0
    )
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["file"] for entry in written["images"]] == [
        str(folder / "a.png"),
        str(folder / "sub/b.png"),
    ]


def test_a_photograph_taken_sideways_is_put_upright(command, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show it
    scene(200, 150, (40, 30, 120, 130)).save(tmp_path / "sideways.jpg", exif=exif, quality=95)
    assert (
        command(
            [str(tmp_path / "sideways.jpg"), "--checkpoint=run", f"--output={tmp_path / 'out'}"]
        )
        == 0
    )
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert (entry["width"], entry["height"]) == (150, 200)
    np.testing.assert_allclose(
        entry["subjects"][0]["box"], (20, 40, 120, 120), atol=5
    )  # (x, y) -> (149 - y, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg", "--checkpoint=run"], r"nowhere\.jpg: no such file or folder"),
        (["no/*.jpg", "--checkpoint=run"], r"no/\*\.jpg: the pattern matches no file"),
        (["empty", "--checkpoint=run"], r"empty: the folder holds no image or video"),
        (["images/notes.txt", "--checkpoint=run"], r"notes\.txt: cannot be read as an image"),
        (["images", "--checkpoint=missing"], r"missing: no such file or directory"),
        (["images", "--checkpoint=run", "--config=none.py"], r"--config=none\.py: no such file"),
        (
            ["images", "--checkpoint=run", "--config=images/notes.txt"],
            r"neither a \.py nor a \.json",
        ),
        (["images", "--checkpoint=run", "--threshold=7"], r"threshold=7\.0 must lie in \[0, 1\]"),
        (["--checkpoint=run"], r"nothing to look at"),
        (["images", "--checkpoint=run", "--every=0"], r"--every=0 must be at least 1"),
        (["images", "--checkpoint=run", "--seconds=0"], r"--seconds=0\.0 must be more than 0"),
        (
            ["images", "--checkpoint=run", "--output=images/a.png"],
            r"--output=images/a\.png: is a file",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(command, folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    assert command(["--output=out", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (folder.parent / "out" / "predictions.json").exists()


def test_unreadable_files_can_be_left_out(command, folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    arguments = [str(folder), "--checkpoint=run", f"--output={tmp_path / 'out'}"]
    assert command(arguments) == 2
    assert "broken.png" in capsys.readouterr().err
    assert command([*arguments, "--skip-unreadable"]) == 0
    assert "left out:" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(written["images"]) == 3
    assert len(written["unreadable"]) == 1


def test_the_table_has_a_line_a_person(command, folder, tmp_path):
    assert command([str(folder), "--checkpoint=run", f"--output={tmp_path / 'out'}"]) == 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["file"] for line in lines] == [entry["file"] for entry in written["images"]]
    for line, entry in zip(lines, written["images"], strict=True):
        (subject,) = entry["subjects"]
        np.testing.assert_allclose(
            [float(line[name]) for name in ("x1", "y1", "x2", "y2")], subject["box"], rtol=1e-5
        )
        np.testing.assert_allclose(
            [float(line[name]) for name in CLASSES],
            list(subject["probabilities"].values()),
            rtol=1e-5,
        )
        np.testing.assert_allclose(float(line["confidence"]), subject["confidence"], rtol=1e-5)
        assert (line["labels"], line["frame"]) == ("; ".join(subject["labels"]), "")


def test_the_latency_leaves_the_first_call_of_a_shape_out(command, folder, tmp_path, capsys):
    assert command([str(folder), "--checkpoint=run", f"--output={tmp_path / 'out'}"]) == 0
    assert "latency: every call was the first of its shape; 2 shape(s)" in capsys.readouterr().out
    timed = TimedDetector(RedFinder())
    image = scene(80, 60, (10, 10, 50, 40))
    assert dsct_jax.predict(timed, [image] * 5, batch_size=2) == dsct_jax.predict(
        RedFinder(), [image] * 5, batch_size=2
    )
    report = timed.report()
    assert re.search(
        r"latency of the model: \d+\.\d ms per batch of 2 \(median; 95 % below \d+\.\d ms\), "
        r"\d+\.\d images/s; 1 shape",
        report,
    ), report


# --- thresholds and scores ------------------------------------------------------------------------


def test_fitted_thresholds_decide_unless_the_user_names_one():
    model, image = RedFinder(), scene(80, 60, (10, 10, 50, 40))
    model.decoder = dataclasses.replace(model.decoder, thresholds=(0.1, 0.99, 0.99))
    ((fitted,),), ((named,),) = (
        dsct_jax.predict(model, [image]),
        dsct_jax.predict(model, [image], threshold=0.85),
    )
    assert fitted.labels == ("calm",)  # sigmoid(-1) = 0.27
    assert named.labels == ("angry",)  # sigmoid(2) = 0.88


def test_the_fitted_certainty_decides_unless_the_user_names_one():
    model, image = RedFinder(), scene(80, 60, (10, 10, 50, 40))
    sure = dsct_jax.predict(model, [image], min_confidence=0.0)[0][0].confidence
    model.decoder = dataclasses.replace(model.decoder, min_confidence=sure + 0.01)
    assert dsct_jax.predict(model, [image]) == [[]]
    assert len(dsct_jax.predict(model, [image], min_confidence=sure)[0]) == 1
    # fitted, and not the same as none
    model.decoder = dataclasses.replace(model.decoder, min_confidence=0.0)
    assert len(dsct_jax.predict(model, [image])[0]) == len(
        dsct_jax.predict(model, [image], min_confidence=0.0)[0]
    )


def test_the_score_is_the_papers_mean_logit():
    first, second = select(Selection(threshold=0.55))
    np.testing.assert_allclose(
        [first.paper_score, second.paper_score], [0.0, -2.0], atol=1e-6
    )  # Section 3.1, "During inference"


# --- videos and cameras ---------------------------------------------------------------------------

with_opencv = pytest.mark.skipif(
    importlib.util.find_spec("cv2") is None, reason="OpenCV is not installed (the video extra)"
)


def write_video(path, frames, *, rate=10.0):
    """The red person walks to the right, two pixels a frame."""
    cv2 = importlib.import_module("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, (160, 120))
    for i in range(frames):
        writer.write(
            np.asarray(scene(160, 120, (2 * i % 100, 20, 2 * i % 100 + 50, 100)))[..., ::-1].copy()
        )
    writer.release()


@with_opencv
def test_a_video_from_end_to_end(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "SECONDS_BETWEEN_LINES", 0.0)
    write_video(tmp_path / "walk.avi", 21)
    assert (
        command([str(tmp_path / "walk.avi"), "--checkpoint=run", f"--output={tmp_path / 'out'}"])
        == 0
    )
    printed, bar = capsys.readouterr()
    assert "walk.avi: 21 frames, 10 frames/s" in printed
    assert re.search(r"12/21 .*frame/s", bar)
    assert "0 images, 21 frames of 1 videos, 21 people" in printed
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    (entry,) = written["videos"]
    assert (entry["width"], entry["height"], entry["drawn"]) == (160, 120, "drawn/walk.mp4")
    assert [frame["frame"] for frame in entry["frames"]] == list(range(21))
    assert entry["frames"][3]["seconds"] == 0.3
    for i, frame in enumerate(entry["frames"]):
        np.testing.assert_allclose(
            frame["subjects"][0]["box"], (2 * i % 100, 20, 2 * i % 100 + 50, 100), atol=8
        )
    with Video(tmp_path / "out" / "drawn" / "walk.mp4") as drawn:
        assert len(list(drawn)) == drawn.frames == 21
        assert drawn.rate == 10
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        assert [line["frame"] for line in csv.DictReader(file)] == [str(i) for i in range(21)]


@with_opencv
def test_some_frames_of_a_video_and_images_beside_it(command, folder, tmp_path):
    write_video(folder / "walk.avi", 30)
    assert (
        command(
            [
                str(folder),
                "--every=4",
                "--seconds=2",
                "--checkpoint=run",
                f"--output={tmp_path / 'out'}",
            ]
        )
        == 0
    )
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [frame["frame"] for frame in written["videos"][0]["frames"]] == [0, 4, 8, 12, 16]
    assert len(written["images"]) == 3


@with_opencv
def test_a_camera_is_watched_frame_by_frame(command, tmp_path, monkeypatch):
    class Camera(Video):
        def __init__(self, source):
            super().__init__(tmp_path / "walk.avi")
            self.name, self.live, self.frames = f"camera{source}", True, None

    write_video(tmp_path / "walk.avi", 6)
    monkeypatch.setattr(predict, "Video", Camera)
    assert command(["--camera=0", "--checkpoint=run", f"--output={tmp_path / 'out'}"]) == 0
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["videos"]
    assert (entry["file"], len(entry["frames"])) == ("camera0", 6)
    assert (tmp_path / "out" / "drawn" / "camera0.mp4").stat().st_size > 500


@with_opencv
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--camera=63"], "--camera=63: no such camera"),
        (["broken.mp4"], "broken.mp4: cannot be read as a video"),
        (["broken.mp4", "--skip-unreadable"], "none of the 1 files could be read"),
    ],
)
def test_a_video_that_cannot_be_read_is_one_line(
    command, tmp_path, monkeypatch, capfd, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all" * 50)
    assert command([*arguments, "--checkpoint=run", "--output=out"]) == 2
    lines = [
        line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")
    ]  # FFmpeg's, if a test before let it speak
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize("arguments", [["--camera=0"], ["walk.mp4"]])
def test_without_opencv_the_line_says_how_to_get_it(
    command, tmp_path, monkeypatch, capsys, arguments
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "walk.mp4").write_bytes(b"")
    assert command([*arguments, "--checkpoint=run", "--output=out"]) == 2
    assert (
        capsys.readouterr().err
        == "error: videos and cameras need OpenCV: pip install 'dsct-jax[video]' (or "
        "opencv-python-headless)\n"
    )


def test_configurations_are_read_from_python_and_json(tmp_path):
    (tmp_path / "c.py").write_text(
        "def get_config():\n    return {'class_names': ['a'], 'data': {'buckets': [[1, 2]]}}\n"
    )
    (tmp_path / "c.json").write_text('{"class_names": ["a"]}')
    assert read_config(tmp_path / "c.py") == {"class_names": ("a",), "data": {"buckets": ((1, 2),)}}
    assert read_config(tmp_path / "c.json") == {"class_names": ("a",)}
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json"):
        read_config(tmp_path / "broken.json")


def test_the_name_answers_to_a_call_even_after_the_command_was_imported():
    assert predict is sys.modules["dsct_jax.commands.predict"]
    assert (
        dsct_jax.predict(RedFinder(), [scene(80, 60, (10, 10, 50, 40))])[0][0].labels[0] == "angry"
    )


def test_the_names_of_many_drawings_are_found_quickly(tmp_path):
    files = [tmp_path / f"{i % 100}/{i}{'.jpg' if i % 7 else '.png'}" for i in range(20_000)]
    files += [tmp_path / "0/0.gif"]
    start = time.perf_counter()
    names = drawing_names(files, ".png")
    assert time.perf_counter() - start < 2.0  # 0.2 s; counting in a list took minutes
    assert names[files[1]].as_posix() == "1/1.png"
    assert {names[files[0]].as_posix(), names[files[-1]].as_posix()} == {
        "0/0.png.png",
        "0/0.gif.png",
    }


def test_a_thin_scan_is_drawn_in_little_memory(command, tmp_path, monkeypatch):
    """3000 x 3 pixels, enlarged to 480 pixels of height, would have been a decompression bomb."""
    scene(3000, 3, (40, 0, 400, 3)).save(tmp_path / "scan.png")
    assert command([f"{tmp_path}/scan.png", "--checkpoint=run", f"--output={tmp_path / 'o'}"]) == 0
    with Image.open(tmp_path / "o" / "drawn" / "scan.png") as drawing:
        assert drawing.width * drawing.height <= 16e6
    assert (tmp_path / "o" / "contact_sheet.png").exists()


def test_a_home_folder_is_a_home_folder(command, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert command(["~/images/a.png", "--checkpoint=~/run", "--output=~/out"]) == 0
    assert (tmp_path / "out" / "predictions.json").is_file()
    assert not (tmp_path / "~").exists()


def test_an_output_that_cannot_be_written_is_known_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "below", "/proc/nothing"):
        assert main(["predict", "missing.png", "--checkpoint=x", f"--output={output}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --output={output}: cannot be written"), error
        assert error.count("\n") == 1
