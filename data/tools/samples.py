"""The first images of a split as files, with their people in one COCO-style file: something to
predict on, to draw, or to look at.

    python -m data samples --config=configs/demo.py --split=test -n 12 --output=samples

Writes OUTPUT/<split>_00000.png ... and OUTPUT/truth.json (`--ground-truth` of
dsct_jax.commands.visualize). The built-in scenes have no files otherwise.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.command import config_parser, parse
from data.config import SPLITS, DataConfig
from data.readers.registry import read_split
from dsct_jax.errors import UserError


def write_samples(
    config: DataConfig, split: str, output: Path, *, first: int, count: int
) -> list[Path]:
    """Writes images number `first` to `first + count - 1` of the split; returns their files.

    Raises:
        UserError: the split has fewer images, or its data cannot be used.
    """
    records, report = read_split(config, split)
    if count < 1 or first < 0 or first + count > len(records):
        raise UserError(
            f"-n {count} --first={first}: {report.source} has {len(records)} images, counted from 0"
        )
    output.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    images: list[dict[str, Any]] = []
    people: list[dict[str, Any]] = []
    for record in records[first : first + count]:
        file = output / f"{split}_{record.image_id:05d}.png"
        record.load().save(file)
        files.append(file)
        images.append(
            {
                "id": record.image_id,
                "file_name": file.name,
                "width": record.width,
                "height": record.height,
            }
        )
        for box, labels in zip(record.boxes, record.labels, strict=True):
            x1, y1, x2, y2 = (round(float(side), 2) for side in box)
            ids = np.flatnonzero(labels).tolist()
            people.append(
                {
                    "id": len(people),
                    "image_id": record.image_id,
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "category_id": ids,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(config.class_names)]
    content = {"images": images, "annotations": people, "categories": categories}
    (output / "truth.json").write_text(json.dumps(content, indent=1) + "\n")
    return files


def run(argv: Sequence[str] | None) -> None:
    """Runs the command."""
    parser = config_parser("python -m data samples", __doc__)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("-n", "--count", type=int, default=12, help="number of images")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, from 0")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the images and truth.json"
    )
    config, arguments = parse(parser, argv)
    files = write_samples(
        config, arguments.split, arguments.output, first=arguments.first, count=arguments.count
    )
    print(f"{len(files)} images and their people: {arguments.output}")
