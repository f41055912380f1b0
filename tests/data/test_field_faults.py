"""What annotation tools write is read, and what cannot be meant so is said: cases of public bug
reports, in own words and with images made here.
"""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import base
from data.__main__ import main
from data.config import DataConfig
from data.readers.coco import read_coco
from data.readers.records import ReadReport
from dsct_jax.errors import UserError

CLASSES = ("Anger", "Fear", "Happy", "Sad")
NAMED = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
CONFIG = Path(__file__).parents[2] / "configs/debug.py"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images of 160x120."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (160, 120), (9 * number, 90, 90)).save(tmp_path / f"images/{number}.jpg")
    return tmp_path


def document(**changes: Any) -> dict[str, Any]:
    """One person in each image; `changes` of every annotation, or of the lists."""
    lists = {name: changes.pop(name) for name in ("images", "categories") if name in changes}
    people = [
        {"id": number, "image_id": number, "category_id": 1 + number, "bbox": [10, 10, 50, 60]}
        | changes
        for number in range(3)
    ]
    images = [
        {"id": number, "file_name": f"images/{number}.jpg", "width": 160, "height": 120}
        for number in range(3)
    ]
    return {"images": images, "annotations": people, "categories": NAMED} | lists


def images(names: list[str]) -> list[dict[str, Any]]:
    return [{"id": number, "file_name": name} for number, name in enumerate(names)]


def read(folder: Path, content: dict[str, Any] | bytes) -> tuple[list, ReadReport]:
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    (folder / "train.json").write_bytes(content)
    values = base.get_config().data.to_dict() | {"source": "coco", "data_dir": str(folder)}
    return read_coco(DataConfig(**values, class_names=CLASSES, multi_label=False), "train")


def labels(records: list) -> list[int]:
    return [int(row.argmax()) for record in records for row in record.labels]


