"""Drawings for people to look at: boxes and emotions on an image, and many pictures on one sheet.

Colors are Okabe and Ito's, which color-blind readers can tell apart; sizes are such that a picture
can still be read at half its size.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dsct_jax.boxes import to_pixels
from dsct_jax.evaluation.results import Shown
from dsct_jax.postprocess import Decoder, Subject

# Okabe-Ito without black: the palette of all drawings and figures
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
ORANGE, SKY, GREEN, YELLOW, PINK, VERMILION, BLUE = PALETTE
TRUTH_COLOR = "#FFFFFF"

_MIN_SHORT_SIDE = 480  # smaller images are enlarged before drawing ...
_MAX_PIXELS = 16e6  # ... but not beyond this many pixels: a scan may be 3 pixels high
_MAX_LABELS = 3  # lines of text per person
_Rectangle = tuple[float, float, float, float]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow is built with FreeType
    return font


def label_lines(subject: Subject) -> list[str]:
    """The emotions with their probabilities; in brackets the likeliest where none is a label; the
    number of a person in a video before them.
    """
    number, scores = getattr(subject, "person", None), subject.probabilities
    first = [] if number is None else [f"person {number}"]
    if not subject.labels:
        likeliest = max(scores, key=lambda name: scores[name], default=None)
        return first if likeliest is None else [*first, f"({likeliest} {scores[likeliest]:.2f})"]
    shown, more = subject.labels[:_MAX_LABELS], len(subject.labels) - _MAX_LABELS
    lines = [f"{name} {scores[name]:.2f}" if name in scores else name for name in shown]
    return [*first, *lines, *([f"+ {more} more"] if more > 0 else [])]


def draw_subjects(
    image: Image.Image,
    subjects: Sequence[Subject],
    *,
    ground_truth: Sequence[Subject] = (),
) -> Image.Image:
    """A copy of `image`, enlarged a whole number of times where it is small, with a box and the
    emotions of every subject, and dashed white boxes for the annotated people.
    """
    wanted = -(-_MIN_SHORT_SIDE // min(image.size))
    factor = max(1, min(wanted, int((_MAX_PIXELS / math.prod(image.size)) ** 0.5)))
    canvas = ImageOps.scale(image.convert("RGB"), factor, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    unit = min(canvas.size) / _MIN_SHORT_SIDE
    width, font = max(2, round(4 * unit)), _font(max(8, round(22 * unit)))
    placed: list[_Rectangle] = []
    places = [getattr(one, "person", None) or i for i, one in enumerate(subjects)]
    colors = [PALETTE[place % len(PALETTE)] for place in places]
    truth = [(_scaled(person.box, factor), person) for person in ground_truth]
    people = [(_scaled(subject.box, factor), subject) for subject in subjects]
    for box, _ in truth:
        _dashed_rectangle(draw, box, width)
    for (box, _), color in zip(people, colors, strict=True):
        draw.rectangle(box, outline="black", width=width + 2)
        draw.rectangle(_inner(box), outline=color, width=width)
    for (box, subject), color in zip(people, colors, strict=True):
        _write(draw, label_lines(subject), box, canvas.size, font, color, placed)
    for box, person in truth:
        lines = [f"truth: {name}" for name in person.labels[:_MAX_LABELS]]
        _write(draw, lines, box, canvas.size, font, TRUTH_COLOR, placed, below_first=True)
    return canvas


def sort_left_to_right(people: Sequence[Subject]) -> list[Subject]:
    """So that a person keeps their color from one drawing or frame of a video to the next."""
    return sorted(people, key=lambda person: person.box[0])


def _scaled(box: _Rectangle, factor: int) -> _Rectangle:
    x1, y1, x2, y2 = (float(side * factor) for side in box)
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)  # PIL's rectangles include their last pixel


def _inner(box: _Rectangle) -> _Rectangle:
    """One pixel smaller on every side, where there is room."""
    x1, y1, x2, y2 = box
    return (x1 + 1, y1 + 1, x2 - 1, y2 - 1) if min(x2 - x1, y2 - y1) > 2 else box


def _dashed_rectangle(draw: ImageDraw.ImageDraw, box: _Rectangle, width: int) -> None:
    x1, y1, x2, y2 = box
    step = 4 * width
    solid = [*((x1, y, x2, y) for y in (y1, y2)), *((x, y1, x, y2) for x in (x1, x2))]
    dashes = [
        *((x, y, min(x + step, x2), y) for y in (y1, y2) for x in np.arange(x1, x2, 2 * step)),
        *((x, y, x, min(y + step, y2)) for x in (x1, x2) for y in np.arange(y1, y2, 2 * step)),
    ]
    for lines, color in ((solid, "black"), (dashes, TRUTH_COLOR)):
        for line in lines:
            draw.line(line, fill=color, width=width)


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    box: _Rectangle,
    canvas: tuple[int, int],
    font: ImageFont.FreeTypeFont,
    color: str,
    placed: list[_Rectangle],
    *,
    below_first: bool = False,
) -> None:
    """Writes on a panel of `color` at the box, where it covers least of those already placed."""
    if not lines:
        return
    padding, spacing = font.size / 5, round(font.size * 1.2)
    width = max(font.getlength(line) for line in lines) + 2 * padding
    height = spacing * len(lines) + padding
    x1, y1, x2, y2 = box
    room = max(0.0, canvas[0] - width), max(0.0, canvas[1] - height)
    left = min(max(0.0, x1), room[0])
    outside = [(left, y1 - height), (left, y2 + 1)]
    corners = [*(outside[::-1] if below_first else outside)]
    corners += [(left, y1), (left, y2 - height), (x2 + 1, y1), (x1 - width, y1)]
    fitting = [(x, y) for x, y in corners if 0 <= x <= room[0] and 0 <= y <= room[1]]
    fitting = fitting or [(left, min(max(0.0, y1), room[1]))]
    panels = [(x, y, x + width, y + height) for x, y in fitting]
    panel = min(panels, key=lambda one: sum(_overlap(one, other) for other in placed))
    placed.append(panel)
    draw.rectangle(panel, fill=color, outline="black")
    ink = "white" if color in (BLUE, VERMILION, GREEN) else "black"
    for i, line in enumerate(lines):
        place = (panel[0] + padding, panel[1] + padding / 2 + i * spacing)
        draw.text(place, line, fill=ink, font=font)


def _overlap(a: _Rectangle, b: _Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def contact_sheet(
    images: Sequence[Image.Image],
    columns: int,
    *,
    captions: Sequence[str] | None = None,
    tile: int = 480,
    legend: str | None = None,
) -> Image.Image:
    """All images on one white sheet, `columns` per row, each scaled to fit a `tile` x `tile`
    square, with a caption (one per image) below and a legend on top.
    """
    if columns < 1 or (captions is not None and len(captions) != len(images)):
        raise ValueError(f"{len(images)} images, {len(captions or ())} captions, {columns} columns")
    if not images:
        legend, columns = "no images to show", 1
    columns, margin, font = min(columns, len(images) or 1), tile // 40, _font(tile // 22)
    line = round(font.size * 1.5)
    fitted = [image.resize(_fit(image.size, tile), Image.Resampling.LANCZOS) for image in images]
    rows = [fitted[start : start + columns] for start in range(0, len(fitted), columns)]
    heights = [max(image.height for image in row) + (line if captions else 0) for row in rows]
    top = (line + margin) if legend else margin
    size = (margin + columns * (tile + margin), top + sum(heights) + margin * (len(rows) or 1))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    if legend:
        draw.text((margin, margin), legend, fill="black", font=font)
    texts = iter(captions or ())
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            x = margin + column * (tile + margin)
            sheet.paste(image, (x + (tile - image.width) // 2, top))
            if captions:
                draw.text((x, top + image.height), next(texts), fill="black", font=font)
        top += height + margin
    return sheet


def _fit(size: tuple[int, int], tile: int) -> tuple[int, int]:
    """As ImageOps.contain, but at least one pixel wide: a scan may be a thousand times as long."""
    scale = tile / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def draw_batch(
    batch: Any, logits: np.ndarray, boxes: np.ndarray, decoder: Decoder
) -> list[Image.Image]:
    """Every real image of a batch of host arrays, without its padding, with the annotated people
    and those that `decoder` finds. `logits` [b q k+1], `boxes` [b q 4]: of the last layer.
    """
    pictures, targets, names = [], batch.targets, decoder.class_names
    for i in np.flatnonzero(np.asarray(batch.real)):
        height, width = (int(side) for side in batch.sizes[i])
        size = (height, width)
        valid = np.asarray(targets.valid[i])
        places = to_pixels(np.asarray(targets.boxes[i])[valid], size)
        labels = np.asarray(targets.labels[i])[valid]
        truth = [
            Subject(tuple(box.tolist()), {}, tuple(itertools.compress(names, row)), 1.0)
            for box, row in zip(places, labels, strict=True)
        ]
        image = Image.fromarray(np.asarray(batch.images[i])[:height, :width])
        people = decoder(logits[i], boxes[i], size)
        pictures.append(draw_subjects(image, people, ground_truth=truth))
    return pictures


def draw_shown(shown: Sequence[Shown], decoder: Decoder) -> list[Image.Image]:
    """Drawings of the images that `collect_results` kept, with the people that `decoder` finds."""
    return [picture for batch in shown for picture in draw_batch(*batch, decoder)]
