"""The built-in scenes: reproducible, drawn as they say, and with the promised shares of what
decides an emotion.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from configs import base
from configs.base import CAER_S_CLASSES
from data.config import DataConfig
from data.readers.scene_drawing import Person, Scene, draw_scene
from data.readers.scenes import (
    CUE_SHARES,
    CUES,
    SCENE_CLASSES,
    SceneImage,
    all_emotions,
    decide,
    make_scene,
    read_scenes,
)
from dsct_jax.errors import UserError

SCENES = [make_scene(0, index) for index in range(4000)]
PEOPLE = [(scene, person) for scene in SCENES for person in scene.people]


def make_config(**changes: Any) -> DataConfig:
    values = base.get_config().data.to_dict() | {
        "source": "scenes",
        "train": "40",
        "val": "30",
        "test": "20",
    }
    return DataConfig(**(values | {"class_names": SCENE_CLASSES, "multi_label": False} | changes))


def test_the_cue_shares_are_as_promised_and_independent_of_the_emotion():
    decided = [decide(scene, person) for scene, person in PEOPLE]
    for cue, share in zip(CUES, CUE_SHARES, strict=True):
        emotions = [emotion for other, emotion in decided if other == cue]
        assert len(emotions) / len(decided) == pytest.approx(share, abs=0.02)
        for name in SCENE_CLASSES:
            assert emotions.count(name) / len(emotions) == pytest.approx(0.25, abs=0.04)


def test_no_cue_stands_in_for_another():
    """Where the face decides, object and surroundings agree with it no more often than chance; so
    for the object and the surroundings.
    """
    held = [
        (person.expression, person.held)
        for _, person in PEOPLE
        if person.expression and person.held
    ]
    around = [
        (person.expression or person.held, scene.setting or scene.distant)
        for scene, person in PEOPLE
        if person.expression or person.held
    ]
    for pairs in (held, around):
        assert len(pairs) > 1000
        assert np.mean([one == other for one, other in pairs]) == pytest.approx(0.25, abs=0.04)


def test_every_kind_of_near_and_far_cue_occurs():
    kinds = {
        "object": sum(not person.expression and bool(person.held) for _, person in PEOPLE),
        "neighbour": sum(not person.expression and person.partner >= 0 for _, person in PEOPLE),
        "setting": sum(
            decide(scene, person)[0] == "far" and bool(scene.setting) for scene, person in PEOPLE
        ),
        "distant": sum(
            decide(scene, person)[0] == "far" and bool(scene.distant) for scene, person in PEOPLE
        ),
    }
    assert min(kinds.values()) > 0.03 * len(PEOPLE), kinds
    assert {len(scene.people) for scene in SCENES} == {1, 2, 3, 4}


def test_hands_are_held_by_two_neighbours_of_whom_one_is_neutral_and_empty_handed():
    for scene, person in PEOPLE:
        if person.partner >= 0 and not person.expression:
            neighbour = scene.people[person.partner]
            assert (
                neighbour.expression
                and scene.people[neighbour.partner] is person
                and not person.held
            )
            assert abs(neighbour.x - person.x) < 1.3 * person.slot


def test_heads_are_large_enough_inside_the_picture_and_apart():
    for scene in SCENES:
        boxes = np.array([person.head_box for person in scene.people])
        assert (
            boxes.min() >= 0
            and boxes[:, 2].max() <= scene.width
            and boxes[:, 3].max() <= scene.height
        )
        assert min(boxes[:, 2] - boxes[:, 0]) >= 28  # 22 where the short side is reduced to 96
        assert (boxes[1:, 0] >= boxes[:-1, 2]).all()
        if scene.distant:
            assert all(
                abs(scene.distant_x - person.x) > person.head / 2 + 6 for person in scene.people
            )


def test_a_scene_is_a_pure_function_of_seed_and_index():
    first, again = SceneImage(3, 5)(), SceneImage(3, 5)()
    assert first.tobytes() == again.tobytes() and first.mode == "RGB"
    scene = make_scene(3, 5)
    assert first.size == (scene.width, scene.height) and make_scene(3, 5) == scene
    assert make_scene(3, 6) != scene and make_scene(4, 5) != scene


@pytest.mark.parametrize("part", ["expression", "held", "setting", "distant"])
def test_every_emotion_looks_different_where_it_is_drawn(part):
    person = Person(
        80.0, 45.0, 36.0, 40.0, "", "", -1, (240, 200, 160), (40, 30, 30), False, (90, 140, 90)
    )
    pictures = []
    for emotion in ("", *SCENE_CLASSES):
        people = (
            (dataclasses.replace(person, **{part: emotion}),)
            if part in ("expression", "held")
            else (person,)
        )
        setting, distant = (emotion if part == name else "" for name in ("setting", "distant"))
        scene = Scene(160, 128, setting, distant, 20.0, people)
        pictures.append(np.asarray(draw_scene(scene, np.random.default_rng(0)), np.float32))
    where = {
        "expression": np.s_[28:66, 62:98],
        "held": np.s_[80:128, 62:98],
        "setting": np.s_[:60, :],
        "distant": np.s_[40:90, :40],
    }[part]
    for one in range(5):
        for other in range(one):
            assert np.abs(pictures[one][where] - pictures[other][where]).mean() > 4


def test_records_carry_boxes_labels_and_cues():
    records, report = read_scenes(make_config(class_names=CAER_S_CLASSES), "train")
    assert len(records) == 40 and report.people == sum(len(record.boxes) for record in records)
    for index, record in enumerate(records):
        scene = make_scene(0, index)
        decided = [decide(scene, person) for person in scene.people]
        assert [CAER_S_CLASSES[row.argmax()] for row in record.labels] == [
            emotion for _, emotion in decided
        ]
        assert (record.labels.sum(1) == 1).all() and record.cues == tuple(cue for cue, _ in decided)
        assert record.load().size == (record.width, record.height)


def test_several_labels_are_everything_that_bears_on_a_person():
    records, _ = read_scenes(make_config(multi_label=True), "val")
    for index, record in enumerate(records):
        scene = make_scene(1, index)
        for person, row in zip(scene.people, record.labels, strict=True):
            assert {SCENE_CLASSES[place] for place in np.flatnonzero(row)} == all_emotions(
                scene, person
            )
            assert decide(scene, person)[1] in all_emotions(scene, person)
    assert (
        {1, 2, 3} >= {int(count) for record in records for count in record.labels.sum(1)} >= {1, 2}
    )


def test_splits_have_no_scene_in_common():
    train, val = (
        read_scenes(make_config(train="5", val="5"), split)[0] for split in ("train", "val")
    )
    assert not {record.load().tobytes() for record in train} & {
        record.load().tobytes() for record in val
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": "train.json"}, "config.data.train='train.json'"),
        ({"train": "0"}, "number of images"),
        ({"class_names": ("Anger", "Happy")}, "lacks Fear, Sad"),
        ({"max_targets": 1}, "max_targets=1"),
    ],
)
def test_bad_settings_are_one_line(changes, says):
    with pytest.raises(UserError) as error:
        read_scenes(make_config(**changes), "train")
    assert says in str(error.value) and "\n" not in str(error.value)
