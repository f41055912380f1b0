"""`python -m data import`: exports of annotation tools, written here as their documentation has
them, with photographs of a turned phone among them, become a data set and a configuration.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from PIL import Image, ImageDraw

from configs import base
from data.__main__ import main
from data.command import data_config
from data.config import DataConfig
from data.readers.coco import read_coco
from data.readers.records import Record
from data.tools.split import fill_empty
from dsct_jax.config import read_config
from dsct_jax.training.config import LossConfig

ROOT = Path(__file__).parents[2]
COLORS = {"Anger": (230, 30, 30), "Happy": (240, 220, 40), "Sad": (50, 80, 230)}
NAMES = tuple(COLORS)
TURN_BACK = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
Photograph = tuple[str, int, list[tuple[str, tuple[int, int, int, int]]]]


def photographs(folder: Path, count: int, seed: int = 0) -> list[Photograph]:
    """`count` upright 160x120 pictures of one or two round faces, whose color is their emotion;
    every third is stored turned. (name, orientation, [(emotion, x y width height)]) of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    result: list[Photograph] = []
    for number in range(count):
        noise = rng.integers(60, 150, (6, 8, 3), np.uint8)
        picture = Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)
        draw, people = ImageDraw.Draw(picture), []
        for place in rng.permutation(2)[: rng.integers(1, 3)].tolist():
            size = int(rng.integers(36, 56))
            x, y = int(rng.integers(2, 76 - size)) + 80 * place, int(rng.integers(4, 116 - size))
            emotion = NAMES[(number + place) % 3]
            draw.ellipse((x, y, x + size, y + size), COLORS[emotion])
            for eye in (0.35, 0.65):
                draw.circle((x + eye * size, y + 0.4 * size), 3, (0, 0, 0))
            people.append((emotion, (x, y, size + 1, size + 1)))
        turn = (1, 6, 3)[number % 3]
        exif = Image.Exif()
        exif[0x0112] = turn
        stored = picture if TURN_BACK[turn] is None else picture.transpose(TURN_BACK[turn])
        name = f"IMG {number:04}.jpg"
        stored.save(folder / name, exif=exif, quality=95)
        result.append((name, turn, people))
    return result


def roboflow(top: Path) -> None:
    """Folders of splits, a super-category, sizes of the upright picture."""
    for split, count, seed in (("train", 9, 0), ("valid", 3, 1), ("test", 3, 2)):
        names = [{"id": 0, "name": "emotions", "supercategory": "none"}]
        names += [
            {"id": n, "name": one, "supercategory": "emotions"} for n, one in enumerate(NAMES, 1)
        ]
        document: dict[str, Any] = {
            "info": {},
            "categories": names,
            "images": [],
            "annotations": [],
        }
        for number, (name, _, people) in enumerate(photographs(top / split, count, seed)):
            about = {"id": number, "license": 1, "file_name": name, "height": 120, "width": 160}
            document["images"].append(about)
            for emotion, box in people:
                person = {"id": len(document["annotations"]), "image_id": number, "bbox": [*box]}
                person |= {
                    "category_id": 1 + NAMES.index(emotion),
                    "segmentation": [],
                    "iscrowd": 0,
                }
                document["annotations"].append(person)
        (top / split / "_annotations.coco.json").write_text(json.dumps(document))


def cvat_coco(top: Path) -> None:
    """Everybody is a person, the emotion is an attribute."""
    document: dict[str, Any] = {"images": [], "annotations": []}
    document["categories"] = [{"id": 1, "name": "person", "supercategory": ""}]
    for number, (name, _, people) in enumerate(photographs(top / "images" / "default", 12), 1):
        about = {"id": number, "file_name": name, "height": 120, "width": 160}
        document["images"].append(about)
        for emotion, box in people:
            person = {"id": len(document["annotations"]) + 1, "image_id": number, "bbox": [*box]}
            values = {"occluded": False, "rotation": 0.0, "emotion": emotion}
            document["annotations"].append(person | {"category_id": 1, "attributes": values})
    (top / "annotations").mkdir()
    (top / "annotations" / "instances_default.json").write_text(json.dumps(document))


