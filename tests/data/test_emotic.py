"""EMOTIC's own files, written here in exactly their structure (nested structs, Torch7 objects,
Python lists in csv) and read back exactly.
"""

import contextlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import base
from configs.base import EMOTIC_CLASSES
from data.command import data_config
from data.config import DataConfig, class_lookup
from data.readers.emotic import read_emotic
from data.readers.records import Record
from data.readers.registry import read_split
from data.readers.torch7 import load_torch7
from dsct_jax.errors import UserError

NAN = float("nan")


def make_config(root: Path, file: str, **changes: Any) -> DataConfig:
    values = base.get_config().data.to_dict() | {
        "data_dir": str(root),
        "class_names": EMOTIC_CLASSES,
        "multi_label": True,
        "source": "emotic",
    }
    return DataConfig(
        **(values | {"train": file, "val": file, "test": file, "person_box": "body"} | changes)
    )


def write_image(root: Path, name: str, width: int = 40, height: int = 30) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 150)).save(root / name)


def names_of(record: Record) -> list[list[str]]:
    return [[EMOTIC_CLASSES[index] for index in np.flatnonzero(row)] for row in record.labels]


def one_line(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Annotations.mat


def structs(*entries: dict[str, Any]) -> np.ndarray:
    """A 1xN MATLAB struct array; of N = 1 a reader that squeezes sees the bare struct."""
    names = list(entries[0])
    array = np.empty((1, len(entries)), [(name, object) for name in names])
    for index, entry in enumerate(entries):
        array[0, index] = tuple(entry[name] for name in names)
    return array


def cells(*texts: str) -> np.ndarray:
    array = np.empty((1, len(texts)), object)
    array[0, :] = texts
    return array


def continuous(valence=5.0, arousal=6.0, dominance=7.0) -> np.ndarray:
    return structs({"valence": valence, "arousal": arousal, "dominance": dominance})


def train_person(box, *labels: str, **ratings: float) -> dict[str, Any]:
    return {
        "body_bbox": np.array(box),
        "annotations_categories": structs({"categories": cells(*labels)}),
        "annotations_continuous": continuous(**ratings),
        "gender": "Male",
        "age": "Adult",
    }


def test_person(
    box, annotators: list[list[str]], combined: list[str], **ratings: float
) -> dict[str, Any]:
    return {
        "body_bbox": np.array(box),
        "annotations_categories": structs(
            *({"categories": cells(*labels)} for labels in annotators)
        ),
        "combined_categories": cells(*combined),
        "annotations_continuous": structs(
            *({"valence": 1.0, "arousal": NAN, "dominance": 3.0} for _ in annotators)
        ),
        "combined_continuous": continuous(**ratings),
        "gender": "Female",
        "age": "Kid",
    }


test_person.__test__ = False  # type: ignore[attr-defined]  # not a test


def mat_image(
    folder: str, filename: str, people: list[dict], *, width: int = 40, height: int = 30
) -> dict[str, Any]:
    info = structs({"image_id": 562243.0, "annotations_id": 1234.0})
    return {
        "filename": filename,
        "folder": folder,
        "image_size": structs({"n_col": float(width), "n_row": float(height)}),
        "original_database": structs({"name": folder.split("/")[0], "info": info}),
        "person": structs(*people),
    }


@pytest.fixture
def mat(tmp_path) -> Path:
    """Two training, two test and one validation image (a lone struct), with every quirk."""
    for name in (
        "mscoco/images/a.jpg",
        "framesdb/images/b.jpg",
        "emodb_small/images/c.jpg",
        "ade20k/images/d.jpg",
        "mscoco/images/e.jpg",
    ):
        write_image(tmp_path, name)
    alone = train_person(np.array([1, 2, 11, 22], np.uint8), "Happiness")
    several = train_person([-3.0, 5.0, 20.0, 60.0], "Disquietement", "Doubt/Confuzion", valence=NAN)
    outside = train_person([50.0, 5.0, 70.0, 20.0], "Fear")
    unlabelled = train_person([2.0, 2.0, 8.0, 8.0])
    train = structs(
        mat_image("mscoco/images", "a.jpg", [alone]),
        mat_image("framesdb/images", "b.jpg", [several, outside, unlabelled], width=30, height=40),
    )
    union = test_person(
        [1.0, 1.0, 9.0, 9.0], [["Peace"], ["Peace", "Esteem"], []], ["Peace", "Esteem"]
    )
    val = structs(mat_image("emodb_small/images", "c.jpg", [union]))
    one = test_person([4.0, 4.0, 12.0, 13.0], [["Yearning"]], ["Yearning"], dominance=NAN)
    test = structs(
        mat_image("ade20k/images", "d.jpg", [one]),
        mat_image("mscoco/images", "e.jpg", [one, union]),
    )
    scipy.io.savemat(tmp_path / "Annotations.mat", {"train": train, "val": val, "test": test})
    return tmp_path


def test_mat_train_one_annotator(mat):
    records, report = read_emotic(make_config(mat, "Annotations.mat"), "train")
    assert [record.name for record in records] == ["mscoco/images/a.jpg", "framesdb/images/b.jpg"]
    assert names_of(records[0]) == [["Happiness"]]
    np.testing.assert_array_equal(records[0].boxes, np.array([[1, 2, 11, 22]], np.float32))
    assert names_of(records[1]) == [["Disquietment", "Doubt/Confusion"], []]
    np.testing.assert_array_equal(
        records[1].boxes, np.array([[0, 5, 20, 30], [2, 2, 8, 8]], np.float32)
    )
    assert (records[1].width, records[1].height) == (40, 30)
    assert (
        report.images,
        report.people,
        report.clipped,
        report.dropped,
        report.unlabelled,
        report.swapped,
    ) == (2, 3, 1, 1, 1, 1)
    assert (
        "framesdb/images/b.jpg, person 1" in report.first_dropped
        and report.protocol == "emotic_body_pami"
    )


def test_mat_validation_and_test_are_unions_over_annotators(mat):
    records, _ = read_emotic(make_config(mat, "Annotations.mat"), "val")
    assert len(records) == 1 and names_of(records[0]) == [["Esteem", "Peace"]]
    records, report = read_emotic(make_config(mat, "Annotations.mat"), "test")
    assert [names_of(record) for record in records] == [
        [["Yearning"]],
        [["Yearning"], ["Esteem", "Peace"]],
    ]
    assert report.people == 3


def test_mat_union_without_combined_categories(tmp_path):
    write_image(tmp_path, "mscoco/images/a.jpg")
    person = test_person([1.0, 1.0, 9.0, 9.0], [["Peace"], ["Peace", "Esteem"], []], [])
    del person["combined_categories"]
    scipy.io.savemat(
        tmp_path / "CVPR17_Annotations.mat",
        {"test": structs(mat_image("mscoco/images", "a.jpg", [person]))},
    )
    records, report = read_emotic(make_config(tmp_path, "CVPR17_Annotations.mat"), "test")
    assert names_of(records[0]) == [["Esteem", "Peace"]] and report.protocol == "emotic_body_cvpr17"


def test_people_without_ratings_are_left_out_only_when_asked(mat):
    config = make_config(mat, "Annotations.mat", drop_unrated=True)
    records, report = read_emotic(config, "train")
    assert [names_of(record) for record in records] == [
        [["Happiness"]],
        [[]],
    ] and report.unrated == 1
    records, report = read_emotic(config, "test")  # nobody is left on the first image
    assert [names_of(record) for record in records] == [[["Esteem", "Peace"]]]
    assert (report.unrated, report.without_people, report.people) == (2, 1, 1)


def test_mat_marks_bodies_so_heads_are_an_error_unless_it_has_them(mat):
    message = one_line(
        lambda: read_emotic(make_config(mat, "Annotations.mat", person_box="head"), "train")
    )
    assert (
        "no head_bbox" in message
        and "person_box='body'" in message
        and "train(1).person(1)" in message
    )
    person = train_person([1.0, 1.0, 9.0, 9.0], "Fear") | {
        "head_bbox": np.array([2.0, 2.0, 5.0, 6.0])
    }
    scipy.io.savemat(
        mat / "heads.mat", {"train": structs(mat_image("mscoco/images", "a.jpg", [person]))}
    )
    records, report = read_emotic(make_config(mat, "heads.mat", person_box="head"), "train")
    assert records[0].boxes.tolist() == [[2, 2, 5, 6]] and report.protocol == "custom"
    assert (
        read_emotic(
            make_config(mat, "heads.mat", person_box="head", protocol="emotic_head_dsct"), "train"
        )[1].protocol
        == "emotic_head_dsct"
    )


def test_mat_files_that_cannot_be_used(mat):
    def read(content, name="bad.mat") -> str:
        if isinstance(content, bytes):
            (mat / name).write_bytes(content)
        else:
            scipy.io.savemat(mat / name, content)
        return one_line(lambda: read_emotic(make_config(mat, name), "train"))

    assert "no such annotation file" in one_line(
        lambda: read_emotic(make_config(mat, "other.mat"), "train")
    )
    assert "cannot be read as a MATLAB file" in read(b"")
    assert "cannot be read as a MATLAB file" in read(b"nonsense" * 40)
    whole = (mat / "Annotations.mat").read_bytes()
    assert "bad.mat: " in read(whole[: len(whole) // 8])
    header = b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<HH", 0x0200, 0x4D49)
    assert "is of MATLAB 7.3" in read(header.ljust(512))
    assert "has no variable 'train'" in read({"test": 1})
    assert "no usable image" in read({"train": np.zeros((0, 0))})
    good = mat_image("mscoco/images", "a.jpg", [train_person([1.0, 1.0, 9.0, 9.0], "Fear")])
    assert "train(1) has no folder" in read(
        {"train": structs({key: value for key, value in good.items() if key != "folder"})}
    )
    joy = mat_image(
        "mscoco/images",
        "a.jpg",
        [train_person([1.0, 1.0, 9.0, 9.0], "Fear"), train_person([1.0, 1.0, 9.0, 9.0], "Joy")],
    )
    message = read({"train": structs(good, joy)})
    assert (
        "train(2).person(2) (mscoco/images/a.jpg): category 'Joy' is not in config.class_names"
        in message
    )
    corners = mat_image("mscoco/images", "a.jpg", [train_person([1.0, 1.0, 9.0], "Fear")])
    assert "train(1).person(1) needs a box" in read({"train": structs(corners)})
    assert "neither .mat, .t7 nor .csv" in one_line(
        lambda: read_emotic(make_config(mat, "a.xml"), "train")
    )


def test_the_configurations_read_what_their_pages_say(mat):
    """docs/datasets.md: body boxes of both .mat files, and heads of Torch7 files."""
    configs, root = Path(__file__).parents[2] / "configs", f"--config.data.data_dir={mat}"
    records, report = read_split(data_config(configs / "emotic_body_r50.py", [root]), "test")
    assert (
        len(records) == 2
        and report.protocol == "emotic_body_pami"
        and str(report).endswith("3 people, protocol emotic_body_pami")
    )
    (mat / "CVPR17_Annotations.mat").write_bytes((mat / "Annotations.mat").read_bytes())
    other = [f"--config.data.{split}=CVPR17_Annotations.mat" for split in ("train", "val", "test")]
    assert (
        read_split(data_config(configs / "emotic_body_r50.py", [root, *other]), "val")[1].protocol
        == "emotic_body_cvpr17"
    )
    Torch7Writer().write([t7_person("a.jpg", [1, 2, 3, 4], [], [{"labels": [1]}])]).save(
        mat / "val.t7"
    )
    heads = data_config(
        configs / "emotic_r50.py", [root, "--config.data.source=emotic", "--config.data.val=val.t7"]
    )
    assert read_split(heads, "val")[1].protocol == "emotic_head_dsct"


# --- Torch7


class Torch7Writer:
    """Writes what torch.save writes, binary or ascii."""

    def __init__(self, *, ascii: bool = False) -> None:
        self.ascii, self.parts, self.index = ascii, [], 0

    def values(self, code: str, *values: Any) -> None:
        if self.ascii:
            text = " ".join(f"{value:.17g}" if code in "df" else str(value) for value in values)
            self.parts.append(text.encode() + b"\n" if values else b"")
        else:
            self.parts.append(struct.pack(f"<{len(values)}{code}", *values))

    def raw(self, text: str) -> None:
        content = text.encode()
        self.values("i", len(content))
        self.parts.append(content + (b"\n" if self.ascii and content else b""))

    def write(self, value: Any) -> "Torch7Writer":
        if value is None:
            self.values("i", 0)
        elif isinstance(value, bool):
            self.values("ii"[:1], 5)
            self.values("i", int(value))
        elif isinstance(value, int | float):
            self.values("i", 1)
            self.values("d", float(value))
        elif isinstance(value, str):
            self.values("i", 2)
            self.raw(value)
        elif isinstance(value, np.ndarray):
            self.tensor(value)
        else:
            entries = value if isinstance(value, dict) else dict(enumerate(value, 1))
            self.index += 1
            for number in (3, self.index, len(entries)):
                self.values("i", number)
            for key, entry in entries.items():
                self.write(key).write(entry)
        return self

    def torch(self, name: str) -> None:
        self.index += 1
        for number in (4, self.index):
            self.values("i", number)
        self.raw("V 1")
        self.raw(name)

    def tensor(self, array: np.ndarray) -> None:
        name, code = {
            "f8": ("Double", "d"),
            "f4": ("Float", "f"),
            "i8": ("Long", "q"),
            "i4": ("Int", "i"),
        }[array.dtype.str[1:]]
        self.torch(f"torch.{name}Tensor")
        self.values("i", array.ndim)
        self.values("q", *array.shape)
        self.values("q", *(stride // array.itemsize for stride in array.strides))
        self.values("q", 1)
        self.torch(f"torch.{name}Storage")
        self.values("q", array.size)
        self.values(code, *array.ravel(order="K").tolist())

    def save(self, path: Path) -> None:
        path.write_bytes(b"".join(self.parts))


def t7_person(
    filename: str, head, body, workers: list, folder: str = "mscoco/images"
) -> dict[str, Any]:
    return {
        "filename": filename,
        "folder": folder,
        "head_bbox": head,
        "body_bbox": body,
        "workers": workers,
    }


@pytest.mark.parametrize("ascii", [False, True])
def test_torch7_people_of_one_image_need_not_be_adjacent(tmp_path, ascii):
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path, f"mscoco/images/{name}")
    people = [
        t7_person(
            "a.jpg",
            [1, 2, 11, 12],
            [1, 2, 30, 29],
            [
                {"labels": [1, 26], "continuous": [5, 6, 7]},
                {"labels": [26, 17], "continuous": [5, 6, 7]},
            ],
        ),
        t7_person(
            "b.jpg",
            np.array([3.5, 4, 9, 90]),
            [0, 0, 20, 20],
            [{"labels": np.array([2], np.int64), "continuous": np.array([NAN, 1, 1])}],
        ),
        t7_person(
            "a.jpg", [20, 2, 15, 12], [20, 2, 25, 12], [{"labels": 3, "continuous": [1, 2, 3]}]
        ),
        t7_person("b.jpg", [], [5, 5, 10, 10], [{"labels": [], "continuous": [1, 2, 3]}]),
    ]
    Torch7Writer(ascii=ascii).write(people).save(tmp_path / "train.t7")
    records, report = read_emotic(make_config(tmp_path, "train.t7", person_box="head"), "train")
    assert [record.name for record in records] == ["mscoco/images/a.jpg", "mscoco/images/b.jpg"]
    assert [names_of(record) for record in records] == [
        [["Affection", "Happiness", "Yearning"]],
        [["Anger"]],
    ]
    assert records[0].boxes.tolist() == [[1, 2, 11, 12]] and records[1].boxes.tolist() == [
        [3.5, 4, 9, 30]
    ]
    assert (report.clipped, report.dropped, report.protocol) == (
        1,
        2,
        "emotic_head_dsct",
    )  # one box inside out, one absent
    bodies, report = read_emotic(make_config(tmp_path, "train.t7", drop_unrated=True), "train")
    assert [names_of(record) for record in bodies] == [
        [["Affection", "Happiness", "Yearning"], ["Annoyance"]],
        [[]],
    ]
    assert (report.unrated, report.protocol) == (1, "custom")


@pytest.mark.parametrize("ascii", [False, True])
def test_torch7_values_come_back(tmp_path, ascii):
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T  # strides that are not C's
    value = {
        "text": "a\nb é",
        "no": None,
        "yes": True,
        "half": 0.5,
        "list": [1, [2, 3], []],
        "table": {2: "two", "x": 1},
        "tensor": matrix,
    }
    Torch7Writer(ascii=ascii).write(value).save(tmp_path / "x.t7")
    found = load_torch7(tmp_path / "x.t7")
    np.testing.assert_array_equal(found.pop("tensor"), matrix)
    assert found == {
        "text": "a\nb é",
        "no": None,
        "yes": True,
        "half": 0.5,
        "list": [1, [2, 3], []],
        "table": {2.0: "two", "x": 1},
    }


def test_torch7_file_of_all_splits(tmp_path):
    write_image(tmp_path, "mscoco/images/a.jpg")
    person = t7_person(
        "a.jpg", [1, 2, 11, 12], [1, 2, 30, 29], [{"labels": [16], "continuous": []}]
    )
    Torch7Writer().write({"train": [person], "test": [person, person]}).save(tmp_path / "all.t7")
    config = make_config(tmp_path, "all.t7", person_box="head")
    assert [len(read_emotic(config, split)[0][0].boxes) for split in ("train", "test")] == [1, 2]
    assert "must hold a table of people" in one_line(lambda: read_emotic(config, "val"))
    assert "no usable image" in one_line(
        lambda: read_emotic(make_config(tmp_path, "all.t7", drop_unrated=True), "train")
    )


def test_torch7_objects_met_again_are_the_same(tmp_path):
    writer = Torch7Writer().write([[7], [8]])
    shared = b"".join(writer.parts)
    again = struct.pack("<ii", 3, 2)  # a table, number 2: already known
    second = shared.index(struct.pack("<iii", 3, 3, 1))
    writer.parts = [shared[:second], again]
    writer.save(tmp_path / "x.t7")
    assert load_torch7(tmp_path / "x.t7") == [[7], [7]]


def test_torch7_holds_data_only(tmp_path):
    path = tmp_path / "x.t7"

    def read(content: bytes) -> str:
        path.write_bytes(content)
        return one_line(lambda: load_torch7(path))

    assert "no such annotation file" in one_line(lambda: load_torch7(tmp_path / "y.t7"))
    assert "not a usable Torch7 file" in read(b"") and "not a usable Torch7 file" in read(
        b"nonsense"
    )
    assert "type 8" in read(struct.pack("<iii", 8, 1, 4) + b"code")
    writer = Torch7Writer()
    writer.torch("nn.Linear")
    assert "class nn.Linear" in read(b"".join(writer.parts))
    assert "too early" in read(struct.pack("<ii", 2, 2**31 - 1))
    writer = Torch7Writer()
    writer.tensor(np.zeros(4))
    content = b"".join(writer.parts)
    assert "does not lie in its storage" in read(
        content.replace(struct.pack("<q", 4), struct.pack("<q", 9), 1)
    )
    assert "nested" in read(
        struct.pack("<iii", 3, 1, 1)
        + b"".join(struct.pack("<idiii", 1, 1.0, 3, n, 1) for n in range(2, 150))
    )


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 400), flip=st.integers(0, 399), to=st.integers(0, 255))
def test_damaged_torch7_is_an_error_of_the_user_or_read(tmp_path_factory, cut, flip, to):
    content = bytearray(
        b"".join(
            Torch7Writer()
            .write([t7_person("a.jpg", np.array([1.0, 2, 3, 4]), [1, 2], [{"labels": [1]}])])
            .parts
        )
    )
    content[flip % len(content)] = to
    path = tmp_path_factory.getbasetemp() / "damaged.t7"
    path.write_bytes(bytes(content[:cut]))
    with contextlib.suppress(UserError):
        load_torch7(path)


@pytest.mark.parametrize(
    ("person", "says"),
    [
        (t7_person("a.jpg", [1, 2, 3], [1, 2, 3, 4], []), "person 1 needs a box"),
        (t7_person("a.jpg", [1, 2, 3, 4], [1, 2, 3, 4], [{"labels": [27]}]), "category 27"),
        (t7_person("a.jpg", [1, 2, 3, 4], [1, 2, 3, 4], [{"labels": [0]}]), "category 0"),
        (
            t7_person("a.jpg", [1, 2, 3, 4], [1, 2, 3, 4], [{"labels": [1.5]}]),
            "must be category numbers",
        ),
        (
            t7_person("a.jpg", [1, 2, 3, 4], [1, 2, 3, 4], [{"labels": {"x": 1}}]),
            "must be category numbers",
        ),
        ({"filename": "a.jpg"}, "needs filename, folder, head_bbox and workers"),
        (
            t7_person("z.jpg", [1, 2, 3, 4], [1, 2, 3, 4], [{"labels": [1]}]),
            "z.jpg: no such image file",
        ),
    ],
)
def test_torch7_people_that_cannot_be_used(tmp_path, person, says):
    write_image(tmp_path, "mscoco/images/a.jpg")
    Torch7Writer().write([person]).save(tmp_path / "train.t7")
    assert says in one_line(
        lambda: read_emotic(make_config(tmp_path, "train.t7", person_box="head"), "train")
    )


# --- csv

CSV_HEAD = "Index,Folder,Filename,Image Size,BBox,Categorical_Labels,Continuous_Labels,Gender,Age"


def test_csv_of_the_converter(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path, f"mscoco/images/{name}")
    lines = [
        CSV_HEAD,
        """0,mscoco/images,a.jpg,"[40, 30]","[-1, 2, 11, 12]","""
        """"['Disconnection', 'Doubt/Confusion']","[5.0, 3.0, 9.0]",Male,Adult""",
        """1,mscoco/images,b.jpg,"[30, 40]","[0, 0, 5, 5]","""
        """"['Disquitement']","[nan, 3.0, 9.0]",Male,Adult""",
        """2,mscoco/images,a.jpg,"[40, 30]","[20, 20, 30, 30]",[],"[5, 3, 9]",Female,Kid""",
    ]
    (tmp_path / "train.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    records, report = read_emotic(make_config(tmp_path, "train.csv"), "train")
    assert [names_of(record) for record in records] == [
        [["Disconnection", "Doubt/Confusion"], []],
        [["Disquietment"]],
    ]
    assert records[0].boxes.tolist() == [[0, 2, 11, 12], [20, 20, 30, 30]]
    assert (report.swapped, report.clipped, report.unlabelled, report.protocol) == (
        1,
        1,
        1,
        "emotic_body_pami",
    )
    assert (
        read_emotic(make_config(tmp_path, "train.csv", drop_unrated=True), "train")[1].unrated == 1
    )
    assert "marks bodies" in one_line(
        lambda: read_emotic(make_config(tmp_path, "train.csv", person_box="head"), "train")
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no column Folder"),
        ("Index,Folder\n", "has no column Filename"),
        (CSV_HEAD + "\n", "no usable image"),
        (
            CSV_HEAD + "\n0,mscoco/images,a.jpg,[40],__import__('os'),[],[],M,A",
            "line 2, column BBox: needs a list",
        ),
        (CSV_HEAD + "\n0,mscoco/images,a.jpg,[40]\n", "line 2, column BBox: needs a list"),
        (
            CSV_HEAD + '\n0,mscoco/images,a.jpg,"[40, 30]","[1, 2, 3]",[],[],M,A',
            "line 2 needs a box",
        ),
        (
            CSV_HEAD + '\n0,mscoco/images,a.jpg,"[40, 30]","[1, 2, 3, 4]",[\'Joy\'],[],M,A',
            "category 'Joy'",
        ),
    ],
)
def test_csv_lines_that_cannot_be_used(tmp_path, text, says):
    write_image(tmp_path, "mscoco/images/a.jpg")
    (tmp_path / "train.csv").write_text(text)
    message = one_line(lambda: read_emotic(make_config(tmp_path, "train.csv"), "train"))
    assert says in message and "train.csv: " in message


# --- names


def test_spellings_in_the_wild():
    find = class_lookup(EMOTIC_CLASSES)
    assert {
        find(name) for name in ("Disquietment", "Disquietement", "Disquitement", " disquietment")
    } == {8}
    assert {
        find(name)
        for name in ("Doubt/Confusion", "Doubt/Confuzion", "DoubtConfusion", "doubt confusion")
    } == {9}
    assert find("Joy") is None and [find(name) for name in EMOTIC_CLASSES] == list(range(26))
    assert class_lookup(("C", "C+"))("C+") == 1 and class_lookup(("C", "C+"))("c") is None
