"""Built-in scenes: people drawn in code whose emotion must be read from the face, from something
near, or from something far.

A scene is a pure function of (seed, index) and needs no file, so it serves the demo, the tests and
measurements of what a model looks at. One to four people stand in a setting; a network has
to find their heads (the boxes) and say what they feel. The emotion follows from the picture alone:

    1. a face with an expression: the emotion is the expression's, whatever else there is;
    2. a neutral face: the emotion of the object held before the chest;
    3. neutral, empty-handed, but holding hands with a neighbor: the neighbor's expression;
    4. neutral, empty-handed and alone: the setting's; in the plain setting the emotion of the
    distant figure on the horizon.

1 decides for 50 % of the people (cue "expression"), 2 and 3 for 30 % ("near"), 4 for 20 % ("far").
Emotions are drawn evenly and independently of each other, and people with an expression also hold
objects (30 %), so no cue stands in for another. With the four SCENE_CLASSES the best accuracy that
each kind of sight allows is therefore known:

    guessing 25 %, the face alone 62.5 %, face and setting 77.5 %, face and what is near 85 %,
    everything 100 %.

With `multi_label` a person carries the union of what they show, hold, are held by and stand in: one
    to three labels, 1.7 on average.
"""

import dataclasses

import numpy as np
from PIL import Image

from data.config import SPLITS, DataConfig
from data.readers.records import ReadReport, Record, require_room
from data.readers.scene_drawing import Person, Scene, draw_scene
from dsct_jax.errors import UserError

SCENE_CLASSES = ("Anger", "Fear", "Happy", "Sad")  # names of CAER-S
CUES = ("expression", "near", "far")
CUE_SHARES = (0.5, 0.3, 0.2)

_NEIGHBOR_SHARE = 0.5  # of the "near" people that stand beside somebody with an expression
_DISTRACTOR_SHARE = 0.3  # of the people with an expression, who hold an object as well
_PLAIN_SHARE = 0.35  # of the images with at most three people: plain setting with a distant figure
_SKINS = ((255, 222, 190), (241, 194, 150), (214, 160, 112), (168, 116, 76), (122, 82, 54))
_HAIRS = ((40, 30, 25), (95, 60, 30), (200, 160, 80), (150, 70, 40), (110, 110, 115))


@dataclasses.dataclass(frozen=True)
class SceneImage:
    """Draws the pixels of one scene when a record is loaded."""

    seed: int
    index: int

    def __call__(self) -> Image.Image:
        rng = np.random.default_rng((self.seed, self.index, 1))
        return draw_scene(make_scene(self.seed, self.index), rng)


def make_scene(seed: int, index: int) -> Scene:
    """What stands where in scene `index`, without drawing it."""
    rng = np.random.default_rng((seed, index))
    portrait = rng.random() < 0.4
    long_side, short_side = int(rng.integers(152, 177)), int(rng.integers(122, 137))
    width, height = (short_side, long_side) if portrait else (long_side, short_side)
    count = int(rng.integers(1, 4 if portrait else 5))
    plain = count <= (2 if portrait else 3) and rng.random() < _PLAIN_SHARE
    far = str(rng.choice(SCENE_CLASSES))
    cues = rng.choice(CUES, size=count, p=CUE_SHARES).tolist()
    expressions = [str(rng.choice(SCENE_CLASSES)) if cue == "expression" else "" for cue in cues]
    held, partners = _near_cues(rng, cues)

    distant_place = int(rng.integers(0, count + 1)) if plain else -1
    centers, distant_x, slot = _places(rng, width, partners, distant_place)
    people = []
    for place, x in enumerate(centers):
        signs = expressions[place], held[place], partners[place]
        head, y = min(slot * rng.uniform(0.86, 0.95), 46.0), height * rng.uniform(0.27, 0.40)
        skin, hair = (colors[rng.integers(len(colors))] for colors in (_SKINS, _HAIRS))
        long_hair, shirt = bool(rng.random() < 0.4), tuple(rng.integers(60, 230, 3).tolist())
        people.append(Person(x, y, head, slot, *signs, skin, hair, long_hair, shirt))
    setting, distant = ("", far) if plain else (far, "")
    return Scene(width, height, setting, distant, distant_x, tuple(people))


