"""What a network is shown: raw images with their people beside what the augmentation makes of them,
on one sheet.

python -m data show --config=configs/demo.py --split=train -n 24 --output=samples.png
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image

from data.augment import Transform, apply
from data.batch_plan import FILLER, BatchPlan
from data.command import config_parser, parse
from data.config import SPLITS, DataConfig
from data.readers.records import Record
from data.readers.registry import read_split
from dsct_jax.cli import run_command
from dsct_jax.errors import UserError
from dsct_jax.postprocess import Subject
from dsct_jax.visualization.drawing import contact_sheet, draw_subjects

_PAIRS = 3  # raw and transformed, a row of the sheet


def sample_sheet(config: DataConfig, split: str, *, count: int, seed: int) -> Image.Image:
    """The first `count` images that a training with `seed` is shown (or an evaluation, for val and
    test), each raw and as it goes into a batch.

    Raises:
        UserError: the data cannot be used; the line names the file.
    """
    records, _ = read_split(config, split)
    sizes = [(record.height, record.width) for record in records]
    plan = BatchPlan(
        config, sizes, batch_size=min(count, len(records)), seed=seed, training=split == "train"
    )
    tiles: list[Image.Image] = []
    captions: list[str] = []
    for index, transform in _shown(plan, count):
        record = records[index]
        image = record.load()
        changed, boxes, kept = apply(transform, image, record.boxes)
        tiles += [
            _draw(image, record.boxes, record, config),
            _draw(changed, boxes, record, config, kept),
        ]
        captions += [f"{_end(record.name)}  {image.width}x{image.height}", describe(transform)]
    kind = "augmented" if split == "train" else "as evaluated"
    legend = f"{split}: {len(records)} images. In each pair: as it is (left), {kind} (right)"
    return contact_sheet(tiles, 2 * _PAIRS, captions=captions, tile=360, legend=legend)


def _shown(plan: BatchPlan, count: int) -> list[tuple[int, Transform]]:
    """The first images of the stream and what is done to them."""
    shown: list[tuple[int, Transform]] = []
    for step in range(plan.steps_per_epoch):
        batch = plan[step]
        shown += [
            (index, how)
            for index, how in zip(batch.indices, batch.transforms, strict=True)
            if index != FILLER
        ]
        if len(shown) >= count:
            break
    return shown[:count]


def describe(transform: Transform) -> str:
    """A transform in a few words, sizes as width x height."""
    height, width = transform.size
    words = [f"{width}x{height}"] + ["flipped"] * transform.flip
    if transform.crop is not None:
        words.append(f"crop {transform.crop[3]}x{transform.crop[2]}")
    if transform.saturation == 0:
        words.append("grey")
    elif {transform.brightness, transform.contrast, transform.saturation} != {1.0}:
        words.append("colours")
    return ", ".join(words)


def _end(name: str, length: int = 24) -> str:
    return name if len(name) <= length else "..." + name[-length:]


def _draw(
    image: Image.Image,
    boxes: Float32[np.ndarray, "t 4"],
    record: Record,
    config: DataConfig,
    kept: np.ndarray | None = None,
) -> Image.Image:
    labels = record.labels if kept is None else record.labels[kept]
    people = [
        Subject(
            tuple(box),
            {},
            tuple(name for name, present in zip(config.class_names, row, strict=True) if present),
            1.0,
        )
        for box, row in zip(boxes.tolist(), labels, strict=True)
    ]
    return draw_subjects(image, people)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = config_parser("python -m data show", __doc__)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument(
        "-n", "--count", type=int, default=24, help="images on the sheet (default 24)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="config.seed of the training that is looked at (default 0)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("samples.png"), help="the picture (default samples.png)"
    )

    def run() -> None:
        config, arguments = parse(parser, argv)
        if arguments.count < 1:
            raise UserError(f"--count={arguments.count} cannot be used: must be at least 1")
        sheet = sample_sheet(config, arguments.split, count=arguments.count, seed=arguments.seed)
        try:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(arguments.output)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{arguments.output}: cannot be written ({error}); --output must be a picture "
                "such as samples.png"
            ) from None
        print(f"{arguments.output}")

    return run_command(run)