def cvat_xml(top: Path) -> None:
    """CVAT for images 1.1."""
    lines = ["<?xml version='1.0' encoding='utf-8'?>", "<annotations><version>1.1</version>"]
    for number, (name, _, people) in enumerate(photographs(top / "images", 12)):
        lines.append(f"<image id='{number}' name={quoteattr(name)} width='160' height='120'>")
        for emotion, (x, y, width, height) in people:
            corners = f"xtl='{x:.2f}' ytl='{y:.2f}' xbr='{x + width:.2f}' ybr='{y + height:.2f}'"
            lines.append(f"<box label='person' source='manual' occluded='0' {corners} z_order='0'>")
            lines.append(f"<attribute name='emotion'>{emotion}</attribute></box>")
        lines.append("</image>")
    (top / "annotations.xml").write_text("\n".join([*lines, "</annotations>"]))


def label_studio(top: Path, *, short: bool = False) -> None:
    """JSON, or JSON-MIN (`short`): boxes in percent, names that an upload has changed."""
    tasks = []
    for number, (name, _, people) in enumerate(photographs(top / "images", 12), 1):
        shown = f"/data/upload/1/0a1b2c3d-{name.replace(' ', '%20')}"
        results = []
        for place, (emotion, (x, y, width, height)) in enumerate(people):
            box = {"x": x / 1.6, "y": y / 1.2, "width": width / 1.6, "height": height / 1.2}
            value = {**box, "rotation": 0, "rectanglelabels": [emotion]}
            size = {"original_width": 160, "original_height": 120}
            if short:
                results.append(value | size)
                continue
            about = {"id": f"r{place}", "type": "rectanglelabels", "from_name": "label"}
            results.append(
                {**about, "to_name": "image", "image_rotation": 0, **size, "value": value}
            )
        if short:
            tasks.append({"image": shown, "id": number, "label": results, "annotator": 1})
            continue
        answers = [{"id": number, "was_cancelled": False, "result": results}]
        tasks.append({"id": number, "data": {"image": shown}, "annotations": answers})
    (top / "project-1.json").write_text(json.dumps(tasks))


def via_regions(people: list) -> list[dict[str, Any]]:
    return [
        {
            "shape_attributes": {"name": "rect", "x": x, "y": y, "width": width, "height": height},
            "region_attributes": {"emotion": emotion},
        }
        for emotion, (x, y, width, height) in people
    ]


def via_json(top: Path) -> None:
    """A project; images are in a folder beside it."""
    files = {}
    for name, _, people in photographs(top / "photographs", 12):
        about = {"filename": name, "size": 1000, "file_attributes": {}}
        files[f"{name}1000"] = about | {"regions": via_regions(people)}
    document = {"_via_settings": {}, "_via_img_metadata": files, "_via_attributes": {}}
    (top / "via_project.json").write_text(json.dumps(document))


def via_csv(top: Path) -> None:
    columns = ["filename", "file_size", "file_attributes", "region_count", "region_id"]
    columns += ["region_shape_attributes", "region_attributes"]
    with (top / "via_export.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for name, _, people in photographs(top, 12):
            for number, region in enumerate(via_regions(people)):
                texts = [json.dumps(value) for value in region.values()]
                writer.writerow([name, 1000, "{}", len(people), number, *texts])


EXPORTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "roboflow": (roboflow, []),
    "cvat_coco": (cvat_coco, ["--label-attribute=emotion"]),
    "cvat_xml": (cvat_xml, ["--label-attribute=emotion"]),
    "label_studio": (label_studio, []),
    "label_studio_min": (lambda top: label_studio(top, short=True), []),
    "via_json": (via_json, []),
    "via_csv": (via_csv, []),
}


