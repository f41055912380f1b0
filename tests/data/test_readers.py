"""Annotation files of every kind, written here from scratch, and read back exactly; and each bad
input with its one line.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import base
from configs.base import CAER_S_CLASSES, EMOTIC_CLASSES
from data.command import data_config
from data.config import SOURCES, DataConfig
from data.readers.caer_s import read_caer_s
from data.readers.coco import decode_bits, read_coco
from data.readers.records import clip_boxes, has_area
from data.readers.registry import READERS
from dsct_jax.errors import UserError


def make_config(root: Path, **changes: Any) -> DataConfig:
    values = base.get_config().data.to_dict() | {
        "data_dir": str(root),
        "class_names": ("calm", "glad", "sad"),
        "multi_label": False,
    }
    return DataConfig(**(values | changes))


def write_image(root: Path, name: str, width: int = 40, height: int = 30) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 150)).save(root / name)


def write_coco(
    root: Path,
    people: list[tuple[int, Any, list[float]]],
    *,
    categories: list | None = None,
    num_images: int = 2,
) -> dict:
    """train.json with images a/0.png ... of 40x30 and (image id, category_id, bbox) people."""
    for number in range(num_images):
        write_image(root, f"a/{number}.png")
    document = {
        "images": [
            {"id": 10 + number, "file_name": f"a/{number}.png", "width": 40, "height": 30}
            for number in range(num_images)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "iscrowd": 0,
                "area": box[2] * box[3],
            }
            for number, (image, category, box) in enumerate(people)
        ],
        "categories": categories if categories is not None else [],
    }
    (root / "train.json").write_text(json.dumps(document))
    return document


def one_line(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_plain_ids_without_categories_are_class_numbers(tmp_path):
    write_coco(tmp_path, [(10, 2, [1, 2, 10, 20]), (11, 0, [0, 0, 5, 5]), (10, 1, [20.5, 3, 4, 4])])
    records, report = read_coco(make_config(tmp_path), "train")
    assert [record.image_id for record in records] == [0, 1] and [
        record.name for record in records
    ] == ["a/0.png", "a/1.png"]
    np.testing.assert_array_equal(
        records[0].boxes, np.array([[1, 2, 11, 22], [20.5, 3, 24.5, 7]], np.float32)
    )
    np.testing.assert_array_equal(records[0].labels, np.array([[0, 0, 1], [0, 1, 0]], np.float32))
    np.testing.assert_array_equal(records[1].labels, np.array([[1, 0, 0]], np.float32))
    assert (records[0].width, records[0].height) == (40, 30) and records[0].load().size == (40, 30)
    assert str(report) == f"{tmp_path / 'train.json'}: 2 images, 3 people"


def test_categories_map_by_name_whatever_their_ids(tmp_path):
    categories = [{"id": 90, "name": "Sad"}, {"id": 7, "name": "calm"}]
    write_coco(tmp_path, [(10, 90, [1, 2, 3, 4]), (11, 7, [1, 2, 3, 4])], categories=categories)
    records, _ = read_coco(make_config(tmp_path), "train")
    assert records[0].labels.tolist() == [[0, 0, 1]] and records[1].labels.tolist() == [[1, 0, 0]]


def test_lists_of_ids_are_several_labels(tmp_path):
    write_coco(
        tmp_path, [(10, [2, 0], [1, 2, 3, 4]), (10, 1, [1, 2, 3, 4]), (10, [], [1, 2, 3, 4])]
    )
    records, report = read_coco(make_config(tmp_path, multi_label=True), "train")
    assert records[0].labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert report.unlabelled == 1 and len(records[1].boxes) == 0


def test_emotic_bit_masks(tmp_path):
    affection, yearning, both = 2**25, 1, 2**25 + 1
    write_coco(
        tmp_path,
        [
            (10, affection, [1, 2, 3, 4]),
            (10, yearning, [1, 2, 3, 4]),
            (11, both, [1, 2, 3, 4]),
            (11, 0, [1, 2, 3, 4]),
        ],
    )
    records, report = read_coco(
        make_config(tmp_path, class_names=EMOTIC_CLASSES, multi_label=True, label_format="bits"),
        "train",
    )
    names = [
        [EMOTIC_CLASSES[index] for index in np.flatnonzero(row)]
        for record in records
        for row in record.labels
    ]
    assert names == [["Affection"], ["Yearning"], ["Affection", "Yearning"], []]
    assert report.unlabelled == 1


@settings(deadline=None)
@given(st.integers(0, 2**26 - 1))
def test_decode_bits_reads_the_padded_binary_string_from_the_left(mask):
    assert decode_bits(mask, 26) == [
        index for index, bit in enumerate(format(mask, "026b")) if bit == "1"
    ]


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-200, 200, width=32)] * 4), min_size=1, max_size=5),
    st.integers(1, 100),
    st.integers(1, 100),
)
def test_clipping_keeps_exactly_the_part_inside(boxes, height, width):
    given_boxes = np.array(boxes, np.float32)
    clipped = clip_boxes(given_boxes, height, width)
    assert (
        (clipped >= 0).all()
        and (clipped[:, [0, 2]] <= width).all()
        and (clipped[:, [1, 3]] <= height).all()
    )
    inside = (
        (given_boxes >= 0).all(1) & (given_boxes[:, 2] <= width) & (given_boxes[:, 3] <= height)
    )
    ordered = (given_boxes[:, 0] < given_boxes[:, 2]) & (given_boxes[:, 1] < given_boxes[:, 3])
    np.testing.assert_array_equal(clipped[inside & ordered], given_boxes[inside & ordered])
    meets = (
        ordered
        & (given_boxes[:, 0] < width)
        & (given_boxes[:, 1] < height)
        & (given_boxes[:, 2] > 0)
        & (given_boxes[:, 3] > 0)
    )
    np.testing.assert_array_equal(has_area(clipped), meets)


def test_boxes_at_and_beyond_the_border_are_clipped_or_dropped_and_counted(tmp_path):
    boxes = [
        [-5, -5, 10, 10],
        [35, 25, 20, 20],
        [50, 5, 10, 10],
        [5, 5, 0, 10],
        [5, 5, -3, 10],
        [0, 0, 40, 30],
    ]
    write_coco(tmp_path, [(10, 0, box) for box in boxes])
    records, report = read_coco(make_config(tmp_path), "train")
    np.testing.assert_array_equal(
        records[0].boxes, np.array([[0, 0, 5, 5], [35, 25, 40, 30], [0, 0, 40, 30]], np.float32)
    )
    assert len(records[0].labels) == 3
    assert (report.people, report.clipped, report.dropped) == (3, 2, 3)
    assert "a/0.png" in report.first_dropped and "50.0, 5.0, 60.0, 15.0" in report.first_dropped


def test_crowds_are_left_out_and_a_wrong_size_gives_way_to_the_file(tmp_path):
    document = write_coco(tmp_path, [(10, 0, [0, 0, 35, 5]), (10, 0, [0, 0, 5, 5])])
    document["annotations"][1]["iscrowd"] = 1
    document["images"][0].update(width=30, height=40)  # swapped
    del document["images"][1]["width"]
    (tmp_path / "train.json").write_text(json.dumps(document))
    records, report = read_coco(make_config(tmp_path), "train")
    assert (report.crowds, report.swapped, report.resized, report.clipped) == (1, 1, 0, 0)
    np.testing.assert_array_equal(records[0].boxes, np.array([[0, 0, 35, 5]], np.float32))


@pytest.mark.parametrize(
    ("category", "changes", "says"),
    [
        (3, {}, "unknown category"),
        (-1, {}, "unknown category"),
        ("sad", {}, "unknown category"),
        (True, {}, "unknown category"),
        (None, {}, "unknown category"),
        (2**20, {}, "label_format='bits'"),
        ([0, 1], {}, "exactly one class"),
        ([0, 9], {"multi_label": True}, "unknown category"),
        (8, {"multi_label": True, "label_format": "bits"}, "a mask of 3 bits"),
        ([1], {"multi_label": True, "label_format": "bits"}, "a mask of 3 bits"),
    ],
)
def test_categories_that_mean_nothing(tmp_path, category, changes, says):
    write_coco(tmp_path, [(10, 0, [0, 0, 5, 5]), (11, category, [0, 0, 5, 5])])
    if changes.get("label_format") == "bits":
        write_coco(tmp_path, [(11, category, [0, 0, 5, 5])])
    message = one_line(lambda: read_coco(make_config(tmp_path, **changes), "train"))
    assert says in message and "train.json: annotation" in message and repr(category) in message


def test_each_unusable_file_is_one_line_that_names_it(tmp_path):
    config = make_config(tmp_path)
    path = tmp_path / "train.json"
    assert "train.json: no such annotation file" in one_line(lambda: read_coco(config, "train"))
    for text, says in (
        ("", "not valid json"),
        ('{"images": [', "not valid json"),
        ("[]", "'images' is missing"),
        ('{"images": []}', "'annotations'"),
        ('{"images": [], "annotations": []}', "lists no images"),
        ('{"images": [1], "annotations": []}', "must hold objects"),
    ):
        path.write_text(text)
        message = one_line(lambda: read_coco(config, "train"))
        assert says in message and "train.json" in message
    assert "unknown split" in one_line(lambda: read_coco(config, "trian"))


def test_documents_that_do_not_hold_together(tmp_path):
    def read(change) -> str:
        document = write_coco(tmp_path, [(10, 0, [0, 0, 5, 5])])
        change(document)
        (tmp_path / "train.json").write_text(json.dumps(document))
        return one_line(lambda: read_coco(make_config(tmp_path), "train"))

    assert "annotation 0 names image_id 77" in read(
        lambda d: d["annotations"][0].update(image_id=77)
    )
    assert "two images have the id 11" in read(lambda d: d["images"][0].update(id=11))
    assert "images[1] needs an id" in read(lambda d: d["images"][1].pop("id"))
    assert "needs a bbox" in read(lambda d: d["annotations"][0].update(bbox=[1, 2, 3]))
    assert "category 'joy' is not in config.class_names" in read(
        lambda d: d.update(categories=[{"id": 0, "name": "joy"}])
    )
    assert "max_targets=16" in read(lambda d: d.update(annotations=d["annotations"] * 17))


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_missing_and_damaged_images_stop_the_run_or_are_counted(tmp_path, damage):
    write_coco(tmp_path, [(10, 0, [0, 0, 5, 5]), (11, 1, [0, 0, 5, 5])])
    image = tmp_path / "a/0.png"
    image.unlink() if damage == "missing" else image.write_bytes(b"nonsense")
    message = one_line(lambda: read_coco(make_config(tmp_path), "train"))
    assert "a/0.png" in message and "skip_corrupt" in message
    records, report = read_coco(make_config(tmp_path, skip_corrupt=True), "train")
    assert [record.name for record in records] == ["a/1.png"] and records[0].image_id == 0
    assert (report.unreadable, report.first_unreadable) == (1, "a/0.png")
    (tmp_path / "a/1.png").unlink()
    assert "no usable image" in one_line(
        lambda: read_coco(make_config(tmp_path, skip_corrupt=True), "train")
    )


def caer_config(root: Path, **changes: Any) -> DataConfig:
    return make_config(root, source="caer_s", class_names=CAER_S_CLASSES, **changes)


def test_caer_s_box_list(tmp_path):
    for name in ("Train/Anger/0001.png", "Train/Happy/0002.png", "test/Sad/0003.png"):
        write_image(tmp_path, name)
    lines = [
        "train/Anger/0001.png,Anger,-2,3,20,25",
        "train/Happy/0002.png, 3, 1,2,11,12",
        "",
        "test/Sad/0003.png,sad,4,4,8,8",
        "train/Happy/0002.png,happy,20,2,31.5,12",
    ]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    records, report = read_caer_s(caer_config(tmp_path, train="train.txt"), "train")
    assert [np.argmax(record.labels, 1).tolist() for record in records] == [[0], [3, 3], [5]]
    np.testing.assert_array_equal(records[0].boxes, np.array([[0, 3, 20, 25]], np.float32))
    np.testing.assert_array_equal(
        records[1].boxes, np.array([[1, 2, 11, 12], [20, 2, 31.5, 12]], np.float32)
    )
    assert report.people == 4 and report.clipped == 1 and records[0].load().size == (40, 30)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train/Anger/0001.png,Joy,1,2,3,4", "class 'Joy'"),
        ("train/Anger/0001.png,7,1,2,3,4", "class '7'"),
        ("train/Anger/0001.png,Anger,1,2,3", "needs path,label,x1,y1,x2,y2"),
        ("train/Anger/0001.png,Anger,1,2,3,x", "needs path,label,x1,y1,x2,y2"),
    ],
)
def test_caer_s_lines_that_cannot_be_used(tmp_path, line, says):
    write_image(tmp_path, "train/Anger/0001.png")
    (tmp_path / "train.txt").write_text(f"train/Anger/0001.png,Anger,1,2,3,4\n{line}\n")
    message = one_line(lambda: read_caer_s(caer_config(tmp_path, train="train.txt"), "train"))
    assert says in message and "train.txt:2:" in message


def test_caer_s_list_for_another_root_missing_or_empty(tmp_path):
    config = caer_config(tmp_path, train="train.txt")
    assert "train.txt: no such annotation file" in one_line(lambda: read_caer_s(config, "train"))
    (tmp_path / "train.txt").write_text("\n")
    assert "lists no images" in one_line(lambda: read_caer_s(config, "train"))
    (tmp_path / "train.txt").write_text("Anger/0001.png,Anger,1,2,3,4\n")
    message = one_line(lambda: read_caer_s(config, "train"))
    assert "Anger/0001.png: no such image file" in message and "data_dir" in message


def test_caer_s_json_with_plain_class_numbers(tmp_path):
    write_image(tmp_path, "Test/Sad/0001.png")
    document = {
        "images": [{"id": 1, "file_name": "test/Sad/0001.png", "width": 40, "height": 30}],
        "annotations": [{"id": 0, "image_id": 1, "category_id": 5, "bbox": [2, 3, 10, 10]}],
    }
    (tmp_path / "test.json").write_text(json.dumps(document))
    records, _ = read_caer_s(caer_config(tmp_path), "test")
    assert records[0].labels.argmax() == 5 and records[0].load().size == (40, 30)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "cocoo"),
        ("label_format", "mask"),
        ("label_format", "bits"),
        ("buckets", ()),
        ("buckets", ((96, 0),)),
        ("short_sides", ()),
        ("crop_size", (600, 384)),
        ("flip_probability", 1.5),
        ("num_workers", -1),
        ("max_targets", 0),
        ("class_names", ("a", "a")),
        ("person_box", "face"),
        ("protocol", "emotic"),
        ("source", "emotic"),
    ],
)
def test_a_configuration_that_no_run_could_use_names_the_field(tmp_path, field, value):
    assert f"{field}=" in one_line(lambda: make_config(tmp_path, **{field: value}))


def test_several_lists_each_with_the_folder_its_paths_start_from(tmp_path):
    for name in ("Train/Anger/0001.png", "test/Sad/0003.png", "test/Happy/0004.png"):
        write_image(tmp_path, name)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.txt").write_text("Anger/0001.png,Anger,1,2,3,4\n")
    (tmp_path / "test/val.txt").write_text(
        "Sad\\0003.png,Sad,1,2,3,4\n./Happy/0004.png,Happy,1,2,3,4\n"
    )  # a list that lies in test/
    config = caer_config(
        tmp_path, train="Train:lists/train.txt, test:test/val.txt", val="test:test/val.txt"
    )
    records, report = read_caer_s(config, "train")
    assert [record.name for record in records] == [
        "Train/Anger/0001.png",
        "test/Sad/0003.png",
        "test/./Happy/0004.png",
    ]
    assert report.protocol == "caer_s" and str(tmp_path / "lists/train.txt") in report.source
    assert len(read_caer_s(config, "val")[0]) == 2
    message = one_line(
        lambda: read_caer_s(caer_config(tmp_path, train="test:lists/train.txt"), "train")
    )
    assert (
        "lists/train.txt: " in message
        and "test/Anger/0001.png: no such image file" in message
        and "config.data.train=ROOT:train.txt" in message
    )
    assert "cannot be mixed" in one_line(
        lambda: read_caer_s(caer_config(tmp_path, train="a.json,b.txt"), "train")
    )
    for value in ("", "test:", "a.txt,,b.txt"):
        assert "must be an annotation file, or ROOT:FILE" in one_line(
            lambda value=value: read_caer_s(caer_config(tmp_path, train=value), "train")
        )


def test_json_whose_names_start_in_a_folder_of_the_split(tmp_path):
    """The released code reads CAER-S 'val' from the train folder."""
    write_coco(tmp_path / "train", [(10, 2, [1, 2, 10, 20])])
    (tmp_path / "train/train.json").rename(tmp_path / "val.json")
    for reader, config in (
        (read_coco, make_config(tmp_path, val="train:val.json")),
        (read_caer_s, caer_config(tmp_path, val="train:val.json")),
    ):
        records, _ = reader(config, "val")
        assert [record.name for record in records] == [
            "train/a/0.png",
            "train/a/1.png",
        ] and records[0].load().size == (40, 30)


def test_paths_of_other_systems_and_absolute_ones(tmp_path):
    def files(value: str) -> list[tuple[str, str, str]]:
        config = make_config(tmp_path, train=value)
        return [
            (str(file.path), str(file.root), file.prefix)
            for file in config.annotation_files("train")
        ]

    top = str(tmp_path)
    assert files("train.json") == [(f"{top}/train.json", top, "")] and files(":train.json") == [
        (f"{top}/train.json", top, "")
    ]
    assert files("images:a/train.json") == [(f"{top}/a/train.json", f"{top}/images", "images/")]
    assert files("/elsewhere/train.json") == [("/elsewhere/train.json", top, "")]
    assert files("C:train.json")[0][0].endswith("C:train.json")  # a drive, not a folder


def test_protocols(tmp_path):
    write_coco(tmp_path, [(10, 2**25, [1, 2, 3, 4])])
    bits = {"class_names": EMOTIC_CLASSES, "multi_label": True, "label_format": "bits"}
    assert read_coco(make_config(tmp_path, **bits), "train")[1].protocol == "emotic_head_dsct"
    assert (
        read_coco(make_config(tmp_path, **bits, protocol="custom"), "train")[1].protocol == "custom"
    )
    write_coco(tmp_path, [(10, 2, [1, 2, 3, 4])])
    assert read_coco(make_config(tmp_path), "train")[1].protocol == "custom"
    assert "config.data.protocol='mine'" in one_line(lambda: make_config(tmp_path, protocol="mine"))


def test_every_configuration_names_a_source_that_can_be_read():
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.py")):
        if path.stem != "__init__":
            assert data_config(path).source in READERS
    assert set(READERS) == set(SOURCES)