def one_line(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def check(folder: Path, capsys) -> tuple[int, str]:
    argv = [f"--config={CONFIG}", "--config.data.source=coco", f"--config.data.data_dir={folder}"]
    status = main(["check", *argv, "--config.data.train=train.json", "--split=train", "--near=0"])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-8"])
def test_byte_order_marks_and_utf_16(folder, encoding):
    assert labels(read(folder, json.dumps(document()).encode(encoding))[0]) == [0, 1, 2]


@pytest.mark.parametrize("kind", [float, str])
def test_ids_of_pandas_are_whole_numbers(folder, kind):
    content = document()
    for image in content["images"]:
        image |= {"id": kind(image["id"]), "width": kind(160), "height": kind(120)}
    for person in content["annotations"]:
        person["category_id"] = kind(person["category_id"])
    records, report = read(folder, content)
    assert labels(records) == [0, 1, 2] and report.resized == 0
    content["categories"] = [{"id": kind(one["id"]), "name": one["name"]} for one in NAMED]
    assert labels(read(folder, content)[0]) == [0, 1, 2]


def test_ids_that_differ_show_their_types(folder):
    content = document(image_id="seven")
    assert "names image_id 'seven', which is not among the images (their ids are such as 0)" in (
        one_line(lambda: read(folder, content))
    )
    assert "needs an id (a whole number or a text) and a file_name, not id 1.5" in one_line(
        lambda: read(folder, document(images=[{"id": 1.5, "file_name": "images/0.jpg"}]))
    )
    message = one_line(lambda: read(folder, document(category_id=None)))
    assert "category_id None" in message and "[] says that a person has no label" in message


def test_a_category_that_nobody_has_is_skipped_and_said(folder):
    """Roboflow writes its super-category as a category."""
    content = document(categories=[{"id": 0, "name": "emotions", "supercategory": "none"}, *NAMED])
    records, report = read(folder, content)
    assert labels(records) == [0, 1, 2]
    assert "category 'emotions' of train.json skipped, nobody has it" in str(report)
    content["annotations"][1]["category_id"] = 0
    assert "category 'emotions' is not in config.class_names" in one_line(
        lambda: read(folder, content)
    )


@pytest.mark.parametrize(
    "name",
    [
        r"images\{}.jpg",
        r"C:\Users\me\images\{}.jpg",
        "/images/{}.jpg",
        "%69mages/{}.jpg",
        "https://host/files/images/{}.jpg?token=1",
        "/data/local-files/?d=images/{}.jpg",
        "data/upload/1/{}.jpg",
        "{}.jpg",
        "{}.JPG",
        "images/{}",
        " images/{}.jpg\n",
    ],
)
def test_names_as_tools_spell_them(folder, name):
    records, report = read(folder, document(images=images([name.format(i) for i in range(3)])))
    assert [record.image for record in records] == [folder / f"images/{i}.jpg" for i in range(3)]
    assert "3 image names spelled otherwise" in str(report)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_letters(folder, form):
    other = "NFD" if form == "NFC" else "NFC"
    name = "fröhlich é.jpg"
    (folder / "images/0.jpg").rename(folder / "images" / unicodedata.normalize(form, name))
    names = [f"images/{unicodedata.normalize(other, name)}", "images/1.jpg", "images/2.jpg"]
    assert labels(read(folder, document(images=images(names)))[0]) == [0, 1, 2]


def test_a_bare_name_that_two_files_have_is_not_guessed(folder):
    (folder / "other").mkdir()
    (folder / "images/0.jpg").rename(folder / "other/1.jpg")
    names = ["images/2.jpg", "images/1.jpg", "elsewhere/1.jpg"]
    content = document(images=images(names))
    assert "elsewhere/1.jpg: no such image file" in one_line(lambda: read(folder, content))


def test_infinity_is_refused(folder):
    message = one_line(lambda: read(folder, document(bbox=[10, 10, float("inf"), 20])))
    assert "annotation 0 needs a bbox" in message and "inf" in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bbox": [0.2, 0.1, 0.3, 0.3]}, "3 boxes lie inside one pixel"),
        ({"bbox": [90, 70, 150, 110]}, "3 boxes end far outside their image (first: images/0.jpg"),
        ({"categories": []}, "train.json has no categories, and no annotation has category_id 0"),
    ],
)
def test_numbers_that_cannot_be_meant_so_are_errors(folder, changes, says, capsys):
    read(folder, document(**changes))
    status, out = check(folder, capsys)
    assert status == 1 and f"! train: {says}" in out


def test_one_box_of_another_unit_is_enough(folder, capsys):
    """Two tools' annotations in one file: the larger part being right hides nothing."""
    content = document()
    content["annotations"][1]["bbox"] = [0.2, 0.1, 0.3, 0.3]
    read(folder, content)
    status, out = check(folder, capsys)
    assert status == 1 and "! train: 1 boxes lie inside one pixel" in out


def test_an_image_listed_for_each_of_its_people_is_one(folder):
    """As separate images, each person would be background to the others."""
    names = ["images/0.jpg", "images/1.jpg", "images/0.jpg"]
    content = document(images=images(names))
    content["annotations"][2]["bbox"] = [80, 10, 50, 60]
    records, report = read(folder, content)
    assert [record.name for record in records] == names[:2]
    assert labels(records) == [0, 2, 1] and report.repeated == 0
    assert "1 images of train.json named twice or more, taken as one" in str(report)


