"""Accuracy on the built-in scenes by what decided a person's emotion: the face, something near,
something far (data/readers/scenes.py).

    python -m benchmarks.cues runs/demo [--split=test]

Reads the predictions that `train.py --mode=eval` wrote; no model runs.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from data.command import data_config
from data.config import SPLITS, DataConfig
from data.readers.registry import read_split
from data.readers.scenes import CUE_SHARES, CUES
from dsct_jax.cli import Parser, run_command
from dsct_jax.errors import UserError
from dsct_jax.evaluation.results import read_results
from dsct_jax.evaluation.selection import select_all
from dsct_jax.postprocess import class_probabilities


def accuracy_by_cue(workdir: Path, split: str) -> dict[str, float]:
    """Cue -> share of its people whose most probable class is theirs, each answered by the query
    that overlaps them most.

    Raises:
        UserError: the run has no predictions of the split, or its data are not the scenes with one
            label a person.
    """
    config = data_config(workdir / "config.json")
    require_scenes(config, workdir)
    results = read_results(workdir / f"predictions_{split}.npz")
    records, _ = read_split(config, split)
    people = {record.image_id: record.cues for record in records}
    cues = [cue for image in results.image_ids for cue in people[int(image)]]
    queries, _ = select_all(results, nms_threshold=None)
    probabilities = class_probabilities(
        results.logits[results.image_of_person, queries], multi_label=False
    )
    right = probabilities.argmax(-1) == results.gt_labels.argmax(-1)
    return accuracies(right, cues)


def require_scenes(config: DataConfig, workdir: Path) -> None:
    """Raises UserError where the data of a run are not the scenes with one label a person."""
    if config.source != "scenes" or config.multi_label:
        raise UserError(
            f"{workdir}: cues are known for config.data.source='scenes' with "
            "config.multi_label=False only"
        )


def accuracies(right: Bool[np.ndarray, " m"], cues: Sequence[str]) -> dict[str, float]:
    """Cue -> share of its people that are right; `cues` has one for each person."""
    return {cue: float(np.mean(right[np.array(cues) == cue])) for cue in CUES}


def format_cues(accuracies: Mapping[str, float]) -> str:
    """As text: a line for each cue with its share of the people that scenes draw."""
    return "\n".join(
        f"{cue:<12}{accuracies[cue]:>8.1%}   ({share:.0%} of the people)"
        for cue, share in zip(CUES, CUE_SHARES, strict=True)
    )


def run(argv: Sequence[str] | None) -> None:
    """Runs the command."""
    parser = Parser(prog="python -m benchmarks.cues", description=__doc__)
    parser.add_argument("workdir", type=Path, help="directory of a run that was evaluated")
    parser.add_argument("--split", choices=SPLITS, default="test")
    arguments: Any = parser.parse_args(argv)
    print(format_cues(accuracy_by_cue(arguments.workdir, arguments.split)))


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(None)))
