"""Pixels and boxes belong to the same picture, whatever the orientation of a file (rows 1, 2 and 35
of the field test): pictures with a red face whose place is known.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dsct_jax
from configs import base
from data.__main__ import main
from data.config import DataConfig
from data.pipeline import make_dataset
from data.readers.coco import read_coco
from data.readers.records import ReadReport, Record
from dsct_jax.errors import UserError
from dsct_jax.inference.predict import read_rgb
from dsct_jax.preprocess import decode_image, open_image, orientation

CLASSES = ("Anger", "Happy")
CONFIG = Path(__file__).parents[2] / "configs/debug.py"
T = Image.Transpose
STORED = {  # how an upright picture is stored under each orientation
    1: None,
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}
FAR, NEAR = (110, 40, 150, 90), (20, 30, 70, 90)  # x1 y1 x2 y2: FAR leaves a picture of 120x160


def save(path: Path, box: tuple[int, ...], turn: int, **options: Any) -> None:
    """A 160x120 picture, upright, with a red box."""
    picture = Image.new("RGB", (160, 120), (20, 60, 90))
    picture.paste((230, 20, 20), box)
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = picture if STORED[turn] is None else picture.transpose(STORED[turn])
    stored.save(path, exif=exif, **options)


def stored_box(box: tuple[int, ...], turn: int) -> list[int]:
    """Where the box lies in the stored pixels."""
    mask = Image.new("L", (160, 120))
    mask.paste(255, box)
    return list((mask if STORED[turn] is None else mask.transpose(STORED[turn])).getbbox())


def write(
    folder: Path, boxes: list, turns: list[int], *, size: Any = None, frame="upright", **more
):
    """Images of these orientations with boxes in `frame`; `size`: annotated (width, height)."""
    document: dict[str, Any] = {"images": [], "annotations": []}
    document["categories"] = [{"id": 1, "name": "Anger"}, {"id": 2, "name": "Happy"}]
    for number, (box, turn) in enumerate(zip(boxes, turns, strict=True)):
        save(folder / f"{number}.png", box, turn)
        x1, y1, x2, y2 = box if frame == "upright" else stored_box(box, turn)
        image = {"id": number, "file_name": f"{number}.png"}
        if size is not None:
            image |= {"width": size[0], "height": size[1]}
        document["images"].append(image)
        person = {"id": number, "image_id": number, "category_id": 1 + number % 2}
        document["annotations"].append(person | {"bbox": [x1, y1, x2 - x1, y2 - y1]} | more)
    (folder / "train.json").write_text(json.dumps(document))


def config(folder: Path, **changes: Any) -> DataConfig:
    values = base.get_config().data.to_dict() | {"source": "coco", "data_dir": str(folder)}
    return DataConfig(**values | changes, class_names=CLASSES, multi_label=False)


def read(folder: Path, **changes: Any) -> tuple[list[Record], ReadReport]:
    return read_coco(config(folder, **changes), "train")


def faces(records: list[Record]) -> list[bool]:
    """Whether each box holds the red face, and nothing else does."""
    found = []
    for record in records:
        pixels = np.asarray(record.load()).astype(int)
        assert pixels.shape == (record.height, record.width, 3)
        red = pixels[..., 0] - pixels[..., 1] > 100
        rows, columns = np.nonzero(red)
        place = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        found.append(bool(np.abs(record.boxes[0] - place).max() <= 1))
    return found


@pytest.mark.parametrize(
    ("boxes", "turn", "size", "frame"),
    [
        ([FAR] * 3, 6, (120, 160), "upright"),  # row 1: the size is the stored one
        ([NEAR, NEAR, FAR], 6, (120, 160), "upright"),  # one of them tells
        ([FAR] * 3, 6, None, "upright"),
        ([NEAR] * 3, 6, (160, 120), "upright"),  # row 2: the size tells
        ([NEAR] * 3, 8, (320, 240), "upright"),
        ([FAR] * 3, 5, None, "upright"),
        ([FAR] * 3, 7, (120, 160), "upright"),
        ([NEAR] * 3, 6, (120, 160), "stored"),
        ([FAR] * 3, 8, None, "stored"),
        ([NEAR] * 3, 7, None, "stored"),
    ],
)
def test_sizes_and_boxes_decide(tmp_path, boxes, turn, size, frame):
    more = {"bbox": [40, 60, 100, 120]} if size == (320, 240) else {}
    write(tmp_path, boxes, [turn] * 3, size=size, frame=frame, **more)
    records, report = read(tmp_path)
    assert faces(records) == [True] * 3
    upright = 3 if frame == "upright" else 0
    assert f"3 images carry an EXIF orientation (first: 0.png): {upright} read upright" in str(
        report
    )
    assert report.suspicions() == [] and report.swapped == 0


def test_what_cannot_be_decided_is_an_error_until_it_is_set(tmp_path, capsys):
    write(tmp_path, [NEAR] * 3, [6] * 3, size=(120, 160))
    flags = [
        f"--config={CONFIG}",
        "--config.data.source=coco",
        f"--config.data.data_dir={tmp_path}",
    ]
    flags += ["--config.data.train=train.json", "--config.class_names=('Anger','Happy')"]
    assert main(["check", *flags, "--split=train", "--near=0"]) == 1
    line = "! train: 3 images with an EXIF orientation (first: 0.png): nothing says whether"
    assert line in capsys.readouterr().out
    main(["check", *flags, "--split=train", "--near=0", "--config.data.exif=upright"])
    out = capsys.readouterr().out
    assert "nothing says" not in out and "3 read upright" in out
    assert faces(read(tmp_path, exif="upright")[0]) == [True] * 3
    write(tmp_path, [NEAR] * 3, [6] * 3, frame="stored")
    assert faces(read(tmp_path, exif="stored")[0]) == [True] * 3
    assert "fit the other picture" in str(read(tmp_path, exif="upright")[1])


def test_turned_by_half_or_mirrored_follow_the_others(tmp_path):
    write(tmp_path, [FAR, NEAR, NEAR, NEAR], [6, 3, 2, 4])
    records, report = read(tmp_path)
    assert faces(records) == [True] * 4 and report.suspicions() == []
    write(tmp_path, [NEAR] * 3, [3] * 3, size=(160, 120))
    records, report = read(tmp_path)
    assert faces(records) == [True] * 3 and "nothing says" in report.suspicions()[0]


def test_files_without_an_orientation_are_as_before(tmp_path):
    write(tmp_path, [FAR, NEAR], [1, 1], size=(120, 160))  # as some images of EMOTIC
    records, report = read(tmp_path)
    assert faces(records) == [True] * 2 and report.swapped == 2
    assert not any("EXIF" in line for line in report.lines())


def test_another_size_of_the_same_shape_scales_and_another_shape_is_refused(tmp_path):
    write(tmp_path, [NEAR] * 2, [1, 1], size=(80, 60), bbox=[10, 15, 25, 30])
    records, report = read(tmp_path)
    assert faces(records) == [True] * 2
    assert report.resized == 2 and "annotated in another size of the same shape" in str(report)
    write(tmp_path, [FAR] * 2, [1, 1], size=(80, 60))  # the boxes are in pixels of the file
    records, report = read(tmp_path)
    assert faces(records) == [True] * 2 and report.resized == 0
    write(tmp_path, [NEAR] * 2, [1, 1], size=(100, 100))
    with pytest.raises(UserError, match=r"0.png: is 160x120, but annotated as 100x100: correct"):
        read(tmp_path)
    write(tmp_path, [NEAR] * 2, [1, 1], size=(0, 0))  # says nothing
    assert faces(read(tmp_path)[0]) == [True] * 2


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_reader_turns_every_format_alike(tmp_path, suffix, turn):
    path = tmp_path / f"a.{suffix}"
    save(path, FAR, turn, **({"lossless": True} if suffix == "webp" else {}))
    expected = np.asarray(decode_image(path, upright=True)).astype(int)
    assert expected.shape == (120, 160, 3)
    red = expected[..., 0] - expected[..., 1] > 100
    assert red[45:85, 115:145].all() and red.sum() == pytest.approx(40 * 50, abs=120)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(read_rgb(image)), expected)
    np.testing.assert_array_equal(np.asarray(read_rgb(path)), expected)
    again = read_rgb(read_rgb(path))  # what is upright is not turned once more
    np.testing.assert_array_equal(np.asarray(again), expected)
    with open_image(path, max_megapixels=1.0) as image:
        told = orientation(image)
        assert told == (1 if suffix == "tif" else turn)
        stored = image.width, image.height
    plain = decode_image(path)
    assert plain.size == stored  # what a reader took for the size is what is read


def test_exif_behind_the_pixels_of_a_png_is_found(tmp_path):
    path = tmp_path / "a.png"
    save(path, FAR, 6)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4])
    chunk, rest = content[start:end], content[:start] + content[end:]
    path.write_bytes(rest[:-12] + chunk + rest[-12:])  # before IEND
    with open_image(path, max_megapixels=1.0) as image:
        assert "exif" not in image.info and orientation(image) == 6


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_is_none(tmp_path, exif):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    assert decode_image(tmp_path / "a.jpg", upright=True).size == (8, 6)


def test_training_show_split_samples_and_the_prepared_form_see_the_same(tmp_path, capsys):
    pytest.importorskip("tensorflow_datasets")
    write(tmp_path, [FAR, NEAR, FAR, NEAR, NEAR, FAR], [6, 8, 3, 1, 5, 6])
    records, _ = read(tmp_path)
    assert faces(records) == [True] * 6
    changes = {
        "num_workers": 0,
        "eval_short_side": 120,
        "max_long_side": 160,
        "buckets": ((160, 160),),
    }
    data = make_dataset(config(tmp_path, **changes), "train", batch_size=6, seed=0, training=False)
    (batch,) = data.iterator()
    for record, image, size in zip(records, batch.images, batch.sizes, strict=True):
        np.testing.assert_array_equal(image[: size[0], : size[1]], np.asarray(record.load()))
    flags = [
        f"--config={CONFIG}",
        "--config.data.source=coco",
        f"--config.data.data_dir={tmp_path}",
    ]
    flags += ["--config.data.train=train.json", "--config.class_names=('Anger','Happy')"]
    assert main(["split", *flags, "--from=train", f"--output={tmp_path / 'splits'}"]) == 0
    again = [
        record
        for split in ("train", "val", "test")
        for record in read(tmp_path, train=f"splits/{split}.json")[0]
    ]
    assert sorted(one.name for one in again) == [f"{n}.png" for n in range(6)]
    assert faces(again) == [True] * 6
    assert main(["prepare", *flags, "--split=train", f"--output={tmp_path / 'prepared'}"]) == 0
    from data.readers.prepared import read_prepared

    prepared, _ = read_prepared(config(tmp_path / "prepared", source="prepared"), "train")
    for one, other in zip(prepared, records, strict=True):
        np.testing.assert_array_equal(np.asarray(one.load()), np.asarray(other.load()))
    assert main(["samples", *flags, "--split=train", "-n", "6", f"--output={tmp_path / 's'}"]) == 0
    for record in records:
        with Image.open(tmp_path / "s" / f"train_{record.image_id:05}.png") as image:
            assert orientation(image) == 1 and image.size == (record.width, record.height)


def test_the_library_reads_a_picture_as_the_command_does(tmp_path):
    """Row 35: the same people, whether a path or an open picture is given."""
    assert dsct_jax.predict is not None
    save(tmp_path / "a.jpg", FAR, 6, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(
            np.asarray(read_rgb(image)), np.asarray(read_rgb(tmp_path / "a.jpg"))
        )
