"""What a trained model loses when its fusion (Eq. 8) is changed under it: whether it needs the
context queries, and which of them.

    python -m benchmarks.knockout runs/demo1 [runs/demo2 ...] [--split=test]

The weights stay as trained; only what the fusion of every layer adds to a subject query changes.
"context of another image" keeps the kind and size of what is added and takes away what it knows of
the image: a model that stays as good there reads nothing from it. Below the table, how like what is
added is to the query it is added to (cosine; the layer normalisation that follows removes what has
the query's own direction). The built-in scenes only, accuracy by what decided a person's emotion
(data/readers/scenes.py).
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cues import accuracies, require_scenes
from data.command import data_config
from data.config import SPLITS
from data.pipeline import Dataset, make_dataset
from dsct_jax.batch import Batch, Predictions
from dsct_jax.boxes import cxcywh_to_xyxy
from dsct_jax.cli import Parser, run_command, start_process
from dsct_jax.errors import UserError
from dsct_jax.evaluation.selection import select_queries
from dsct_jax.inference.load import Model, load
from dsct_jax.model import decoder

_fusion = decoder.subject_context_fusion
_BATCH_SIZE = 40


def _nothing(subject, *_, **__):
    return subject, {}


def _of_another_image(subject, context, *points, **options):
    return _fusion(subject, jnp.roll(context, 1, axis=0), *points, **options)


def _distance_alone(*tokens_and_points, config, **options):
    return _fusion(
        *tokens_and_points, config=dataclasses.replace(config, num_semantic_neighbors=0), **options
    )


def _relevance_alone(*tokens_and_points, config, **options):
    return _fusion(
        *tokens_and_points, config=dataclasses.replace(config, num_spatial_neighbors=0), **options
    )


def _with_likeness(subject, context, *points, **options):
    fused, seen = _fusion(subject, context, *points, **options)
    added = fused - subject
    lengths = jnp.linalg.norm(subject, axis=-1) * jnp.linalg.norm(added, axis=-1)
    return fused, seen | {"likeness": (subject * added).sum(-1) / lengths}


FUSIONS: Mapping[str, Callable] = {
    "as trained": _fusion,
    "selected by distance alone": _distance_alone,
    "selected by relevance alone": _relevance_alone,
    "context of another image": _of_another_image,
    "nothing added": _nothing,
}


def knocked_out_accuracies(model: Model, data: Dataset, fusion: Callable) -> dict[str, float]:
    """'all' and each cue -> share of its people whose most probable class is theirs, with `fusion`
    in the place of the model's own.
    """
    right: list[bool] = []
    cues: list[str] = []
    for batch, i, predictions, queries in _answers(model, data, fusion):
        decided = predictions.logits[-1, i, queries, :-1].argmax(-1)
        right += (decided == batch.targets.labels[i][batch.targets.valid[i]].argmax(-1)).tolist()
        cues += data.records[batch.image_ids[i]].cues
    return {"all": float(np.mean(right))} | accuracies(np.array(right), cues)


def likeness(model: Model, data: Dataset) -> list[float]:
    """For each layer that fuses, the mean cosine of the queries that answer for somebody with what
    the fusion adds to them.
    """
    found: list[list[np.ndarray]] = []
    for _, i, predictions, queries in _answers(model, data, _with_likeness, return_details=True):
        assert predictions.details is not None
        found.append(
            [
                layer["likeness"][i, queries]
                for layer in predictions.details["layers"]
                if "likeness" in layer
            ]
        )
    return [float(np.concatenate(layer).mean()) for layer in zip(*found, strict=True)]


def _answers(
    model: Model, data: Dataset, fusion: Callable, *, return_details: bool = False
) -> Iterator[tuple[Batch, int, Predictions, np.ndarray]]:
    """(batch, place of an image in it, the batch's predictions, the query that answers for each of
    the image's people) of every image.
    """
    with mock.patch.object(decoder, "subject_context_fusion", fusion):
        forward = jax.jit(
            lambda params, norm_stats, batch: model.functions.bind(params, norm_stats)(
                *model.functions.inputs(batch), return_details=return_details
            )
        )
        for batch in data.iterator():
            predictions = jax.device_get(forward(model.params, model.norm_stats, batch))
            for i in np.flatnonzero(batch.real):
                size = np.tile(batch.original_sizes[i][::-1], 2)
                boxes = predictions.boxes[-1, i], batch.targets.boxes[i][batch.targets.valid[i]]
                queries, _ = select_queries(*(cxcywh_to_xyxy(some) * size for some in boxes))
                yield batch, int(i), predictions, queries


def knock_out(workdir: Path, split: str) -> tuple[dict[str, dict[str, float]], list[float]]:
    """(fusion -> accuracies, likeness) of the newest checkpoint of a run.

    Raises:
        UserError: the run is no model of the scenes with one label a person, or has no context
            queries.
    """
    config = data_config(workdir / "config.json")
    require_scenes(config, workdir)
    model = load(workdir)
    if not model.functions.config.num_context_queries:
        raise UserError(
            f"{workdir}: has no context queries (config.model.num_context_queries is 0), so there "
            "is nothing to take away"
        )
    data = make_dataset(config, split, batch_size=_BATCH_SIZE, seed=0, training=False)
    return {
        name: knocked_out_accuracies(model, data, fusion) for name, fusion in FUSIONS.items()
    }, likeness(model, data)


def format_markdown(found: Mapping[str, Mapping[str, float]], title: str) -> str:
    """A table in percent, a line a fusion."""
    columns = list(next(iter(found.values())))
    lines = [[title, *columns], ["---"] * (len(columns) + 1)]
    lines += [
        [name, *(f"{100 * values[column]:.1f}" for column in columns)]
        for name, values in found.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(argv: Sequence[str] | None) -> None:
    """Runs the command."""
    parser = Parser(prog="python -m benchmarks.knockout", description=__doc__)
    parser.add_argument(
        "workdirs",
        nargs="+",
        type=Path,
        help="directories of runs on the built-in scenes, with context queries",
    )
    parser.add_argument("--split", choices=SPLITS, default="test")
    arguments = parser.parse_args(argv)
    for workdir in arguments.workdirs:
        found, cosines = knock_out(workdir, arguments.split)
        print(format_markdown(found, str(workdir)))
        print(
            "likeness of what is added, by layer: "
            f"{'  '.join(f'{cosine:.2f}' for cosine in cosines)}",
            end="\n\n",
            flush=True,
        )


if __name__ == "__main__":
    start_process()
    sys.exit(run_command(lambda: run(None)))
