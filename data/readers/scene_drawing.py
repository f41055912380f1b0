"""Paints a built-in scene with PIL: at twice the size, then reduced, so that edges are smooth.
Lengths are pixels of the final image.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, ...]
Length = float | int  # pixels of the final image
_SCALE = 2
_HEAD_HEIGHT = 1.12  # of its width


@dataclasses.dataclass(frozen=True)
class Person:
    """One person: centre of the head and its width, what they feel on the outside, and colours."""

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


class _Canvas:
    """PIL's drawing with coordinates in final pixels."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def ellipse(
        self,
        x: Length,
        y: Length,
        half_width: Length,
        half_height: Length,
        fill: Color,
        outline: Color | None = None,
    ) -> None:
        box = [
            (x - half_width) * _SCALE,
            (y - half_height) * _SCALE,
            (x + half_width) * _SCALE,
            (y + half_height) * _SCALE,
        ]
        self._draw.ellipse(box, fill=fill, outline=outline, width=2)

    def polygon(self, points: list[tuple[Length, Length]], fill: Color) -> None:
        self._draw.polygon([(x * _SCALE, y * _SCALE) for x, y in points], fill=fill)

    def rectangle(
        self,
        x1: Length,
        y1: Length,
        x2: Length,
        y2: Length,
        fill: Color,
        outline: Color | None = None,
    ) -> None:
        self._draw.rectangle(
            [x1 * _SCALE, y1 * _SCALE, x2 * _SCALE, y2 * _SCALE],
            fill=fill,
            outline=outline,
            width=2,
        )

    def line(self, points: list[tuple[Length, Length]], fill: Color, width: Length) -> None:
        self._draw.line(
            [(x * _SCALE, y * _SCALE) for x, y in points],
            fill=fill,
            width=max(1, round(width * _SCALE)),
            joint="curve",
        )

    def arc(
        self,
        x: Length,
        y: Length,
        half_width: Length,
        half_height: Length,
        start: int,
        end: int,
        fill: Color,
        width: Length,
    ) -> None:
        box = [
            (x - half_width) * _SCALE,
            (y - half_height) * _SCALE,
            (x + half_width) * _SCALE,
            (y + half_height) * _SCALE,
        ]
        self._draw.arc(box, start, end, fill=fill, width=max(1, round(width * _SCALE)))

    def chord(
        self,
        x: Length,
        y: Length,
        half_width: Length,
        half_height: Length,
        start: int,
        end: int,
        fill: Color,
    ) -> None:
        box = [
            (x - half_width) * _SCALE,
            (y - half_height) * _SCALE,
            (x + half_width) * _SCALE,
            (y + half_height) * _SCALE,
        ]
        self._draw.chord(box, start, end, fill=fill)


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The RGB picture; `rng` only varies what carries no meaning (shades, noise, where the
    gravestones stand).
    """
    image = Image.new("RGB", (scene.width * _SCALE, scene.height * _SCALE))
    canvas = _Canvas(image)
    horizon = scene.height * rng.uniform(0.56, 0.64)
    _SETTINGS[scene.setting](canvas, scene, horizon, rng)
    if scene.distant:
        _DISTANT[scene.distant](canvas, scene.distant_x, horizon + 6, scene.height * 0.27)
    for person in scene.people:
        _draw_body(canvas, person, scene.height)
    for place, person in enumerate(scene.people):
        if person.partner > place:
            _draw_held_hands(canvas, person, scene.people[person.partner], scene.height)
    for person in scene.people:
        _draw_head(canvas, person)
        if person.held:
            _OBJECTS[person.held](
                canvas,
                person.x,
                _chest(person, scene.height),
                min(person.slot, person.head * 1.15) * 0.27,
            )
    pixels = np.asarray(image.reduce(_SCALE)).astype(np.int16)
    noise = rng.integers(-9, 10, pixels.shape, dtype=np.int16)
    return Image.fromarray(np.clip(pixels + noise + rng.integers(-14, 15), 0, 255).astype(np.uint8))


def _shade(rng: np.random.Generator, color: Color, amount: int = 14) -> Color:
    return tuple(int(np.clip(value + rng.integers(-amount, amount + 1), 0, 255)) for value in color)


def _ground(canvas: _Canvas, scene: Scene, horizon: Length, sky: Color, ground: Color) -> None:
    canvas.rectangle(0, 0, scene.width, horizon, sky)
    canvas.rectangle(0, horizon, scene.width, scene.height, ground)


def _plain(canvas: _Canvas, scene: Scene, horizon: Length, rng: np.random.Generator) -> None:
    _ground(canvas, scene, horizon, _shade(rng, (214, 218, 210)), _shade(rng, (176, 182, 150)))


def _fair(canvas: _Canvas, scene: Scene, horizon: Length, rng: np.random.Generator) -> None:
    _ground(canvas, scene, horizon, _shade(rng, (125, 200, 250)), _shade(rng, (110, 200, 90)))
    canvas.ellipse(
        scene.width * rng.uniform(0.05, 0.95), scene.height * 0.2, 13, 13, (255, 225, 70)
    )
    x, radius = scene.width * rng.uniform(0.1, 0.9), scene.height * 0.2
    y = horizon - radius
    for spoke in range(4):
        angle = math.pi * spoke / 4 + rng.uniform(0, 0.6)
        dx, dy = radius * math.cos(angle), radius * math.sin(angle)
        canvas.line([(x - dx, y - dy), (x + dx, y + dy)], (240, 240, 250), 1.5)
        canvas.ellipse(x + dx, y + dy, 4, 4, (250, 90, 120))
        canvas.ellipse(x - dx, y - dy, 4, 4, (255, 170, 40))
    colors = ((250, 70, 90), (255, 205, 50), (90, 110, 240), (255, 255, 255))
    for number, left in enumerate(range(0, scene.width, 12)):
        canvas.polygon([(left, 2), (left + 12, 2), (left + 6, 13)], colors[number % 4])


def _rain(canvas: _Canvas, scene: Scene, horizon: Length, rng: np.random.Generator) -> None:
    _ground(canvas, scene, horizon, _shade(rng, (112, 128, 148)), _shade(rng, (84, 98, 112)))
    for _ in range(6):
        canvas.ellipse(
            rng.uniform(0, scene.width),
            rng.uniform(0, 14),
            rng.uniform(14, 26),
            rng.uniform(7, 12),
            _shade(rng, (78, 88, 102), 8),
        )
    starts = rng.uniform((0, 10), (scene.width, scene.height), (70, 2))
    for x, y in starts.tolist():
        canvas.line([(x, y), (x - 3, y + 11)], (176, 200, 228), 1)


def _graveyard(canvas: _Canvas, scene: Scene, horizon: Length, rng: np.random.Generator) -> None:
    _ground(canvas, scene, horizon, _shade(rng, (26, 24, 56)), _shade(rng, (38, 52, 44)))
    canvas.ellipse(
        scene.width * rng.uniform(0.05, 0.95), scene.height * 0.13, 12, 12, (240, 238, 205)
    )
    for _ in range(7):
        x, y = rng.uniform(0, scene.width), horizon + rng.uniform(2, scene.height * 0.3)
        canvas.rectangle(x - 6, y - 13, x + 6, y + 4, (128, 130, 138))
        canvas.ellipse(x, y - 13, 6, 6, (128, 130, 138))
        canvas.line([(x, y - 14), (x, y - 4)], (60, 60, 66), 1.5)
        canvas.line([(x - 3, y - 11), (x + 3, y - 11)], (60, 60, 66), 1.5)
    x = scene.width * rng.uniform(0.0, 1.0)
    canvas.line([(x, horizon + 6), (x, horizon - 46)], (12, 10, 18), 4)
    for side, rise in ((-1, 30), (1, 38), (-1, 44)):
        canvas.line(
            [(x, horizon - rise + 8), (x + side * 18, horizon - rise - 14)], (12, 10, 18), 2
        )


def _fire(canvas: _Canvas, scene: Scene, horizon: Length, rng: np.random.Generator) -> None:
    _ground(canvas, scene, horizon, _shade(rng, (196, 62, 36)), _shade(rng, (74, 34, 28)))
    for x in np.arange(0, scene.width, 11.0):
        top = horizon - rng.uniform(16, 46)
        middle = x + rng.uniform(-4, 4)
        canvas.polygon(
            [(x - 11, horizon + 2), (middle, top), (x + 11, horizon + 2)], (255, 150, 30)
        )
        canvas.polygon(
            [(x - 6, horizon + 2), (middle, (top + horizon) / 2), (x + 6, horizon + 2)],
            (255, 225, 80),
        )
    for _ in range(3):
        canvas.ellipse(
            rng.uniform(0, scene.width),
            rng.uniform(0, 18),
            rng.uniform(14, 30),
            rng.uniform(6, 11),
            (58, 34, 36),
        )


def _chest(person: Person, height: int) -> float:
    neck = person.y + person.head * _HEAD_HEIGHT / 2
    return neck + (height - neck) * 0.45


def _draw_body(canvas: _Canvas, person: Person, height: int) -> None:
    neck = person.y + person.head * 0.45
    half = min(person.slot * 0.46, person.head * 0.62)
    shade = tuple(int(value * 0.8) for value in person.shirt)
    canvas.rectangle(
        person.x - person.head * 0.14,
        neck,
        person.x + person.head * 0.14,
        neck + person.head * 0.25,
        person.skin,
    )
    top = neck + person.head * 0.2
    outline = [
        (person.x - half, height),
        (person.x - half, top + 7),
        (person.x - half * 0.6, top),
        (person.x + half * 0.6, top),
    ]
    canvas.polygon([*outline, (person.x + half, top + 7), (person.x + half, height)], person.shirt)
    for side in (-1, 1):
        canvas.line(
            [(person.x + side * half * 0.72, top + 12), (person.x + side * half * 0.72, height)],
            shade,
            1.5,
        )


def _draw_held_hands(canvas: _Canvas, one: Person, other: Person, height: int) -> None:
    for person in (one, other):
        middle = ((one.x + other.x) / 2, height * 0.88)
        side = 1 if person is one else -1
        shoulder = (
            person.x + side * min(person.slot * 0.4, person.head * 0.5),
            _chest(person, height),
        )
        canvas.line([shoulder, middle], person.skin, 7)
    canvas.ellipse((one.x + other.x) / 2, height * 0.88, 7, 7, one.skin, (60, 40, 30))


def _draw_head(canvas: _Canvas, person: Person) -> None:
    x, y, size = person.x, person.y, person.head
    half_width, half_height = size / 2, size * _HEAD_HEIGHT / 2
    if person.long_hair:
        canvas.rectangle(x - half_width, y, x + half_width, y + half_height * 1.05, person.hair)
    canvas.ellipse(x, y, half_width, half_height, person.hair)
    canvas.ellipse(x, y + half_height * 0.12, half_width * 0.9, half_height * 0.87, person.skin)
    canvas.chord(x, y, half_width * 0.97, half_height, 205, 335, person.hair)
    _EXPRESSIONS[person.expression](canvas, x, y + size * 0.08, size)


_DARK = (25, 15, 15)
_WHITE = (255, 255, 255)


def _eyes(
    canvas: _Canvas, x: Length, y: Length, size: Length, *, white: Length, pupil: Length
) -> None:
    for side in (-1, 1):
        canvas.ellipse(x + side * size * 0.19, y, size * white, size * white, _WHITE)
        canvas.ellipse(x + side * size * 0.19, y, size * pupil, size * pupil, _DARK)


def _brows(
    canvas: _Canvas,
    x: Length,
    y: Length,
    size: Length,
    *,
    inner: Length,
    outer: Length,
    width: Length,
) -> None:
    """`inner` and `outer`: height of the two ends above the eyes, in head widths."""
    for side in (-1, 1):
        ends = [
            (x + side * size * 0.08, y - size * inner),
            (x + side * size * 0.32, y - size * outer),
        ]
        canvas.line(ends, _DARK, size * width)


def _neutral_face(canvas: _Canvas, x: Length, y: Length, size: Length) -> None:
    _eyes(canvas, x, y, size, white=0.0, pupil=0.06)
    _brows(canvas, x, y, size, inner=0.14, outer=0.14, width=0.04)
    canvas.line(
        [(x - size * 0.13, y + size * 0.27), (x + size * 0.13, y + size * 0.27)], _DARK, size * 0.05
    )


def _happy_face(canvas: _Canvas, x: Length, y: Length, size: Length) -> None:
    for side in (-1, 1):
        canvas.arc(
            x + side * size * 0.19,
            y + size * 0.04,
            size * 0.1,
            size * 0.1,
            190,
            350,
            _DARK,
            size * 0.06,
        )
        canvas.ellipse(
            x + side * size * 0.29, y + size * 0.16, size * 0.08, size * 0.06, (250, 130, 130)
        )
    canvas.chord(x, y + size * 0.17, size * 0.26, size * 0.24, 0, 180, _DARK)
    canvas.chord(x, y + size * 0.17, size * 0.21, size * 0.10, 0, 180, _WHITE)


def _sad_face(canvas: _Canvas, x: Length, y: Length, size: Length) -> None:
    _eyes(canvas, x, y + size * 0.02, size, white=0.0, pupil=0.06)
    _brows(canvas, x, y, size, inner=0.22, outer=0.08, width=0.06)
    canvas.arc(x, y + size * 0.40, size * 0.2, size * 0.18, 195, 345, _DARK, size * 0.07)
    for side in (-1, 1):
        canvas.ellipse(
            x + side * size * 0.22, y + size * 0.2, size * 0.06, size * 0.11, (70, 150, 255)
        )


def _angry_face(canvas: _Canvas, x: Length, y: Length, size: Length) -> None:
    _eyes(canvas, x, y + size * 0.03, size, white=0.09, pupil=0.06)
    _brows(canvas, x, y, size, inner=0.02, outer=0.20, width=0.10)
    canvas.rectangle(x - size * 0.2, y + size * 0.2, x + size * 0.2, y + size * 0.36, _WHITE, _DARK)
    for tooth in (-0.1, 0.0, 0.1):
        canvas.line(
            [(x + size * tooth, y + size * 0.2), (x + size * tooth, y + size * 0.36)],
            _DARK,
            size * 0.03,
        )


def _fearful_face(canvas: _Canvas, x: Length, y: Length, size: Length) -> None:
    _eyes(canvas, x, y - size * 0.02, size, white=0.15, pupil=0.05)
    _brows(canvas, x, y - size * 0.08, size, inner=0.2, outer=0.14, width=0.05)
    canvas.ellipse(x, y + size * 0.3, size * 0.11, size * 0.14, _DARK)


def _balloon(canvas: _Canvas, x: Length, y: Length, size: Length) -> None:
    canvas.line([(x, y), (x, y + size * 1.6)], _DARK, 1)
    canvas.ellipse(x, y - size * 0.1, size * 0.9, size, (255, 225, 40), _DARK)
    canvas.ellipse(x - size * 0.3, y - size * 0.4, size * 0.2, size * 0.25, _WHITE)


def _broken_heart(canvas: _Canvas, x: Length, y: Length, size: Length) -> None:
    for side in (-1, 1):
        canvas.ellipse(
            x + side * size * 0.45, y - size * 0.3, size * 0.52, size * 0.52, (60, 90, 200), _DARK
        )
    canvas.polygon(
        [(x - size * 0.9, y - size * 0.1), (x + size * 0.9, y - size * 0.1), (x, y + size)],
        (60, 90, 200),
    )
    crack = [
        (x, y - size * 0.6),
        (x - size * 0.25, y - size * 0.1),
        (x + size * 0.2, y + size * 0.25),
        (x, y + size),
    ]
    canvas.line(crack, _WHITE, size * 0.18)


def _spider(canvas: _Canvas, x: Length, y: Length, size: Length) -> None:
    canvas.ellipse(x, y, size * 1.1, size, (235, 235, 225))
    for side in (-1, 1):
        for leg in (-0.8, -0.25, 0.3, 0.85):
            canvas.line(
                [
                    (x, y),
                    (x + side * size * 0.6, y + size * (leg - 0.2)),
                    (x + side * size, y + size * leg),
                ],
                (10, 10, 10),
                1.2,
            )
    canvas.ellipse(x, y, size * 0.42, size * 0.5, (10, 10, 10))


def _torch(canvas: _Canvas, x: Length, y: Length, size: Length) -> None:
    canvas.rectangle(x - size * 0.2, y, x + size * 0.2, y + size * 1.5, (90, 55, 25))
    crown = ((-0.8, 0.2), (-0.4, -1.0), (0.0, -0.5), (0.4, -1.0), (0.8, 0.2))
    canvas.polygon([(x + size * dx, y + size * dy) for dx, dy in crown], (225, 30, 20))
    canvas.ellipse(x, y, size * 0.4, size * 0.4, (255, 170, 30))


def _dancer(canvas: _Canvas, x: Length, foot: Length, height: Length) -> None:
    _figure(canvas, x, foot, height, (255, 200, 30), arms_up=True)
    for side, color in ((-1, (250, 70, 100)), (1, (70, 130, 250))):
        canvas.ellipse(
            x + side * height * 0.28, foot - height * 1.02, height * 0.13, height * 0.15, color
        )


def _mourner(canvas: _Canvas, x: Length, foot: Length, height: Length) -> None:
    _figure(canvas, x, foot, height, (50, 60, 110), arms_up=False)
    canvas.chord(x, foot - height * 0.82, height * 0.38, height * 0.3, 180, 360, (45, 60, 150))


def _raging_man(canvas: _Canvas, x: Length, foot: Length, height: Length) -> None:
    for offset, rise in ((-0.26, 0.8), (0.0, 1.15), (0.26, 0.8)):
        tip = (x + offset * height, foot - rise * height)
        canvas.polygon(
            [(x + (offset - 0.18) * height, foot), tip, (x + (offset + 0.18) * height, foot)],
            (255, 140, 30),
        )
    _figure(canvas, x, foot, height * 0.9, (190, 20, 20), arms_up=True)


def _ghost(canvas: _Canvas, x: Length, foot: Length, height: Length) -> None:
    half = height * 0.28
    canvas.ellipse(x, foot - height * 0.68, half, height * 0.32, (250, 250, 255), (70, 70, 90))
    canvas.rectangle(x - half, foot - height * 0.68, x + half, foot, (250, 250, 255))
    for side in (-1, 1):
        canvas.ellipse(
            x + side * half * 0.42, foot - height * 0.7, half * 0.22, half * 0.34, (10, 10, 20)
        )
    canvas.ellipse(x, foot - height * 0.42, half * 0.25, half * 0.4, (10, 10, 20))


def _figure(
    canvas: _Canvas, x: Length, foot: Length, height: Length, color: Color, *, arms_up: bool
) -> None:
    canvas.ellipse(x, foot - height * 0.83, height * 0.13, height * 0.14, (225, 180, 140))
    canvas.polygon(
        [(x - height * 0.2, foot), (x, foot - height * 0.72), (x + height * 0.2, foot)], color
    )
    reach = foot - height * (0.92 if arms_up else 0.35)
    for side in (-1, 1):
        canvas.line([(x, foot - height * 0.6), (x + side * height * 0.28, reach)], color, 2)


_SETTINGS = {"": _plain, "Anger": _fire, "Fear": _graveyard, "Happy": _fair, "Sad": _rain}
_EXPRESSIONS = {
    "": _neutral_face,
    "Anger": _angry_face,
    "Fear": _fearful_face,
    "Happy": _happy_face,
    "Sad": _sad_face,
}
_OBJECTS = {"Anger": _torch, "Fear": _spider, "Happy": _balloon, "Sad": _broken_heart}
_DISTANT = {"Anger": _raging_man, "Fear": _ghost, "Happy": _dancer, "Sad": _mourner}
