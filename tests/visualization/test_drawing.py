"""Drawings show what they are given, where it is; sheets and reports hold everything."""

import json

import numpy as np
import pytest
from PIL import Image, ImageChops

from dsct_jax.__main__ import main
from dsct_jax.batch import Batch, Targets
from dsct_jax.commands.report import metrics_table, read_metrics
from dsct_jax.errors import UserError
from dsct_jax.postprocess import Decoder, Subject
from dsct_jax.visualization.drawing import (
    PALETTE,
    contact_sheet,
    draw_batch,
    draw_subjects,
    label_lines,
)

GREY = (90, 90, 90)


def subject(box, *labels, **scores):
    return Subject(box=tuple(map(float, box)), probabilities=scores, labels=labels, paper_score=0.9)


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def bounds(image, color):
    """(left, upper, right, lower) of the pixels of exactly this colour."""
    rows, columns = np.nonzero((np.asarray(image) == color).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_a_box_is_drawn_where_it_is_and_the_photograph_left_alone():
    image = Image.new("RGB", (600, 500), GREY)
    drawn = draw_subjects(image, [subject((100, 200, 300, 450))])
    assert drawn.size == image.size
    assert image.getcolors() == [(600 * 500, GREY)]
    np.testing.assert_allclose(bounds(drawn, rgb(PALETTE[0])), (100, 200, 300, 450), atol=2)
    inside, outside = drawn.crop((110, 210, 290, 440)), drawn.crop((0, 0, 600, 195))
    assert inside.getcolors() == [(180 * 230, GREY)]
    assert outside.getcolors() == [(600 * 195, GREY)]


def test_a_small_image_is_enlarged_and_its_boxes_with_it():
    drawn = draw_subjects(Image.new("RGB", (96, 64), GREY), [subject((10, 20, 50, 60))])
    assert drawn.size == (96 * 8, 64 * 8)
    np.testing.assert_allclose(bounds(drawn, rgb(PALETTE[0])), (80, 160, 400, 480), atol=2)


def test_every_subject_has_its_colour_and_its_text():
    image = Image.new("RGB", (640, 480), GREY)
    people = [
        subject((60 + 190 * i, 200, 200 + 190 * i, 400), "Happy", Happy=0.8) for i in range(3)
    ]
    with_text, without = (
        draw_subjects(image, people),
        draw_subjects(image, [subject(person.box) for person in people]),
    )
    for i in range(3):
        assert bounds(with_text, rgb(PALETTE[i]))[1] < 195  # the panel is above the box
    changed = ImageChops.difference(with_text, without).getbbox()
    assert changed[1] > 150
    assert changed[3] <= 205


@pytest.mark.parametrize(
    "box",
    [(0, 0, 640, 480), (0, 0, 30, 30), (600, 440, 640, 480), (0, 440, 40, 480), (300, 0, 340, 480)],
)
def test_text_stays_inside_the_image(box):
    image = Image.new("RGB", (640, 480), GREY)
    drawn = draw_subjects(image, [subject(box, "Doubt/Confusion", **{"Doubt/Confusion": 0.8})])
    panel = (
        np.asarray(ImageChops.difference(drawn, draw_subjects(image, [subject(box)])).convert("L"))
        > 0
    )
    rows, columns = np.nonzero(panel)
    assert panel.sum() > 3000
    assert np.ptp(columns) > 230  # nothing of the text is cut off
    assert np.ptp(rows) > 20


def test_panels_of_close_people_do_not_cover_each_other():
    image = Image.new("RGB", (640, 480), GREY)
    people = [
        subject((200, 200, 300, 300), "Happy", Happy=0.8),
        subject((210, 203, 310, 303), "Sad", Sad=0.7),
    ]
    both = draw_subjects(image, people)
    alone = draw_subjects(image, [subject(people[0].box), people[1]])
    for color in (PALETTE[0], PALETTE[1]):
        area = (np.asarray(both) == rgb(color)).all(-1).sum()
        assert area > 2000, color
    assert bounds(alone, rgb(PALETTE[1]))[1] < bounds(alone, rgb(PALETTE[0]))[1]


def test_labels_say_what_is_known():
    assert label_lines(
        subject((0, 0, 1, 1), "a", "b", "c", "d", "e", a=0.9, b=0.8, c=0.7, d=0.6, e=0.55)
    ) == [
        "a 0.90",
        "b 0.80",
        "c 0.70",
        "+ 2 more",
    ]
    assert label_lines(subject((0, 0, 1, 1), a=0.4, b=0.45)) == ["(b 0.45)"]
    assert label_lines(subject((0, 0, 1, 1), "a")) == ["a"]
    assert label_lines(subject((0, 0, 1, 1))) == []


def test_annotated_people_are_dashed_white():
    image = Image.new("RGB", (640, 480), GREY)
    drawn = np.asarray(
        draw_subjects(image, [], ground_truth=[subject((100, 100, 400, 300), "Sad")])
    )
    edge = (drawn[99:103, 110:390] == 255).all(-1).any(0)
    assert 0.3 < edge.mean() < 0.7
    assert (drawn[305:330, 100:250] == 255).all(-1).mean() > 0.3  # its panel is below


def test_contact_sheet_shows_every_picture_once():
    colors = [(250, 10 * i, 3) for i in range(7)]
    sheet = contact_sheet(
        [Image.new("RGB", (100 + 20 * i, 150), color) for i, color in enumerate(colors)],
        3,
        captions=list("abcdefg"),
        tile=120,
    )
    corners = [bounds(sheet, color) for color in colors]
    for left, upper, right, lower in corners:
        assert max(right - left, lower - upper) == 120
    assert len({upper for _, upper, _, _ in corners}) == 3
    assert [round(left / 123) for left, _, _, _ in corners] == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet([sheet], 0)
    with pytest.raises(ValueError, match="2 images, 1 captions"):
        contact_sheet([sheet, sheet], 3, captions=["a"])


def test_a_contact_sheet_of_nothing_says_so():
    """Where every image that was to be shown is damaged, a validation or evaluation goes on."""
    for captions in (None, []):
        sheet = np.asarray(contact_sheet([], 3, captions=captions))
        assert min(sheet.shape[:2]) > 20
        assert sheet.min() < 50  # the text


@pytest.mark.parametrize("size", [(4, 3000), (3000, 3), (1, 1), (10_000, 1)])
def test_enlarging_ends_at_sixteen_million_pixels(size):
    drawn = draw_subjects(Image.new("RGB", size), [subject((0, 0, *size), "Sad")])
    assert drawn.width * drawn.height <= 16e6
    assert (drawn.width % size[0], drawn.height % size[1]) == (0, 0)
    assert max(contact_sheet([drawn], 1).size) < 700


def test_a_batch_is_drawn_without_padding_and_filler():
    images = np.zeros((2, 64, 96, 3), np.uint8)
    images[:, :50, :80] = GREY
    box = np.array([0.5, 0.5, 0.5, 0.5], np.float32)
    batch = Batch(
        images=images,
        sizes=np.array([[50, 80]] * 2, np.int32),
        targets=Targets(
            boxes=np.broadcast_to(box, (2, 3, 4)),
            labels=np.eye(3, dtype=np.float32)[None].repeat(2, 0),
            valid=np.array([[True, False, False]] * 2),
        ),
        image_ids=np.arange(2),
        original_sizes=np.array([[500, 800]] * 2, np.int32),
        real=np.array([True, False]),
    )
    logits = np.array([[[3, -3, -3, 4], [-3, 3, -3, -4]]] * 2, np.float32)
    boxes = np.broadcast_to(np.array([0.25, 0.5, 0.3, 0.4], np.float32), (2, 2, 4))
    decoder = Decoder(("a", "b", "c"), multi_label=True, subject_logit=True)
    (picture,) = draw_batch(batch, logits, boxes, decoder=decoder)
    assert picture.size == (80 * 10, 50 * 10)
    left, _, right, lower = bounds(picture, rgb(PALETTE[0]))
    np.testing.assert_allclose(
        (left, right, lower), (80, 320, 350), atol=3
    )  # the second query is not sure enough
    white = bounds(picture, (255, 255, 255))
    np.testing.assert_allclose(white[:3], (200, 125, 600), atol=10)


# --- the report of a run --------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    lines = [
        {
            "step": step,
            "train/total": 10 / step,
            "train/loss_bbox": 1 / step,
            "train/loss_class": 2 / step,
        }
        for step in range(1, 6)
    ]
    lines += [
        {
            "step": step,
            "val/mean_iou": 0.1 * step,
            "val/macro_f1": 0.5 - 0.1 * step,
            "val/chance_mAP": 0.2,
        }
        for step in (2, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "tra'
    )
    return tmp_path


def test_report_draws_curves_and_tables(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "curves.png"), str(run / "metrics.md")]
    with Image.open(run / "curves.png") as curves:
        assert curves.width > 1500
        assert len(set(curves.convert("RGB").resize((400, 120)).get_flattened_data())) > 20
    table = (run / "metrics.md").read_text()
    assert "| mean_iou | 0.2000 | 0.4000 | 0.4000 | 4 |" in table
    assert "| macro_f1 | 0.3000 | 0.1000 | 0.3000 | 2 |" in table
    assert "| train/total | 10 | 2 |" in table


def test_losses_are_best_when_low(run):
    series = read_metrics(run / "metrics.jsonl") | {"val/brier": ([1, 2, 3], [3.0, 1.0, 2.0])}
    assert "| brier | 3.0000 | 2.0000 | 1.0000 | 2 |" in metrics_table(series)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "metrics.jsonl: no such file; give the --workdir"),
        ("", "holds no metrics yet"),
        (
            '{"step": 1, "a": 1}\n{"st\n{"step": 3, "a": 1}\n',
            "line 2: not a JSON object with a step",
        ),
    ],
)
def test_report_of_what_is_no_run_is_one_line(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    with pytest.raises(UserError):
        read_metrics(tmp_path / "metrics.jsonl")