def emotions_seen(records: list[Record], class_names: tuple[str, ...]) -> list[bool]:
    """For each person whether the box holds a face of the color of its label, to its borders."""
    seen = []
    for record in records:
        pixels = np.asarray(record.load()).astype(int)
        for (x1, y1, x2, y2), row in zip(
            record.boxes.round().astype(int), record.labels, strict=True
        ):
            color = np.array(COLORS[class_names[int(row.argmax())]])
            found = np.abs(pixels[y1:y2, x1:x2] - color).sum(-1) < 60
            rows, columns = np.nonzero(found)
            wide = np.ptp(columns) + 1 >= 0.9 * (x2 - x1) and np.ptp(rows) + 1 >= 0.9 * (y2 - y1)
            seen.append(bool(wide and found.mean() > 0.6))
    return seen


@pytest.mark.parametrize("tool", EXPORTS)
def test_every_export_becomes_a_data_set(tool, tmp_path, capsys):
    write, flags = EXPORTS[tool]
    export, output = tmp_path / "export", tmp_path / "mine"
    export.mkdir()
    write(export)
    assert main(["import", str(export), f"--output={output}", "--like=debug", *flags]) == 0
    out = capsys.readouterr().out
    assert f"train: python train.py --config={output}/config.py --workdir=runs/mine" in out
    config = data_config(output / "config.py")
    assert sorted(config.class_names) == [*NAMES] and not config.multi_label
    found = {split: read_coco(config, split)[0] for split in ("train", "val", "test")}
    count = 15 if tool == "roboflow" else 12
    assert sum(map(len, found.values())) == count and min(map(len, found.values())) > 0
    if tool == "roboflow":
        assert [len(records) for records in found.values()] == [9, 3, 3]
    for split, records in found.items():
        seen = emotions_seen(records, config.class_names)
        assert seen == [True] * len(seen), (tool, split)
    names = [record.image.resolve().name for records in found.values() for record in records]
    assert len(set(names)) == 12 if tool != "roboflow" else len(names) == 15
    assert main(["check", f"--config={output}/config.py", "--near=0"]) == 0
    assert "no problems found" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["roboflow", "cvat_xml", "label_studio", "via_json"])
def test_two_commands_lead_to_a_training_that_learns(tool, tmp_path, monkeypatch):
    """Import and train, as a user runs them: after two minutes most emotions (here colors) are
    right, where guessing gives a third, and boxes are where the faces are.
    """
    write, flags = EXPORTS[tool]
    few = photographs
    many = lambda folder, count, seed=0: few(folder, 10 * count, seed)  # noqa: E731
    monkeypatch.setattr(sys.modules[__name__], "photographs", many)
    (tmp_path / "export").mkdir()
    write(tmp_path / "export")
    output, run = tmp_path / "mine", tmp_path / "run"
    imported = ["-m", "data", "import", str(tmp_path / "export"), f"--output={output}", *flags]
    trained = ["train.py", f"--config={output}/config.py", f"--workdir={run}"]
    test = ["--mode=eval", "--split=test"]
    environment = {**os.environ, "XLA_FLAGS": ""}  # compiled in full, as a user's
    for command in (
        [*imported, "--like=demo"],
        [*trained, "--config.train.steps=300", "--config.optimizer.warmup_steps=30"],
        [*trained, *test],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True)
        assert done.returncode == 0, command
    metrics = json.loads((run / "metrics_test.json").read_text())
    assert metrics["accuracy"] > 0.7 and metrics["mean_iou"] > 0.6, metrics
    assert (run / "predictions_test.png").is_file()


