"""The prepared form: the same records and pixels as the raw files, for every source, whatever
happens while it is being made.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs import base, demo
from data.__main__ import main as data_main
from data.config import DataConfig
from data.pipeline import make_dataset
from data.readers.prepared import folder, read_prepared
from data.readers.records import Record
from data.readers.registry import READERS, read_split
from data.tools import prepare as command
from data.tools.prepare import prepare, verify
from dsct_jax.errors import UserError


def main(argv: list[str]) -> int:
    return data_main(["prepare", *argv])


ROOT = Path(__file__).parents[2]
CSV_HEAD = "Index,Folder,Filename,Image Size,BBox,Categorical_Labels,Continuous_Labels,Gender,Age"


def make_config(root: Path, **changes: Any) -> DataConfig:
    values = base.get_config().data.to_dict() | {
        "data_dir": str(root),
        "class_names": base.CAER_S_CLASSES,
        "multi_label": False,
    }
    return DataConfig(**(values | changes))


def image(path: Path, seed: int, *, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), np.uint8)
    Image.fromarray(pixels).resize(size).convert(mode).save(path)


def coco(root: Path, **changes: Any) -> DataConfig:
    """Files of several kinds: JPEG in grey and in CMYK, PNG with a palette, GIF; one image without
    anybody.
    """
    kinds = (
        ("a.jpg", "RGB"),
        ("b.jpg", "L"),
        ("c.jpg", "CMYK"),
        ("d.png", "P"),
        ("e.gif", "P"),
        ("f.png", "RGBA"),
        ("g/h.jpg", "RGB"),
    )
    people = [
        (number, {"bbox": [2 * number, 3, 9.5, 12.25], "category_id": number % 7})
        for number in (0, 0, 1, 3, 4, 5, 6)
    ]
    for split in ("train", "val", "test"):
        for seed, (name, mode) in enumerate(kinds):
            image(root / split / name, seed, mode=mode, size=(60, 40) if seed % 2 else (40, 60))
        document = {
            "images": [
                {"id": number, "file_name": f"{split}/{name}"}
                for number, (name, _) in enumerate(kinds)
            ],
            "annotations": [
                {"id": number, "image_id": image, **person}
                for number, (image, person) in enumerate(people)
            ],
        }
        (root / f"{split}.json").write_text(json.dumps(document))
    return make_config(root, source="coco", **changes)


def coco_lists(root: Path) -> DataConfig:
    config = coco(root, multi_label=True)
    for split in ("train", "val", "test"):
        document = json.loads((root / f"{split}.json").read_text())
        for annotation in document["annotations"]:
            annotation["category_id"] = [
                annotation["category_id"],
                (annotation["category_id"] + 2) % 7,
            ]
        (root / f"{split}.json").write_text(json.dumps(document))
    return config


def caer_s(root: Path) -> DataConfig:
    for seed, name in enumerate(
        ("train/Sad/0001.png", "train/Happy/0002.png", "test/Fear/0001.png")
    ):
        image(root / name, seed)
    (root / "train.txt").write_text(
        "train/Sad/0001.png,Sad,1,2,11,12\ntrain/Happy/0002.png,Happy,-3,2,11.5,12\n"
    )
    (root / "test.txt").write_text("test/Fear/0001.png,Fear,1,2,11,12\n")
    return make_config(root, source="caer_s", train="train.txt", val="train.txt", test="test.txt")


def ncaer_s(root: Path) -> DataConfig:
    for split in ("train", "val", "test"):
        for seed, name in enumerate(("Sad/a", "Anger/b")):
            image(root / "images" / split / f"{name}.jpg", seed)
            crop = root / "crop" / split / f"{name}.txt"
            crop.parent.mkdir(parents=True, exist_ok=True)
            crop.write_text("1,2,11,12\n3,4,8,9\n")
    return make_config(root, source="ncaer_s", train="train", val="val", test="test")


def emotic(root: Path) -> DataConfig:
    for name in ("a.jpg", "b.jpg"):
        image(root / "mscoco/images" / name, len(name))
    rest = """"['Disconnection', 'Doubt/Confusion']","[5.0, 3.0, 9.0]",Male,Adult"""
    lines = f"""0,mscoco/images,a.jpg,"[40, 30]","[-1, 2, 11, 12]",{rest}
