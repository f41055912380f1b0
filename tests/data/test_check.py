"""python -m data check on folders with everything that can be wrong, and on data with which nothing
is.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data.__main__ import main as data_main
from data.tools.duplicates import NEAR, duplicate_groups, exact_groups, fingerprint, near_groups


def main(argv: list[str]) -> int:
    return data_main(["check", *argv])


ROOT = Path(__file__).parents[2]
CLASSES = ("Anger", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")


def image(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Smooth noise: a picture with structure at every scale, as images have."""
    rng = np.random.default_rng(seed)
    picture = sum(
        np.asarray(
            Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            ),
            float,
        )
        / weight
        for side, weight in ((3, 2), (6, 4), (12, 8), (24, 8))
    )
    return Image.fromarray(picture.astype(np.uint8))


def save(root: Path, name: str, image: Image.Image, **options) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(root / name, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """CAER-S folders with lists: two images of each class in train, one in val and test."""
    seed = 0
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        lines = []
        for label in CLASSES:
            for number in range(count):
                seed += 1
                save(tmp_path, f"{split}/{label}/{number:04}.png", image(seed))
                lines.append(f"{split}/{label}/{number:04}.png,{label},{seed},10,{seed + 40},60")
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def check(folder: Path, *more: str, config: str = "caer_s_r50") -> int:
    names = [f"--config.data.{split}={split}.txt" for split in ("train", "val", "test")]
    return main(
        [
            f"--config={ROOT}/configs/{config}.py",
            f"--config.data.data_dir={folder}",
            *names,
            "--workers=2",
            *more,
        ]
    )


def test_no_problems(folder, capsys):
    assert check(folder) == 0
    printed = capsys.readouterr()
    assert (
        "protocol caer_s: CAER-S" in printed.out
        and "no problems found" in printed.out
        and not printed.err
    )
    rows = {
        line.split()[0]: line.split()[1:]
        for line in printed.out.splitlines()
        if line.startswith(("train ", "val ", "test ", "all ", "Anger ", "majority "))
    }
    assert rows["train"] == ["14", "-", "14", "-", "1.00", "1.00"] and rows["all"] == [
        "28",
        "~69982",
        "28",
        "~69982",
        "1.00",
        "1.00",
    ]
    assert (
        rows["Anger"] == ["2", "14.3%", "1", "14.3%", "1", "14.3%"]
        and rows["majority"] == ["14.3%"] * 3
    )


def test_built_in_scenes_have_no_duplicates(capsys):
    assert (
        main(
            [
                f"--config={ROOT}/configs/debug.py",
                "--config.data.train=120",
                "--config.data.val=30",
                "--config.data.test=30",
            ]
        )
        == 0
    )
    assert "protocol custom" in capsys.readouterr().out


def test_everything_that_can_be_wrong_is_told(folder, capsys):
    (folder / "train/Anger/0000.png").unlink()
    (folder / "train/Anger/0001.png").write_bytes(b"no image")
    cut = (folder / "train/Fear/0000.png").read_bytes()
    (folder / "train/Fear/0000.png").write_bytes(cut[: len(cut) // 2])
    save(
        folder, "test/Sad/0000.png", Image.open(folder / "train/Sad/0000.png"), compress_level=1
    )  # other bytes, the same pixels
    save(
        folder,
        "val/Happy/0000.png",
        ImageEnhance.Brightness(Image.open(folder / "train/Happy/0001.png").convert("RGB")).enhance(
            1.1
        ),
    )
    save(folder, "train/Neutral/0001.png", Image.open(folder / "train/Neutral/0000.png"))
    with (folder / "val.txt").open("a") as file:
        file.write("val/Sad/0000.png,Sad,-5,10,20,30\nval/Sad/0000.png,Sad,200,10,220,30\n")
    assert check(folder, f"--report={folder / 'report.json'}") == 1
    out = capsys.readouterr().out
    for line in (
        "! train: 2 files cannot be opened: 1 missing, 1 that are no images",
        "! train: 1 images cannot be decoded",
        "! train and test: 1 groups of the same image",
        "    train: train/Sad/0000.png = test: test/Sad/0000.png",
        f"! train and val: 1 groups of images that look alike (of 256 bits at most {NEAR} differ)",
        "    train: train/Happy/0001.png = val: val/Happy/0000.png",
        "- train, within it: 1 groups of the same image",
        "- val: 1 boxes cut at the image border",
        "- val: 1 boxes dropped",
        "- train: nobody has the label Anger",
        "4 errors, ",
    ):
        assert line in out, line
    assert (
        "train/Anger/0000.png: no such image file" in out
        and "train/Fear/0000.png: cannot be read" in out
    )
    assert (
        "val/Sad/0000.png, person 2, x1 y1 x2 y2 = [200.0, 10.0, 220.0, 30.0] of a 96x72 image"
        in out
    )
    report = json.loads((folder / "report.json").read_text())
    assert (
        report["protocol"] == "caer_s"
        and report["splits"]["train"]["missing"] == 1
        and report["splits"]["test"]["labels"]["Sad"] == 1
    )
    assert sum(finding["is_error"] for finding in report["findings"]) == 4


def test_counts_of_the_released_head_box_json_must_be_right(tmp_path, capsys):
    save(tmp_path, "mscoco/images/a.jpg", image(1))
    annotations = [
        {
            "id": 0,
            "image_id": 1,
            "category_id": 3,
            "bbox": [10, 10, 20, 20],
            "iscrowd": 0,
            "area": 400,
        }
    ]
    images = [{"id": 1, "file_name": "mscoco/images/a.jpg", "width": 72, "height": 96}]
    (tmp_path / "test.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": []})
    )
    assert (
        main(
            [
                f"--config={ROOT}/configs/emotic_r50.py",
                f"--config.data.data_dir={tmp_path}",
                "--split=test",
            ]
        )
        == 1
    )
    out = capsys.readouterr().out
    assert "protocol emotic_head_dsct" in out and "guessing: mAP" in out
    assert (
        "! test: 1 images, where emotic_head_dsct has 3682" in out
        and "! test: 1 people, where emotic_head_dsct has 5369" in out
    )
    assert "- test: 1 images annotated with width and height exchanged" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--split=trian"], "--split: 'trian'"),
        (["--near=200"], "--near=200"),
        (["--config.data.train=other.txt"], "other.txt: no such annotation file"),
        (["--config.class_names=('Anger','Disgust')"], "class 'Fear' is not in config.class_names"),
    ],
)
def test_what_cannot_be_used_at_all_is_one_line_and_status_2(folder, arguments, says, capsys):
    assert check(folder, *arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1


def test_what_fingerprints_survive_and_tell_apart(tmp_path):
    original = image(5, (320, 240))
    original.save(tmp_path / "low.jpg", quality=40)
    versions = [
        original,
        Image.open(tmp_path / "low.jpg").convert("RGB"),
        original.resize((160, 120)),
        ImageEnhance.Contrast(original).enhance(0.8),
    ]
    others = [image(seed, (320, 240)) for seed in range(10, 40)]
    prints = [fingerprint(image) for image in versions + others]
    assert (
        duplicate_groups(near_groups(prints)) == [[0, 1, 2, 3]]
        and duplicate_groups(exact_groups(prints)) == []
    )
    again = fingerprint(original.copy())
    assert again.exact == prints[0].exact and (again.bits == prints[0].bits).all()
    assert len(duplicate_groups(near_groups(prints, near=127))) == 1 and len(near_groups([])) == 0


def test_chains_of_likeness_are_one_group():
    prints = [fingerprint(image(1))] * 3
    first, second, third = (np.zeros(4, np.uint64) for _ in range(3))
    second[0], third[0] = 0xFF, 0xFFFF  # 8 bits from one to the next
    prints = [type(prints[0])(b"", bits) for bits in (first, third, second)]
    assert (
        duplicate_groups(near_groups(prints, near=8)) == [[0, 1, 2]]
        and duplicate_groups(near_groups(prints, near=7)) == []
    )
