"""Dividing anew: groups stay whole, shares hold for every class, what is written is read back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from data.__main__ import main as data_main
from data.command import data_config
from data.readers.registry import read_split
from data.tools.split import assign


def main(argv: list[str]) -> int:
    return data_main(["split", *argv])


CONFIG = Path(__file__).parents[2] / "configs/caer_s_r50.py"
CLASSES = ("Anger", "Happy", "Sad")
SPLITS = ("train", "val", "test")


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 2**32 - 1))
def test_without_groups_every_class_is_divided_as_the_shares_say(strata, seed):
    chosen = assign(np.array(strata), np.arange(len(strata)), shares=(70, 10, 20), seed=seed)
    for label in set(strata):
        counts = np.bincount(chosen[np.array(strata) == label], minlength=3)
        assert (np.abs(counts - counts.sum() * np.array([0.7, 0.1, 0.2])) < 1).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=200), st.integers(0, 99))
def test_groups_are_never_divided_and_no_split_overflows(groups, seed):
    chosen = assign(np.zeros(len(groups), int), np.array(groups), shares=(7, 1, 2), seed=seed)
    for group in set(groups):
        assert len(set(chosen[np.array(groups) == group])) == 1
    largest = np.bincount(groups).max()
    assert (
        np.bincount(chosen, minlength=3) <= len(groups) * np.array([0.7, 0.1, 0.2]) + largest
    ).all()


def test_seeds_divide_differently_and_always_the_same_way():
    strata, groups = np.zeros(100, int), np.arange(100)
    first = assign(strata, groups, shares=(70, 10, 20), seed=1)
    np.testing.assert_array_equal(first, assign(strata, groups, shares=(70, 10, 20), seed=1))
    assert (first != assign(strata, groups, shares=(70, 10, 20), seed=2)).any()


@pytest.fixture
def folder(tmp_path) -> Path:
    """10 scenes of 3 frames that look alike, of 3 classes, in a train and a test list; two lines
    name a file again.
    """
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for scene in range(10):
        rng = np.random.default_rng(scene)
        picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(
            (64, 48), Image.Resampling.BICUBIC
        )
        for frame in range(3):
            split = "test" if frame == 2 else "train"
            name = f"{split}/{CLASSES[scene % 3]}/{scene:02}{frame}.png"
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            ImageEnhance.Brightness(picture).enhance(1 - 0.05 * frame).save(tmp_path / name)
            lists[split].append(f"{name},{CLASSES[scene % 3]},{scene}.25,2,{scene + 20}.5,30")
    lists["test"] += lists["train"][:2]
    for split, lines in lists.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def divide(folder: Path, *more: str) -> int:
    lists = ["--config.data.train=train.txt", "--config.data.test=test.txt"]
    return main(
        [
            f"--config={CONFIG}",
            f"--config.data.data_dir={folder}",
            *lists,
            f"--output={folder / 'splits'}",
            "--workers=2",
            *more,
        ]
    )


def read_back(folder: Path) -> dict[str, dict[str, tuple[list, list]]]:
    overrides = [
        f"--config.data.data_dir={folder}",
        *(f"--config.data.{split}=splits/{split}.json" for split in SPLITS),
    ]
    config = data_config(CONFIG, overrides)
    return {
        split: {
            record.name: (record.boxes.tolist(), record.labels.tolist())
            for record in read_split(config, split)[0]
        }
        for split in SPLITS
    }


def test_the_papers_division_and_what_was_read_comes_back(folder, capsys):
    assert divide(folder) == 0
    assert "30 images (2 listed more than once) in 30 groups" in capsys.readouterr().out
    found = read_back(folder)
    assert all(
        abs(len(found[split]) - expected) < len(CLASSES)
        for split, expected in zip(SPLITS, (21, 3, 6), strict=True)
    )
    together = found["train"] | found["val"] | found["test"]
    assert len(together) == 30
    config = data_config(
        CONFIG,
        [
            f"--config.data.data_dir={folder}",
            "--config.data.train=train.txt",
            "--config.data.test=test.txt",
        ],
    )
    given_records = {
        record.name: record
        for split in ("train", "test")
        for record in read_split(config, split)[0]
    }
    for name, record in given_records.items():
        assert together[name] == (record.boxes[:1].tolist(), record.labels[:1].tolist())
    info = json.loads((folder / "splits/val.json").read_text())["info"]
    assert info == {
        "by": "image",
        "seed": 0,
        "shares": [70, 10, 20],
        "near": 24,
        "from": ["train", "test"],
        "split": "val",
    }


def test_by_content_frames_of_a_scene_stay_together(folder, capsys):
    assert divide(folder, "--by=content", "--seed=3") == 0
    assert "in 10 groups, the largest of 3" in capsys.readouterr().out
    found = read_back(folder)
    scenes = {split: {Path(name).stem[:2] for name in found[split]} for split in SPLITS}
    assert sum(map(len, scenes.values())) == 10 and all(scenes.values())


def test_by_clip_a_file_says_what_belongs_together(folder, capsys):
    names = [
        line.split(",")[0]
        for split in ("train", "test")
        for line in (folder / f"{split}.txt").read_text().split()
    ]
    (folder / "clips.csv").write_text(
        "".join(f"{name},clip {Path(name).stem[:2]}\n" for name in names)
    )
    assert divide(folder, "--by=clip", f"--clips={folder / 'clips.csv'}") == 0
    scenes = {
        split: {Path(name).stem[:2] for name in found} for split, found in read_back(folder).items()
    }
    assert sum(map(len, scenes.values())) == 10
    (folder / "clips.csv").write_text(f"{names[0]},a\n")
    assert divide(folder, "--by=clip", f"--clips={folder / 'clips.csv'}") == 2
    assert f"has no line for {names[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shares=70,30"], "--shares: 70,30"),
        (["--from=train,tset"], "--from: 'tset'"),
        (["--by=clip"], "--clips=FILE"),
        (["--by=content", "--near=200"], "lower --near=200"),
        (["--config.data.source=scenes"], "config.data.train"),
    ],
)
def test_mistakes(folder, arguments, says, capsys):
    assert divide(folder, *arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1
