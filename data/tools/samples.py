"""The first images of a split as files, with their people in one COCO-style file: something to
predict on, to draw, or to look at."""

import argparse
import json

from data.readers.coco import to_coco
from data.readers.registry import read_split
from dsct_jax.errors import UserError


def run(arguments: argparse.Namespace) -> None:
    """Writes the images and their people. Raises UserError where the split has fewer images."""
    records, report = read_split(arguments.data, arguments.split)
    first, count, output = arguments.first, arguments.count, arguments.output
    if count < 1 or first < 0 or first + count > len(records):
        raise UserError(
            f"-n {count} --first={first}: {report.source} has {len(records)} images, counted from 0"
        )
    chosen = records[first : first + count]
    names = [f"{arguments.split}_{record.image_id:05d}.png" for record in chosen]
    output.mkdir(parents=True, exist_ok=True)
    for record, name in zip(chosen, names, strict=True):
        record.load().save(output / name)
    document = to_coco(chosen, names, arguments.data)
    (output / "truth.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{count} images and their people: {output}")