1,mscoco/images,b.jpg,"[30, 40]","[0, 0, 5, 5]",[],"[5, 3.0, 9.0]",Male,Adult"""
    (root / "all.csv").write_text(f"{CSV_HEAD}\n{lines}\n")
    files = dict.fromkeys(("train", "val", "test"), "all.csv")
    return make_config(
        root,
        source="emotic",
        class_names=base.EMOTIC_CLASSES,
        multi_label=True,
        person_box="body",
        **files,
    )


def scenes(root: Path) -> DataConfig:
    return make_config(root, source="scenes", train="5", val="3", test="2")


SOURCES: dict[str, Callable[[Path], DataConfig]] = {
    "coco": coco,
    "coco, lists": coco_lists,
    "caer_s": caer_s,
    "ncaer_s": ncaer_s,
    "emotic": emotic,
    "scenes": scenes,
}


def prepared(config: DataConfig, output: Path) -> DataConfig:
    return dataclasses.replace(config, source="prepared", data_dir=str(output))


def demo_config(output: Path) -> DataConfig:
    config = demo.get_config()
    values = config.data.to_dict() | {"source": "prepared", "data_dir": str(output)}
    return DataConfig(**values, class_names=config.class_names, multi_label=False)


def assert_same(one: Record, other: Record) -> None:
    for field in ("image_id", "width", "height", "name", "cues"):
        assert getattr(one, field) == getattr(other, field), field
    for field in ("boxes", "labels"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert getattr(one, field).dtype == getattr(other, field).dtype == np.float32
    np.testing.assert_array_equal(np.asarray(one.load()), np.asarray(other.load()))


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_source_is_tried():
    assert {name.split(",")[0] for name in SOURCES} | {"prepared"} == set(READERS)


@pytest.mark.parametrize("source", SOURCES)
def test_the_prepared_form_is_the_raw_data(source, tmp_path):
    config = SOURCES[source](tmp_path / "raw")
    output = tmp_path / "prepared"
    prepare(config, output, shard_images=3, workers=2)
    for split in ("train", "val", "test"):
        (raw, raw_report), (found, report) = (
            read_split(config, split),
            read_split(prepared(config, output), split),
        )
        assert report == raw_report
        assert len(raw) == len(found) > 0
        for one, other in zip(raw, found, strict=True):
            assert_same(one, other)


def test_anybody_can_read_it_with_tensorflow_datasets(tmp_path):
    import tensorflow_datasets as tfds

    config = coco(tmp_path)
    prepare(config, tmp_path / "out", shard_images=2)
    source = tfds.data_source(
        "dsct",
        split="val",
        data_dir=tmp_path / "out",
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    for record, example in zip(read_split(config, "val")[0], source, strict=True):
        assert (
            example["image"] == record.image.read_bytes()
            and example["name"].decode() == record.name
        )
        np.testing.assert_array_equal(example["boxes"], record.boxes)
        np.testing.assert_array_equal(example["labels"], record.labels)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_same_batches(tmp_path, workers):
    small = {
        "short_sides": (48,),
        "max_long_side": 96,
        "crop_probability": 0.0,
        "eval_short_side": 48,
        "buckets": ((96, 96),),
        "num_workers": workers,
    }
    config = coco(tmp_path / "raw", **small)
    prepare(config, tmp_path / "out", shard_images=2)
    streams = [
        make_dataset(one, "train", batch_size=4, seed=1, training=True).iterator(0, 4)
        for one in (config, prepared(config, tmp_path / "out"))
    ]
    for one, other in zip(*streams, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.targets.boxes, other.targets.boxes)


def test_smaller_images_and_their_boxes(tmp_path):
    config = coco(tmp_path / "raw")
    prepare(config, tmp_path / "out", short_side=20)
    for raw, small in zip(
        read_split(config, "train")[0],
        read_split(prepared(config, tmp_path / "out"), "train")[0],
        strict=True,
    ):
        assert (small.width, small.height) == (raw.width // 2, raw.height // 2) == small.load().size
        np.testing.assert_allclose(small.boxes, raw.boxes / 2)
    prepare(config, tmp_path / "same", short_side=40)  # nothing is longer: nothing is encoded again
    for raw, same in zip(
        read_split(config, "train")[0],
        read_split(prepared(config, tmp_path / "same"), "train")[0],
        strict=True,
    ):
        assert_same(raw, same)


def test_damaged_images(tmp_path):
    config = coco(tmp_path / "raw")
    whole = (tmp_path / "raw/train/a.jpg").read_bytes()
    (tmp_path / "raw/train/a.jpg").write_bytes(whole[: len(whole) // 2])
    assert "a.jpg: cannot be read as an image" in one_line(
        lambda: prepare(config, tmp_path / "out")
    )
    lenient = dataclasses.replace(config, skip_corrupt=True)
    prepare(lenient, tmp_path / "out2")
    records, report = read_prepared(prepared(lenient, tmp_path / "out2"), "train")
    assert [record.name for record in records] == [
        f"train/{name}" for name in ("b.jpg", "c.jpg", "d.png", "e.gif", "f.png", "g/h.jpg")
    ]
    assert (report.images, report.people, report.unreadable) == (
        6,
        5,
        1,
    ) and "a.jpg" in report.unreadable_images[0]
    assert records[0].load().size == (60, 40)
    (tmp_path / "raw/train/a.jpg").write_bytes(
        whole
    )  # repaired: goes on, and the shards that are there stay
    assert one_line(lambda: prepare(config, tmp_path / "out")).endswith(
        "remove the folder"
    )  # other data than when it was begun


def test_killed_anywhere_and_run_again_it_is_complete_and_correct(tmp_path):
    whole = tmp_path / "whole"
    argv = [
        "--config=configs/demo.py",
        "--config.data.train=60",
        "--config.data.val=9",
        "--config.data.test=9",
        "--shard_images=4",
        "--workers=2",
    ]
    assert main([*argv, f"--output={whole}"]) == 0
    output = tmp_path / "killed"
    call = [sys.executable, "-m", "data", "prepare", *argv, f"--output={output}"]
    for shards in (1, 5, 12, 15):
        process = subprocess.Popen(
            call,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while (
            process.poll() is None
            and len(list(output.rglob("*.done"))) < shards
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.done")}
    finished = {path.with_suffix(""): path.with_suffix("").stat().st_mtime_ns for path in kept}
    assert main([*argv, f"--output={output}"]) == 0
    assert all(
        path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items()
    )  # what was done is not done again
    for split in ("train", "val", "test"):
        for one, other in zip(
            *(read_prepared(demo_config(path), split)[0] for path in (whole, output)), strict=True
        ):
            assert_same(one, other)
    assert verify(output) == verify(whole) == 15 + 3 + 3 + 3
    assert (
        not list(output.rglob("*.tmp"))
        and not list(output.rglob("*.done"))
        and not list(output.rglob("plan.json"))
    )


def test_a_full_disk_is_one_line_and_the_next_call_goes_on(tmp_path, monkeypatch):
    config = scenes(tmp_path)
    sums = command.sha256

    def no_room(path: Path) -> str:
        if path.name.startswith("dsct-val"):
            raise OSError(28, "No space left on device")
        return sums(path)

    monkeypatch.setattr(command, "sha256", no_room)
    assert "No space left on device); make room and run the same command again" in one_line(
        lambda: prepare(config, tmp_path / "out")
    )
    monkeypatch.setattr(command, "sha256", sums)
    prepare(config, tmp_path / "out")
    assert len(read_prepared(prepared(config, tmp_path / "out"), "val")[0]) == 3


def test_mistakes(tmp_path, capsys):
    config, output = scenes(tmp_path), tmp_path / "out"
    assert "prepared.json: no such file" in one_line(
        lambda: read_prepared(prepared(config, output), "train")
    )
    prepare(config, output, splits=["train", "val"], shard_images=2)
    ready = prepared(config, output)
    assert "holds the splits train, val and no test" in one_line(
        lambda: read_prepared(ready, "test")
    )
    other = dataclasses.replace(ready, class_names=tuple(reversed(ready.class_names)))
    assert "prepared for config.class_names=" in one_line(lambda: read_prepared(other, "train"))
    assert "max_targets=1" in one_line(
        lambda: read_prepared(dataclasses.replace(ready, max_targets=1), "train")
    )
    more = dataclasses.replace(config, train="6")
    assert "holds the prepared form of other data" in one_line(
        lambda: prepare(more, output, splits=["train", "val"], shard_images=2)
    )
    assert "cannot be prepared again" in one_line(lambda: prepare(ready, tmp_path / "again"))
    shard = next(folder(output).glob("dsct-train*00000-of*"))
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-100])
    assert "dsct-train.array_record-00000-of-00003" in one_line(
        lambda: read_prepared(ready, "train")
    )
    shard.write_bytes(intact[:200] + bytes(len(intact) - 200))
    assert "differs from its checksum" in one_line(lambda: verify(output))
    assert "damaged" in one_line(lambda: read_prepared(ready, "train")[0][1].load())
    for argv, says in (
        (["--shard_images=0"], "--shard_images=0"),
        (["--config.data.trian=3"], "did you mean"),
        (["--split=all"], "--split"),
    ):
        assert main(["--config=configs/demo.py", f"--output={tmp_path / 'x'}", *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error
