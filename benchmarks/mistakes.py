"""The people of whom a model is most certain and wrong, drawn: label noise, or its own?

    python -m benchmarks.mistakes runs/demo [--split=test] [-n 20] --output=mistakes.png

Reads the predictions that `train.py --mode=eval` wrote; no model runs. Each person is answered by
the query that overlaps them most; one label per person only.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.command import data_config
from data.config import SPLITS
from data.readers.registry import read_split
from dsct_jax.cli import Parser, run_command
from dsct_jax.config import expanded_path
from dsct_jax.errors import UserError
from dsct_jax.evaluation.results import read_results
from dsct_jax.evaluation.selection import select_people
from dsct_jax.visualization.drawing import contact_sheet

_MARGIN = 0.25  # around a person, as a share of the box
_COLUMNS = 5


def certain_mistakes(workdir: Path, split: str, count: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures and captions of the `count` most certain wrong answers, the most certain first.
    Raises UserError where people can have several labels, or nothing was evaluated.
    """
    config = data_config(workdir / "config.json")
    if config.multi_label:
        raise UserError(f"{workdir}: a mistake needs one label per person (multi_label=False)")
    results = read_results(workdir / f"predictions_{split}.npz")
    names, (people, _) = config.class_names, select_people(results)
    records = {record.image_id: record for record in read_split(config, split)[0]}
    certainty = np.where(people.labels.any(-1) & ~people.hits, people.probabilities.max(-1), -1)
    pictures, captions = [], []
    for index in np.argsort(-certainty, kind="stable")[:count]:
        if certainty[index] < 0:
            break
        image = records[int(results.image_ids[people.image[index]])].load()
        x1, y1, x2, y2 = results.gt_boxes[index].tolist()
        dx, dy = _MARGIN * (x2 - x1), _MARGIN * (y2 - y1)
        pictures.append(image.crop(tuple(map(round, (x1 - dx, y1 - dy, x2 + dx, y2 + dy)))))
        said = names[int(people.probabilities[index].argmax())]
        annotated = names[int(people.labels[index].argmax())]
        captions.append(f"{said} {certainty[index]:.2f}, annotated {annotated}")
    return pictures, captions


def run(argv: Sequence[str] | None) -> None:
    """The command."""
    parser = Parser(description=__doc__)
    parser.add_argument("workdir", type=expanded_path, metavar="RUN")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("-n", "--count", type=int, default=20)
    parser.add_output("--output", folder=False, required=True, help="picture to write")
    arguments = parser.parse_args(argv)
    pictures, captions = certain_mistakes(arguments.workdir, arguments.split, arguments.count)
    contact_sheet(pictures, _COLUMNS, captions=captions, tile=300).save(arguments.output)
    print("\n".join(captions))
    print(f"written: {arguments.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
