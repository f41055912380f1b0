"""What a network is shown: raw images with their people beside what the augmentation makes of them,
on one sheet."""

import argparse
import itertools

import numpy as np
from jaxtyping import Float32
from PIL import Image

from data.augment import Transform, apply
from data.batch_plan import FILLER, BatchPlan
from data.command import require_at_least
from data.config import DataConfig
from data.readers.records import Boxes
from data.readers.registry import read_split
from dsct_jax.errors import UserError
from dsct_jax.postprocess import Subject
from dsct_jax.visualization.drawing import contact_sheet, draw_subjects

_PAIRS = 3  # raw and transformed, per row of the sheet


def sample_sheet(config: DataConfig, split: str, *, count: int, seed: int) -> Image.Image:
    """The first `count` images that a training with `seed` is shown (or an evaluation, for val and
    test), each raw and as it goes into a batch. Raises UserError naming the file.
    """
    records, _ = read_split(config, split)
    sizes = [(record.height, record.width) for record in records]
    batch_size, training = min(count, len(records)), split == "train"
    plan = BatchPlan(config, sizes, batch_size=batch_size, seed=seed, training=training)
    shown = (
        (index, transform)
        for step in range(plan.steps_per_epoch)
        for index, transform in zip(plan[step].indices, plan[step].transforms, strict=True)
        if index != FILLER
    )
    tiles: list[Image.Image] = []
    captions: list[str] = []
    for index, transform in itertools.islice(shown, count):
        record = records[index]
        image = record.load()
        changed, boxes, kept = apply(transform, image, record.boxes)
        raw = _draw(image, record.boxes, record.labels, config)
        tiles += [raw, _draw(changed, boxes, record.labels[kept], config)]
        captions += [f"{_end(record.name)}  {image.width}x{image.height}", describe(transform)]
    kind = "augmented" if training else "as evaluated"
    legend = f"{split}: {len(records)} images. In each pair: as it is (left), {kind} (right)"
    return contact_sheet(tiles, 2 * _PAIRS, captions=captions, tile=360, legend=legend)


def describe(transform: Transform) -> str:
    """A transform in a few words, sizes as width x height."""
    height, width = transform.size
    words = [f"{width}x{height}"] + ["flipped"] * transform.flip
    if transform.crop is not None:
        words.append(f"crop {transform.crop[3]}x{transform.crop[2]}")
    if transform.saturation == 0:
        words.append("gray")
    elif {transform.brightness, transform.contrast, transform.saturation} != {1.0}:
        words.append("colors")
    return ", ".join(words)


def _end(name: str, length: int = 24) -> str:
    return name if len(name) <= length else "..." + name[-length:]


def _draw(
    image: Image.Image, boxes: Boxes, labels: Float32[np.ndarray, "t k"], config: DataConfig
) -> Image.Image:
    names = [tuple(itertools.compress(config.class_names, row)) for row in labels]
    people = zip(boxes.tolist(), names, strict=True)
    return draw_subjects(image, [Subject(tuple(box), {}, name, 1.0) for box, name in people])


def run(arguments: argparse.Namespace) -> None:
    """Draws the sheet."""
    require_at_least(arguments, 1, "count")
    output, split, seed = arguments.output, arguments.split, arguments.seed
    sheet = sample_sheet(arguments.data, split, count=arguments.count, seed=seed)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{output}: cannot be written ({error}); --output must be a picture such as samples.png"
        ) from None
    print(output)