def test_a_list_of_results_is_no_data_set(folder):
    results = [{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    message = one_line(lambda: read(folder, json.dumps(results).encode()))
    assert message.endswith("(ValueError: a list whose entries name no image)")


def test_repeated_annotations_are_counted(folder, capsys):
    content = document()
    content["annotations"] *= 2
    _, report = read(folder, content)
    assert (report.people, report.repeated) == (6, 3)
    status, out = check(folder, capsys)
    assert status == 1
    assert "! train: 3 people have the box and labels of another in the same image" in out
    assert "(first: images/0.jpg)" in out


def test_negative_sizes_are_told_apart_from_boxes_without_area(folder):
    content = document()
    content["annotations"][0]["bbox"] = [60, 70, -50, -60]
    content["annotations"][1]["bbox"] = [60, 70, 0, 10]
    _, report = read(folder, content)
    assert (report.dropped, report.inverted, report.people) == (2, 1, 1)
    assert "1 of these boxes have a negative width or height" in str(report)


def test_more_people_than_subject_queries_is_an_error(folder, capsys):
    """Row 10."""
    content = document()
    crowd = [content["annotations"][0] | {"id": i, "bbox": [i, 10, 50, 60]} for i in range(10, 30)]
    (folder / "train.json").write_text(json.dumps(content | {"annotations": crowd}))
    argv = [f"--config={CONFIG}", "--config.data.source=coco", f"--config.data.data_dir={folder}"]
    argv += ["--config.data.max_targets=40", "--config.model.num_subject_queries=6"]
    status = main(["check", *argv, "--config.data.train=train.json", "--split=train", "--near=0"])
    lines = [row for row in capsys.readouterr().out.splitlines() if "num_subject_queries" in row]
    assert status == 1 and len(lines) == 1 and lines[0].startswith("!"), lines
    assert "20" in lines[0] and "6" in lines[0]


def test_an_emotion_in_an_attribute_is_told_how_to_be_read(folder):
    """Row 23: CVAT's usual set-up."""
    person = [{"id": 1, "name": "person"}]
    content = document(categories=person, category_id=1, attributes={"emotion": "Happy"})
    with pytest.raises(UserError, match=r"name it in config\.data\.label_attribute$"):
        read(folder, content)


def test_paths_of_home_and_reports_into_new_folders(folder, capsys, monkeypatch):
    """Rows 46 and 49."""
    (folder / "train.json").write_text(json.dumps(document()))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("FILE", "train.json")
    argv = [f"--config={CONFIG}", "--config.data.source=coco", "--config.data.data_dir=~"]
    argv += ["--config.data.train=$FILE", "--split=train", "--near=0"]
    assert main(["check", *argv, "--report=~/new/folder/report.json"]) == 0
    assert json.loads((folder / "new/folder/report.json").read_text())
    capsys.readouterr()
    blocked = folder / "train.json" / "report.json"
    assert main(["check", *argv, f"--report={blocked}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(blocked) in err


def test_usual_data_are_not_suspected(folder, capsys):
    content = document()
    content["annotations"][0]["bbox"] = [150, 100, 20, 30]  # one of three leaves its image a little
    _, report = read(folder, content)
    assert report.suspicions() == [] and report.clipped == 1
    assert check(folder, capsys)[0] == 0


_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
_odd_values = _values | st.lists(_values, max_size=4)
_coordinates = st.floats(-300, 300) | st.integers(-300, 300)
_people = st.fixed_dictionaries(
    {
        "image_id": st.integers(0, 2),
        "category_id": st.integers(1, 4),
        "bbox": st.lists(_coordinates, min_size=4, max_size=4),
    },
    optional={"id": _values, "iscrowd": st.sampled_from([0, 1])},
)
_odd_people = st.dictionaries(
    st.sampled_from(["image_id", "category_id", "bbox", "iscrowd"]), _odd_values
)
_odd_categories = st.lists(st.dictionaries(st.sampled_from(["id", "name"]), _odd_values))


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(_people, max_size=8),
    st.lists(_odd_people, max_size=1),
    st.just(NAMED) | _odd_categories | _odd_values,
)
def test_no_document_ends_in_a_traceback_or_loses_a_person_silently(
    folder, people, odd, categories
):
    content = document(categories=categories) | {"annotations": people + odd}
    try:
        _, report = read(folder, content)
    except UserError as error:
        problem = str(error)
    else:
        assert report.people + report.dropped + report.crowds == len(people) + len(odd)
        problem = str(report)
    assert "\n" not in problem
