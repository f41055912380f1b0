"""How far training in bfloat16 strays from float32: the loss of the same batches, beside a float32
run whose start differs in the last bit.

    python -m benchmarks.precision --config=configs/faces_single.py \
        --config.data.data_dir=DIR --output=benchmarks/precision_cpu

Each seed (of the weights and of the data) trains three times on the same batches with the
configuration's own recipe: in float32, in float32 from parameters that are moved to the next
number, and with model.compute_dtype=bfloat16. Training amplifies any difference; the second run
tells by how much, and what bfloat16 may be blamed for is what it strays beyond that. Losses are
means of ten steps.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.tables import add_output, device_line, report, table
from data.command import override
from data.pipeline import make_dataset
from dsct_jax.cli import Parser, run_command, start_process
from dsct_jax.config import read_config
from dsct_jax.errors import UserError
from dsct_jax.model.build import Network
from dsct_jax.parallel import make_mesh, shard_batch
from dsct_jax.training.objective import SetPrediction
from dsct_jax.training.step import initial_state, make_train_step
from train import RunConfig

WINDOW = 10  # steps that a loss is the mean of
VARIANTS = {
    "float32, next number": ("float32", True),
    "bfloat16": ("bfloat16", False),
}  # each against float32 as it is


def trainer(config: Mapping[str, Any], dtype: str, steps: int) -> Callable[..., np.ndarray]:
    """What trains on one device in `dtype`: (seed, nudged=) -> the total loss of every step,
    nudged: from parameters one number further on.
    """
    run = RunConfig.from_mapping({**config, "model": {**config["model"], "compute_dtype": dtype}})
    functions, mesh = Network(run.model), make_mesh(jax.devices()[:1])
    made: dict[str, Any] = {}

    def train(seed: int, *, nudged: bool = False) -> np.ndarray:
        data = make_dataset(
            run.data, "train", batch_size=run.train.batch_size, seed=seed, training=True
        )
        params, norm_stats = functions.init(seed)
        if nudged:
            params = {
                path: np.nextafter(np.asarray(value), np.float32(np.inf))
                for path, value in params.items()
            }
        total_steps = run.train.steps or round(run.train.epochs * data.steps_per_epoch)
        optimizer, state = initial_state(
            params, norm_stats, run.optimizer, total_steps=total_steps, mesh=mesh
        )
        options: dict[str, Any] = {
            "objective": SetPrediction(run.loss, run.matcher, multi_label=run.multi_label),
            "mesh": mesh,
            "seed": run.seed,
        }
        step = made.setdefault(
            "step", make_train_step(functions, optimizer, **options)
        )  # compiled once
        losses = []
        for batch in data.iterator(0, steps):
            state, terms = step(state, shard_batch(batch, mesh))
            losses.append(terms["total"])
        return np.array(jax.device_get(losses), np.float64)

    return train


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Means of WINDOW steps."""
    return losses.reshape(-1, WINDOW).mean(1)


def measure(config: Mapping[str, Any], *, steps: int, seeds: int) -> dict[str, Any]:
    """Smoothed losses of float32 [seed window], and how far each variant is off, relative, of the
    same shape; seconds a step of both types.
    """
    trainers = {dtype: trainer(config, dtype, steps) for dtype in ("float32", "bfloat16")}
    exact, off, seconds = [], {name: [] for name in VARIANTS}, {}  # type: ignore[var-annotated]
    for seed in range(seeds):
        exact.append(smoothed(trainers["float32"](seed)))
        for name, (dtype, nudged) in VARIANTS.items():
            start = time.perf_counter()
            off[name].append(smoothed(trainers[dtype](seed, nudged=nudged)) / exact[-1] - 1)
            seconds[dtype] = (
                time.perf_counter() - start
            ) / steps  # the last seed has nothing to compile
            print(
                f"seed {seed}: {name} off by at most {np.abs(off[name][-1]).max():.2%}",
                file=sys.stderr,
                flush=True,
            )
    return {
        "float32": np.array(exact),
        "off": {name: np.array(values) for name, values in off.items()},
        "seconds": seconds,
    }


def as_markdown(found: Mapping[str, Any], about: str) -> str:
    """A row for each window of steps: mean and largest deviation over the seeds; then the band that
    all of them keep to.
    """

    def cells(offs: list[np.ndarray]) -> list[str]:
        return [text for off in offs for text in (f"{off.mean():+.2%}", f"{np.abs(off).max():.2%}")]

    offs = list(found["off"].values())
    rows = [
        (
            f"{window * WINDOW + 1}-{(window + 1) * WINDOW}",
            f"{loss:.3f}",
            *cells([off[:, window] for off in offs]),
        )
        for window, loss in enumerate(found["float32"].mean(0))
    ]
    rows.append(("all", f"{found['float32'].mean():.3f}", *cells(offs)))
    columns = [text for name in VARIANTS for text in (f"{name}: mean", "largest")]
    times = ", ".join(f"{dtype} {value:.2f}" for dtype, value in found["seconds"].items())
    text = table(("steps", "float32", *columns), rows)
    return f"{about}\n\n{text}\n\nSeconds per step: {times}"


def run(argv: list[str] | None) -> None:
    """Runs the command."""
    parser = Parser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100, help=f"a multiple of {WINDOW}")
    parser.add_argument("--seeds", type=int, default=3)
    add_output(parser)
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.steps < WINDOW or arguments.steps % WINDOW or arguments.seeds < 1:
        raise UserError(
            f"--steps={arguments.steps} --seeds={arguments.seeds} cannot be used: a multiple of "
            f"{WINDOW}, and at least 1"
        )
    config = override(read_config(arguments.config), overrides)
    found = measure(config, steps=arguments.steps, seeds=arguments.seeds)
    device = device_line()
    what = f"{config['name']}, batches of {config['train']['batch_size']}, {arguments.seeds} seeds"
    text = as_markdown(found, f"Deviation of the loss from float32, {what} ({device})")
    numbers = {
        "about": device,
        "float32": found["float32"].tolist(),
        "off": {name: off.tolist() for name, off in found["off"].items()},
        "seconds": found["seconds"],
    }
    report(text, numbers, arguments.output, indent=None)


if __name__ == "__main__":
    start_process()
    sys.exit(run_command(lambda: run(None)))