def _near_cues(rng: np.random.Generator, cues: list[str]) -> tuple[list[str], list[int]]:
    """What each person holds ('' = nothing) and with whom they hold hands (-1 = nobody)."""
    held, partners = [""] * len(cues), [-1] * len(cues)
    for place, cue in enumerate(cues):
        neighbors = [other for other in (place - 1, place + 1) if 0 <= other < len(cues)]
        beside = [one for one in neighbors if cues[one] == "expression" and partners[one] < 0]
        if cue == "near" and beside and rng.random() < _NEIGHBOR_SHARE:
            partner = int(rng.choice(beside))
            partners[place], partners[partner] = partner, place
        elif cue == "near" or (cue == "expression" and rng.random() < _DISTRACTOR_SHARE):
            held[place] = str(rng.choice(SCENE_CLASSES))
    return held, partners


def _places(
    rng: np.random.Generator, width: int, partners: list[int], distant_place: int
) -> tuple[list[float], float, float]:
    """x of the people (close if holding hands) and of the figure (-1 = none); a person's width."""
    count = len(partners)
    close = [place > 0 and partners[place] == place - 1 for place in range(count)]
    gaps, widths = [0.0 if near else rng.uniform(0.15, 0.5) for near in close], [1.0] * count
    if distant_place >= 0:
        if distant_place < count and gaps[distant_place] == 0:  # never between two who hold hands
            distant_place += 1
        gaps.insert(distant_place, 0.1)
        widths.insert(distant_place, 0.7)
    unit = min(58.0, width / (sum(widths) + 0.25 * sum(gaps)))
    slack = width - unit * sum(widths)
    shares = np.array([*gaps, rng.uniform(0.15, 0.5)])
    shares *= slack / shares.sum()
    centers, x = [], 0.0
    for gap, slot in zip(shares, widths, strict=False):
        centers.append(float(x + gap + unit * slot / 2))
        x += gap + unit * slot
    distant_x = centers.pop(distant_place) if distant_place >= 0 else -1.0
    return centers, distant_x, unit


def decide(scene: Scene, person: Person) -> tuple[str, str]:
    """(cue, emotion) of a person by the rule above."""
    if person.expression:
        return "expression", person.expression
    if person.held:
        return "near", person.held
    if person.partner >= 0:
        return "near", scene.people[person.partner].expression
    return "far", scene.setting or scene.distant


def all_emotions(scene: Scene, person: Person) -> set[str]:
    """Every emotion that bears on a person: theirs, held, of a partner, of the surroundings."""
    neighbor = scene.people[person.partner].expression if person.partner >= 0 else ""
    return {person.expression, person.held, neighbor, scene.setting or scene.distant} - {""}


def read_scenes(config: DataConfig, split: str) -> tuple[list[Record], ReadReport]:
    """The first N scenes of a split, N being the value of its field; splits have nothing in common,
    the run's seed plays no part. Raises UserError for another value or missing SCENE_CLASSES.
    """
    value = config.annotation_file(split)
    if not value.isdecimal() or int(value) == 0:
        raise UserError(
            f"config.data.{split}={value!r} cannot be used: with config.data.source='scenes' it "
            "is the number of images, such as '1000'"
        )
    if missing := [name for name in SCENE_CLASSES if name not in config.class_names]:
        need = f"the built-in scenes need {', '.join(SCENE_CLASSES)}"
        raise UserError(f"config.class_names lacks {', '.join(missing)}: {need}")
    records = [_record(config, split, index) for index in range(int(value))]
    report = ReadReport(f"built-in scenes {split}", images=len(records))
    for record in records:
        require_room(config, report.source, record.name, len(record.boxes))
        report.people += len(record.boxes)
    return records, report


def _record(config: DataConfig, split: str, index: int) -> Record:
    image = SceneImage(SPLITS.index(split), index)
    scene, name = make_scene(image.seed, index), f"scene {split}/{index}"
    labels = np.zeros((len(scene.people), len(config.class_names)), np.float32)
    decided = [decide(scene, person) for person in scene.people]
    for row, person, (_, emotion) in zip(labels, scene.people, decided, strict=True):
        for one in all_emotions(scene, person) if config.multi_label else (emotion,):
            row[config.class_names.index(one)] = 1
    boxes = np.array([person.head_box for person in scene.people], np.float32)
    cues = tuple(cue for cue, _ in decided)
    return Record(index, image, scene.width, scene.height, boxes, labels, name, cues)
