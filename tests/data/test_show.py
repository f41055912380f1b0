"""The sheet of samples: what is on it, and clear words when it cannot be drawn."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from configs import demo
from data.__main__ import main as data_main
from data.augment import Transform
from data.config import DataConfig
from data.tools.show import describe, sample_sheet


def main(argv: list[str]) -> int:
    return data_main(["show", *argv])


def scenes(**changes) -> DataConfig:
    config = demo.get_config()
    values = config.data.to_dict() | {"train": "7", "val": "7", "test": "7"} | changes
    return DataConfig(**values, class_names=config.class_names, multi_label=False)


def test_a_sheet_has_a_pair_for_each_image_and_is_the_same_every_time():
    sheet = sample_sheet(scenes(), "train", count=5, seed=3)
    again = sample_sheet(scenes(), "train", count=5, seed=3)
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(again))
    assert not np.array_equal(
        np.asarray(sheet), np.asarray(sample_sheet(scenes(), "train", count=5, seed=4))
    )
    width, height = sheet.size
    rows = np.asarray(sheet).min(2) < 250  # not white
    columns = [rows[:, start : start + 360].mean() for start in range(9, width, 369)]
    assert len(columns) == 6 and min(columns) > 0.2 and height > 2 * 300  # three pairs above two


def test_more_images_than_there_are_is_all_of_them():
    whole, more = (sample_sheet(scenes(), "val", count=count, seed=0) for count in (7, 70))
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(more))


def test_evaluation_is_only_resized():
    plain = dataclasses.replace(scenes(), flip_probability=1.0, color_jitter=1.0)
    np.testing.assert_array_equal(
        np.asarray(sample_sheet(plain, "test", count=2, seed=0)),
        np.asarray(sample_sheet(scenes(), "test", count=2, seed=0)),
    )


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (Transform((96, 128)), "128x96"),
        (
            Transform((96, 128), flip=True, crop_resize=(120, 160), crop=(3, 4, 50, 60)),
            "128x96, flipped, crop 60x50",
        ),
        (Transform((96, 128), saturation=0.0, contrast=1.1), "128x96, gray"),
        (Transform((96, 128), contrast=1.1), "128x96, colors"),
    ],
)
def test_transforms_in_words(transform, text):
    assert describe(transform) == text


def test_the_command(tmp_path, capsys):
    output = tmp_path / "deep" / "sheet.png"
    argv = ["--config=configs/demo.py", "--config.data.val=4", "--split=val", "-n", "3"]
    assert main([*argv, f"--output={output}"]) == 0
    with Image.open(output) as sheet:
        assert sheet.width > 2000
    for wrong, says in (
        (["-n", "0"], "--count=0"),
        ([f"--output={tmp_path / 'sheet.xyz'}"], "sheet.xyz"),
        (["--split=all"], "--split"),
    ):
        assert main([*argv, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error
