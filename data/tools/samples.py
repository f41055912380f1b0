"""The first images of a split as files, with their people in one COCO-style file: something to
predict on, to draw, or to look at.

    python -m data samples --config=configs/demo.py --split=test -n 12 --output=samples

Writes OUTPUT/<split>_00000.png ... and OUTPUT/truth.json (`--ground-truth` of python -m dsct_jax
visualize). The built-in scenes have no files otherwise.
"""

import argparse
import json

from data.command import ConfigParser
from data.config import SPLITS
from data.readers.coco import to_coco
from data.readers.registry import read_split
from dsct_jax.errors import UserError


def make_parser() -> ConfigParser:
    """The command line."""
    parser = ConfigParser(__doc__)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("-n", "--count", type=int, default=12, help="number of images")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, from 0")
    parser.add_output(
        "--output", folder=True, required=True, help="folder for the images and truth.json"
    )
    return parser


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
    (output / "truth.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{count} images and their people: {output}")