def test_a_configuration_of_its_own_classes(tmp_path):
    export, output = tmp_path / "export", tmp_path / "my-data 2"
    export.mkdir()
    via_json(export)
    assert main(["import", str(export / "via_project.json"), f"--output={output}"]) == 0
    config = read_config(output / "config.py")
    recipe = base.get_config().to_dict()
    assert config["name"] == "my_data_2" and config["data"]["source"] == "coco"
    assert config["data"]["data_dir"] == output.as_posix()
    assert config["model"]["num_subject_queries"] == 9
    assert config["optimizer"] == read_config(ROOT / "configs/caer_s_r50.py")["optimizer"]
    assert recipe["class_names"] != config["class_names"] == NAMES


def test_what_is_asked_for_names_the_attributes(tmp_path, capsys):
    cvat_xml(tmp_path)
    assert main(["import", str(tmp_path), f"--output={tmp_path / 'mine'}"]) == 2
    error = capsys.readouterr().err
    assert "all people have the class 'person'" in error and error.count("\n") == 1
    assert "with --label-attribute: emotion" in error
    assert (
        main(["import", str(tmp_path), f"--output={tmp_path / 'mine'}", "--label-attribute=e"]) == 2
    )
    assert "nobody has the attribute 'e'; there are emotion" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "a.json: not valid json"),
        ("[1, 2]", "a.json: neither COCO, Label Studio nor VIA"),
        ('{"a": 1}', "a.json: neither COCO, Label Studio nor VIA"),
        ('{"annotations": []}', "the list 'images' is missing"),
        ('[{"data": {"image": "a.jpg"}, "annotations": []}]', "a.json: lists no images"),
        ('{"a": {"filename": "a.jpg", "regions": []}}', "a.json: lists no images"),
        ("<annotations><image/></annotations>", "a.xml: not valid XML of CVAT ('width')"),
        ("<annotations>", "a.xml: not valid XML of CVAT"),
        ("<annotations><track/></annotations>", "export it as CVAT for images"),
        ("a,b\n1,2\n", "a.csv: not valid csv of VIA (its first line must name filename"),
        (None, "holds no annotations (.json, .xml, .csv; archives must be unpacked)"),
    ],
)
def test_what_is_no_export_is_one_line(tmp_path, content, says, capsys):
    if content is not None:
        kind = "xml" if content.startswith("<") else "csv" if content.startswith("a,b") else "json"
        (tmp_path / f"a.{kind}").write_text(content)
    assert main(["import", str(tmp_path), f"--output={tmp_path / 'mine'}"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def write_plain(top: Path, people: list[dict[str, Any]], count: int = 4, **more: Any) -> None:
    """COCO json with `count` plain images, and these annotations in each."""
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
        noise.resize((160, 120)).save(top / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 160, "height": 120} for n in range(count)]
    categories = [{"id": n, "name": name} for n, name in enumerate(NAMES, 1)]
    annotations = [
        {"id": n * len(people) + place, "image_id": n, **person}
        for n in range(count)
        for place, person in enumerate(people)
    ]
    document = {"images": images, "annotations": annotations, "categories": categories} | more
    (top / "all.json").write_text(json.dumps(document))


def read_all(output: Path) -> tuple[DataConfig, list[Record]]:
    config = data_config(output / "config.py")
    splits = [split for split in ("train", "val", "test") if (output / f"{split}.json").exists()]
    return config, [record for split in splits for record in read_coco(config, split)[0]]


def test_several_categories_of_a_box_are_several_labels(tmp_path, capsys):
    box = {"bbox": [10, 10, 50, 60]}
    write_plain(tmp_path, [box | {"category_id": 1}, box | {"category_id": 3}])
    assert main(["import", str(tmp_path), f"--output={tmp_path / 'mine'}"]) == 0
    assert "4 people with the box of another joined to it" in capsys.readouterr().out
    config, records = read_all(tmp_path / "mine")
    assert config.multi_label and config.class_names == ("Anger", "Sad")
    small = [f"--output={tmp_path / 'small'}", "--like=faces_single"]
    assert main(["import", str(tmp_path), *small]) == 0
    loss = LossConfig(**read_config(tmp_path / "small" / "config.py")["loss"])
    assert (loss.class_loss, loss.logit_adjustment) == ("focal", 0)
    assert [record.labels.tolist() for record in records] == [[[1, 1]]] * 4


def test_polygons_become_boxes_and_people_without_a_class_are_counted(tmp_path, capsys):
    outline = {"segmentation": [[10, 20, 60, 20, 60, 80]], "category_id": 2}
    nobody = {"bbox": [90, 20, 20, 20], "category_id": []}
    write_plain(tmp_path, [outline, nobody])
    assert main(["import", str(tmp_path), f"--output={tmp_path / 'mine'}"]) == 0
    assert "all.json: 4 people without a class left out" in capsys.readouterr().out
    config, records = read_all(tmp_path / "mine")
    assert config.class_names == ("Happy",)
    assert [record.boxes.tolist() for record in records] == [[[10, 20, 60, 80]]] * 4


def test_images_that_are_missing_or_damaged_are_told_and_left_out(tmp_path, capsys):
    write_plain(tmp_path, [{"bbox": [10, 10, 50, 60], "category_id": 1}], count=6)
    (tmp_path / "0.png").unlink()
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[: len(content) * 2 // 3])
    assert main(["import", str(tmp_path), f"--output={tmp_path / 'mine'}"]) == 1
    out = capsys.readouterr().out
    assert "! 1 images skipped, missing" in out and "! left out: " in out
    assert len(read_all(tmp_path / "mine")[1]) == 4


def test_images_elsewhere_and_the_output_in_the_export(tmp_path, capsys):
    export = tmp_path / "export"
    export.mkdir()
    label_studio(export)
    (export / "images").rename(tmp_path / "photographs")
    arguments = ["import", str(export), f"--output={export / 'mine'}"]
    assert main(arguments) == 2 and "holds no usable image" in capsys.readouterr().err
    arguments.append(f"--images={tmp_path / 'photographs'}")
    assert main(arguments) == 0 and main(arguments) == 0  # what it wrote is no annotation of others
    config, records = read_all(export / "mine")
    assert len(records) == 12 and all(emotions_seen(records, config.class_names))


@pytest.mark.parametrize(("count", "shares"), [(5, [70, 10, 20]), (2, [1, 1, 0]), (1, [1, 1, 1])])
def test_no_split_with_a_share_stays_empty(count, shares):
    filled = fill_empty(np.zeros(count, int), np.arange(count), shares)
    wanted = min(count, sum(share > 0 for share in shares))
    assert len(set(filled.tolist())) == wanted and len(filled) == count


def test_classes_of_the_annotations(tmp_path, capsys):
    """class_names auto: without a list, in train.py and in the tools."""
    write_plain(tmp_path, [{"bbox": [10, 10, 50, 60], "category_id": 3}])
    flags = [f"--config={ROOT}/configs/debug.py", "--config.data.source=coco", "--split=train"]
    flags += [f"--config.data.data_dir={tmp_path}", "--config.data.train=all.json", "--near=0"]
    main(["check", *flags, "--config.class_names=('auto',)"])
    out = capsys.readouterr().out
    assert "\nSad " in out and "\nAnger " not in out
    text = "from configs import debug\n\ndef get_config():\n    config = debug.get_config()\n"
    text += "    config.class_names = ('auto',)\n    config.data.update(source='coco', "
    text += f"data_dir={str(tmp_path)!r}, train='all.json')\n    return config\n"
    (tmp_path / "mine.py").write_text(text)
    assert data_config(tmp_path / "mine.py").class_names == ("Sad",)
    flags = ["--config.data.source=scenes", "--config.class_names=('auto',)"]
    assert main(["check", f"--config={ROOT}/configs/debug.py", *flags]) == 2
    assert "class_names='auto': 'scenes' names no classes" in capsys.readouterr().err
