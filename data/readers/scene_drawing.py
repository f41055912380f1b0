"""Paints a built-in scene with PIL, at twice the size for smooth edges. Lengths: final pixels."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, ...]
Point = tuple[float, float]
Angles = tuple[int, int]  # degrees
_SCALE = 2
_HEAD_HEIGHT = 1.12  # of its width
_DARK = (25, 15, 15)
_WHITE = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Person:
    """One person: center of the head and its width, what they feel on the outside, and colors."""

    x: float
    y: float
    head: float
    slot: float  # width that is theirs alone
    expression: str  # '' = neutral
    held: str  # emotion of the object before the chest, '' = none
    partner: int  # whose hand they hold, -1 = nobody's
    skin: Color
    hair: Color
    long_hair: bool
    shirt: Color

    @property
    def head_box(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) of the head, hair included."""
        half_width, half_height = self.head / 2, self.head * _HEAD_HEIGHT / 2
        return self.x - half_width, self.y - half_height, self.x + half_width, self.y + half_height


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything in one picture."""

    width: int
    height: int
    setting: str  # emotion of the surroundings; '' = plain
    distant: str  # emotion of the figure on the horizon; '' = none
    distant_x: float
    people: tuple[Person, ...]


@dataclasses.dataclass(frozen=True)
class _Pen:
    """PIL's drawing in lengths of `size` pixels around the point (x, y); y grows downwards."""

    draw: ImageDraw.ImageDraw
    x: float = 0
    y: float = 0
    size: float = 1

    def at(self, x: float, y: float, size: float) -> "_Pen":
        """A pen for an object of `size` pixels whose origin is at (x, y) of this pen."""
        return _Pen(self.draw, self.x + x * self.size, self.y + y * self.size, size)

    def _point(self, x: float, y: float) -> Point:
        return (self.x + x * self.size) * _SCALE, (self.y + y * self.size) * _SCALE

    def _box(self, x: float, y: float, rx: float, ry: float) -> list[float]:
        return [*self._point(x - rx, y - ry), *self._point(x + rx, y + ry)]

    def _width(self, width: float, pixels: float) -> int:
        return max(1, round((width * self.size + pixels) * _SCALE))

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Color, outline: Color | None = None
    ) -> None:
        self.draw.ellipse(self._box(x, y, rx, ry), fill=fill, outline=outline, width=2)

    def rectangle(
        self, x1: float, y1: float, x2: float, y2: float, fill: Color, outline: Color | None = None
    ) -> None:
        box = [*self._point(x1, y1), *self._point(x2, y2)]
        self.draw.rectangle(box, fill=fill, outline=outline, width=2)

    def polygon(self, points: Sequence[Point], fill: Color) -> None:
        self.draw.polygon([self._point(*point) for point in points], fill=fill)

    def line(
        self, points: Sequence[Point], fill: Color, width: float = 0, *, pixels: float = 0
    ) -> None:
        scaled = [self._point(*point) for point in points]
        self.draw.line(scaled, fill=fill, width=self._width(width, pixels), joint="curve")

    def arc(
        self, x: float, y: float, rx: float, ry: float, angles: Angles, fill: Color, width: float
    ) -> None:
        self.draw.arc(self._box(x, y, rx, ry), *angles, fill, self._width(width, 0))

    def chord(self, x: float, y: float, rx: float, ry: float, angles: Angles, fill: Color) -> None:
        self.draw.chord(self._box(x, y, rx, ry), *angles, fill=fill)


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The RGB picture; `rng` varies only what carries no meaning (shades, noise, gravestones)."""
    image = Image.new("RGB", (scene.width * _SCALE, scene.height * _SCALE))
    pen = _Pen(ImageDraw.Draw(image))
    horizon = scene.height * rng.uniform(0.56, 0.64)
    sky, ground, decorate = _SETTINGS[scene.setting]
    pen.rectangle(0, 0, scene.width, horizon, _shade(rng, sky))
    pen.rectangle(0, horizon, scene.width, scene.height, _shade(rng, ground))
    if decorate:
        decorate(pen, scene, horizon, rng)
    if scene.distant:
        _DISTANT[scene.distant](pen.at(scene.distant_x, horizon + 6, scene.height * 0.27))
    for person in scene.people:
        _draw_body(pen, person, scene.height)
    for place, person in enumerate(scene.people):
        if person.partner > place:
            _draw_held_hands(pen, person, scene.people[person.partner], scene.height)
    for person in scene.people:
        _draw_head(pen, person)
        if person.held:
            size = min(person.slot, person.head * 1.15) * 0.27
            _OBJECTS[person.held](pen.at(person.x, _chest(person, scene.height), size))
    pixels = np.asarray(image.reduce(_SCALE)).astype(np.int16)
    noise = rng.integers(-9, 10, pixels.shape, dtype=np.int16)
    return Image.fromarray(np.clip(pixels + noise + rng.integers(-14, 15), 0, 255).astype(np.uint8))


def _shade(rng: np.random.Generator, color: Color, amount: int = 14) -> Color:
    return tuple(int(np.clip(value + rng.integers(-amount, amount + 1), 0, 255)) for value in color)


def _fair(pen: _Pen, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    pen.ellipse(scene.width * rng.uniform(0.05, 0.95), scene.height * 0.2, 13, 13, (255, 225, 70))
    x, radius = scene.width * rng.uniform(0.1, 0.9), scene.height * 0.2
    y = horizon - radius
    for spoke in range(4):
        angle = math.pi * spoke / 4 + rng.uniform(0, 0.6)
        dx, dy = radius * math.cos(angle), radius * math.sin(angle)
        pen.line([(x - dx, y - dy), (x + dx, y + dy)], (240, 240, 250), 1.5)
        pen.ellipse(x + dx, y + dy, 4, 4, (250, 90, 120))
        pen.ellipse(x - dx, y - dy, 4, 4, (255, 170, 40))
    colors = ((250, 70, 90), (255, 205, 50), (90, 110, 240), (255, 255, 255))
    for number, left in enumerate(range(0, scene.width, 12)):
        pen.polygon([(left, 2), (left + 12, 2), (left + 6, 13)], colors[number % 4])


def _rain(pen: _Pen, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    for _ in range(6):
        x, y = rng.uniform(0, scene.width), rng.uniform(0, 14)
        size = rng.uniform(14, 26), rng.uniform(7, 12)
        pen.ellipse(x, y, *size, _shade(rng, (78, 88, 102), 8))
    for x, y in rng.uniform((0, 10), (scene.width, scene.height), (70, 2)).tolist():
        pen.line([(x, y), (x - 3, y + 11)], (176, 200, 228), 1)


def _graveyard(pen: _Pen, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    moon = scene.width * rng.uniform(0.05, 0.95), scene.height * 0.13
    pen.ellipse(*moon, 12, 12, (240, 238, 205))
    for _ in range(7):
        x, y = rng.uniform(0, scene.width), horizon + rng.uniform(2, scene.height * 0.3)
        pen.rectangle(x - 6, y - 13, x + 6, y + 4, (128, 130, 138))
        pen.ellipse(x, y - 13, 6, 6, (128, 130, 138))
        pen.line([(x, y - 14), (x, y - 4)], (60, 60, 66), 1.5)
        pen.line([(x - 3, y - 11), (x + 3, y - 11)], (60, 60, 66), 1.5)
    tree = pen.at(scene.width * rng.uniform(0.0, 1.0), horizon, 1)
    tree.line([(0, 6), (0, -46)], (12, 10, 18), 4)
    for side, rise in ((-1, 30), (1, 38), (-1, 44)):
        tree.line([(0, 8 - rise), (side * 18, -rise - 14)], (12, 10, 18), 2)


def _fire(pen: _Pen, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    for x in np.arange(0, scene.width, 11.0):
        top, foot = horizon - rng.uniform(16, 46), horizon + 2
        middle = x + rng.uniform(-4, 4)
        pen.polygon([(x - 11, foot), (middle, top), (x + 11, foot)], (255, 150, 30))
        tip = (middle, (top + horizon) / 2)
        pen.polygon([(x - 6, foot), tip, (x + 6, foot)], (255, 225, 80))
    for _ in range(3):
        x, y = rng.uniform(0, scene.width), rng.uniform(0, 18)
        pen.ellipse(x, y, rng.uniform(14, 30), rng.uniform(6, 11), (58, 34, 36))


def _chest(person: Person, height: int) -> float:
    neck = person.y + person.head * _HEAD_HEIGHT / 2
    return neck + (height - neck) * 0.45


def _draw_body(pen: _Pen, person: Person, height: int) -> None:
    neck = person.y + person.head * 0.45
    half, head, x = min(person.slot * 0.46, person.head * 0.62), person.head, person.x
    shade = tuple(int(value * 0.8) for value in person.shirt)
    pen.rectangle(x - head * 0.14, neck, x + head * 0.14, neck + head * 0.25, person.skin)
    top = neck + head * 0.2
    left = [(x - half, height), (x - half, top + 7), (x - half * 0.6, top)]
    right = [(x + half * 0.6, top), (x + half, top + 7), (x + half, height)]
    pen.polygon([*left, *right], person.shirt)
    for side in (-1, 1):
        sleeve = x + side * half * 0.72
        pen.line([(sleeve, top + 12), (sleeve, height)], shade, 1.5)


def _draw_held_hands(pen: _Pen, one: Person, other: Person, height: int) -> None:
    middle = ((one.x + other.x) / 2, height * 0.88)
    for person, side in ((one, 1), (other, -1)):
        shoulder = person.x + side * min(person.slot * 0.4, person.head * 0.5)
        pen.line([(shoulder, _chest(person, height)), middle], person.skin, 7)
    pen.ellipse(*middle, 7, 7, one.skin, (60, 40, 30))


def _draw_head(pen: _Pen, person: Person) -> None:
    x, y, size = person.x, person.y, person.head
    half_width, half_height = size / 2, size * _HEAD_HEIGHT / 2
    if person.long_hair:
        pen.rectangle(x - half_width, y, x + half_width, y + half_height * 1.05, person.hair)
    pen.ellipse(x, y, half_width, half_height, person.hair)
    pen.ellipse(x, y + half_height * 0.12, half_width * 0.9, half_height * 0.87, person.skin)
    pen.chord(x, y, half_width * 0.97, half_height, (205, 335), person.hair)
    _EXPRESSIONS[person.expression](pen.at(x, y + size * 0.08, size))


def _eyes(pen: _Pen, y: float, *, white: float, pupil: float, brows: tuple[float, ...]) -> None:
    """`brows`: height of the inner and the outer end, and width."""
    inner, outer, width = brows
    for side in (-1, 1):
        pen.ellipse(side * 0.19, y, white, white, _WHITE)
        pen.ellipse(side * 0.19, y, pupil, pupil, _DARK)
        pen.line([(side * 0.08, -inner), (side * 0.32, -outer)], _DARK, width)


def _neutral_face(pen: _Pen) -> None:
    _eyes(pen, 0.0, white=0.0, pupil=0.06, brows=(0.14, 0.14, 0.04))
    pen.line([(-0.13, 0.27), (0.13, 0.27)], _DARK, 0.05)


def _happy_face(pen: _Pen) -> None:
    for side in (-1, 1):
        pen.arc(side * 0.19, 0.04, 0.1, 0.1, (190, 350), _DARK, 0.06)
        pen.ellipse(side * 0.29, 0.16, 0.08, 0.06, (250, 130, 130))
    pen.chord(0, 0.17, 0.26, 0.24, (0, 180), _DARK)
    pen.chord(0, 0.17, 0.21, 0.10, (0, 180), _WHITE)


def _sad_face(pen: _Pen) -> None:
    _eyes(pen, 0.02, white=0.0, pupil=0.06, brows=(0.22, 0.08, 0.06))
    pen.arc(0, 0.40, 0.2, 0.18, (195, 345), _DARK, 0.07)
    for side in (-1, 1):
        pen.ellipse(side * 0.22, 0.2, 0.06, 0.11, (70, 150, 255))


def _angry_face(pen: _Pen) -> None:
    _eyes(pen, 0.03, white=0.09, pupil=0.06, brows=(0.02, 0.20, 0.10))
    pen.rectangle(-0.2, 0.2, 0.2, 0.36, _WHITE, _DARK)
    for tooth in (-0.1, 0.0, 0.1):
        pen.line([(tooth, 0.2), (tooth, 0.36)], _DARK, 0.03)


def _fearful_face(pen: _Pen) -> None:
    _eyes(pen, -0.02, white=0.15, pupil=0.05, brows=(0.28, 0.22, 0.05))
    pen.ellipse(0, 0.3, 0.11, 0.14, _DARK)


def _balloon(pen: _Pen) -> None:
    pen.line([(0, 0), (0, 1.6)], _DARK, pixels=1)
    pen.ellipse(0, -0.1, 0.9, 1, (255, 225, 40), _DARK)
    pen.ellipse(-0.3, -0.4, 0.2, 0.25, _WHITE)


def _broken_heart(pen: _Pen) -> None:
    for side in (-1, 1):
        pen.ellipse(side * 0.45, -0.3, 0.52, 0.52, (60, 90, 200), _DARK)
    pen.polygon([(-0.9, -0.1), (0.9, -0.1), (0, 1)], (60, 90, 200))
    pen.line([(0, -0.6), (-0.25, -0.1), (0.2, 0.25), (0, 1)], _WHITE, 0.18)


def _spider(pen: _Pen) -> None:
    pen.ellipse(0, 0, 1.1, 1, (235, 235, 225))
    for side in (-1, 1):
        for leg in (-0.8, -0.25, 0.3, 0.85):
            pen.line([(0, 0), (side * 0.6, leg - 0.2), (side, leg)], (10, 10, 10), pixels=1.2)
    pen.ellipse(0, 0, 0.42, 0.5, (10, 10, 10))


def _torch(pen: _Pen) -> None:
    pen.rectangle(-0.2, 0, 0.2, 1.5, (90, 55, 25))
    pen.polygon([(-0.8, 0.2), (-0.4, -1.0), (0.0, -0.5), (0.4, -1.0), (0.8, 0.2)], (225, 30, 20))
    pen.ellipse(0, 0, 0.4, 0.4, (255, 170, 30))


def _figure(pen: _Pen, color: Color, *, reach: float, height: float = 1.0) -> None:
    """`reach`: how high the hands are."""
    pen = pen.at(0, 0, pen.size * height)
    pen.ellipse(0, -0.83, 0.13, 0.14, (225, 180, 140))
    pen.polygon([(-0.2, 0), (0, -0.72), (0.2, 0)], color)
    for side in (-1, 1):
        pen.line([(0, -0.6), (side * 0.28, -reach)], color, pixels=2)


def _dancer(pen: _Pen) -> None:
    _figure(pen, (255, 200, 30), reach=0.92)
    for side, color in ((-1, (250, 70, 100)), (1, (70, 130, 250))):
        pen.ellipse(side * 0.28, -1.02, 0.13, 0.15, color)


def _mourner(pen: _Pen) -> None:
    _figure(pen, (50, 60, 110), reach=0.35)
    pen.chord(0, -0.82, 0.38, 0.3, (180, 360), (45, 60, 150))


def _raging_man(pen: _Pen) -> None:
    for x, rise in ((-0.26, 0.8), (0.0, 1.15), (0.26, 0.8)):
        pen.polygon([(x - 0.18, 0), (x, -rise), (x + 0.18, 0)], (255, 140, 30))
    _figure(pen, (190, 20, 20), reach=0.92, height=0.9)


def _ghost(pen: _Pen) -> None:
    half = 0.28
    pen.ellipse(0, -0.68, half, 0.32, (250, 250, 255), (70, 70, 90))
    pen.rectangle(-half, -0.68, half, 0, (250, 250, 255))
    for side in (-1, 1):
        pen.ellipse(side * half * 0.42, -0.7, half * 0.22, half * 0.34, (10, 10, 20))
    pen.ellipse(0, -0.42, half * 0.25, half * 0.4, (10, 10, 20))


# colors of sky and ground, and what is painted on them
_SETTINGS: dict[str, tuple[Color, Color, Callable | None]] = {
    "": ((214, 218, 210), (176, 182, 150), None),
    "Anger": ((196, 62, 36), (74, 34, 28), _fire),
    "Fear": ((26, 24, 56), (38, 52, 44), _graveyard),
    "Happy": ((125, 200, 250), (110, 200, 90), _fair),
    "Sad": ((112, 128, 148), (84, 98, 112), _rain),
}
_EXPRESSIONS = {  # drawn in widths of the head around its center
    "": _neutral_face,
    "Anger": _angry_face,
    "Fear": _fearful_face,
    "Happy": _happy_face,
    "Sad": _sad_face,
}
# held things are drawn in their own size around the chest, distant figures above their feet
_OBJECTS = {"Anger": _torch, "Fear": _spider, "Happy": _balloon, "Sad": _broken_heart}
_DISTANT = {"Anger": _raging_man, "Fear": _ghost, "Happy": _dancer, "Sad": _mourner}
