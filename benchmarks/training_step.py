"""Seconds of a training step by devices, image size, batch, type and matcher, and by part:
backbone, encoder, decoder, matcher, optimizer.

R50, 480x640, batch 1; what spreading over devices costs; everything on a GPU:

    python -m benchmarks.training_step --output=benchmarks/training_step_cpu
    python -m benchmarks.training_step --config=configs/demo.py --sizes 96x136 --batches 16 \
        --devices 1 2 8 --output=benchmarks/training_step_devices_cpu
    python -m benchmarks.training_step --sizes 800x1066 640x853 --batches 1 2 4 8 16 32 \
        --dtypes float32 bfloat16 --matchers scipy device --output=benchmarks/training_step_gpu

Random weights and images, dropout as configured. Backbone, encoder, matcher and optimizer are timed
alone, the first two forward and backward; "decoder" is what remains of the step: decoder, heads,
losses, and the communication of gradients.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from benchmarks.tables import device_line, make_parser, report, row, table
from dsct_jax.batch import Batch, Targets
from dsct_jax.config import dataclass_from_dict, read_config
from dsct_jax.inference.load import model_config
from dsct_jax.model.build import FlatParams, Network
from dsct_jax.model.layers import REMAT, DropoutNoise
from dsct_jax.parallel import BATCH, make_mesh, shard_batch
from dsct_jax.training.config import MATCHERS, LossConfig, MatcherConfig, OptimizerConfig
from dsct_jax.training.halves import run_on_host
from dsct_jax.training.matching import assign_on_device
from dsct_jax.training.objective import MatchingProblem, SetPrediction, match_on_host
from dsct_jax.training.step import (
    TrainState,
    TrainStep,
    initial_state,
    make_train_step,
)

PARTS = ("backbone", "encoder", "decoder", "matcher", "optimizer")


def make_batch(b: int, height: int, width: int, max_targets: int, num_classes: int) -> Batch:
    """Random images that fill their canvas, two people each."""
    rng = np.random.default_rng(0)
    sizes = np.tile(np.array([[height, width]], np.int32), (b, 1))
    labels = np.eye(num_classes, dtype=np.float32)[rng.integers(0, num_classes, (b, max_targets))]
    boxes = rng.uniform(0.3, 0.5, (b, max_targets, 4)).astype(np.float32)
    targets = Targets(boxes, labels, np.tile(np.arange(max_targets)[None] < 2, (b, 1)))
    images = rng.integers(0, 256, (b, height, width, 3), dtype=np.uint8)
    return Batch(images, sizes, targets, np.arange(b, dtype=np.int32), sizes, np.ones(b, bool))


def seconds(run: Callable[[], Any], runs: int) -> float:
    """Median of `runs` calls after two that are not counted."""
    found = []
    for i in range(runs + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        if i >= 2:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def build(
    config: dict[str, Any], *, devices: int, size: tuple[int, int], batch_size: int, matcher: str
) -> tuple[TrainStep, TrainState, Batch]:
    """(step, state, batch) of a configuration, spread over so many devices."""
    functions, mesh = Network(model_config(config)), make_mesh(jax.devices()[:devices])
    optimizer_config = dataclass_from_dict(OptimizerConfig, "optimizer", config["optimizer"])
    optimizer, state = initial_state(
        *functions.init(0), optimizer_config, total_steps=1000, mesh=mesh
    )
    objective = SetPrediction(
        dataclass_from_dict(LossConfig, "loss", config["loss"]),
        MatcherConfig(implementation=matcher),
        multi_label=config["multi_label"],
    )
    step = make_train_step(functions, optimizer, objective=objective, mesh=mesh, seed=0)
    host_batch = make_batch(
        batch_size, *size, config["data"]["max_targets"], len(config["class_names"])
    )
    return step, state, shard_batch(host_batch, mesh)


def measure(
    config: dict[str, Any],
    *,
    devices: int,
    size: tuple[int, int],
    batch_size: int,
    matcher: str,
    runs: int,
    parts: bool,
) -> dict[str, float]:
    """Seconds of the whole step and, on one device, of its parts."""
    step, state, batch = build(
        config, devices=devices, size=size, batch_size=batch_size, matcher=matcher
    )

    def run():
        nonlocal state
        state, terms = step(state, batch)
        return state, terms

    found = {"step": seconds(run, runs)}
    if parts and devices == 1:
        found |= measure_parts(state, step, batch, runs)
        found["decoder"] = found["step"] - sum(found[part] for part in PARTS if part != "decoder")
    return found


def measure_parts(state: TrainState, step: TrainStep, batch: Batch, runs: int) -> dict[str, float]:
    """Seconds of each part but the decoder, alone; the encoder is what it adds to the backbone."""
    functions, optimizer = step.functions, step.optimizer

    def model_of(params: FlatParams, batch: Batch):
        network = functions.bind(params | state.frozen_params, state.norm_stats)
        return network, *functions.inputs(batch)

    def backbone(params: FlatParams, batch: Batch):
        model, images, _ = model_of(params, batch)
        return sum(level.astype(jnp.float32).sum() for level in model.features(images))

    def encoder(params: FlatParams, batch: Batch):
        model, images, mask = model_of(params, batch)
        noise = DropoutNoise(jax.random.split(jax.random.key(0), mask.shape[0]))
        return (
            model.encode(model.features(images), mask, noise=noise).tokens.astype(jnp.float32).sum()
        )

    update = jax.jit(lambda params, opt_state: optimizer.update(params, opt_state, params))
    up_to = {}
    for name, f in (("backbone", backbone), ("encoder", encoder)):
        gradient = jax.jit(jax.grad(f))
        up_to[name] = seconds(partial(gradient, state.params, batch), runs)
    shape = jax.eval_shape(step.first_half, state, batch, None).predictions.logits.shape[:-1]
    cost = jax.random.normal(jax.random.key(0), (*shape, batch.targets.valid.shape[-1]))
    problem = MatchingProblem([cost], batch.targets.valid[None], repeats=(1,))
    problem = jax.device_put(problem, NamedSharding(step.mesh, BATCH))
    on_device = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf[0], x).solve(assign_on_device))
    assign = partial(run_on_host, match_on_host) if step.objective.host_half else on_device
    return {
        "backbone": up_to["backbone"],
        "encoder": up_to["encoder"] - up_to["backbone"],
        "matcher": seconds(lambda: assign(jax.tree.map(jnp.copy, problem)), runs),
        "optimizer": seconds(lambda: update(state.params, state.opt_state), runs),
    }


def main() -> None:
    """Measures every combination, prints the table, and writes it with the numbers."""
    parser = make_parser("benchmarks.training_step", __doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/emotic_r50.py"))
    parser.add_argument(
        "--sizes", nargs="+", default=["480x640"], help="HEIGHTxWIDTH of the padded images"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="global")
    parser.add_argument("--devices", nargs="+", type=int, default=[1])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--remat", nargs="+", choices=REMAT, default=["light"])
    parser.add_argument("--matchers", nargs="+", choices=MATCHERS, default=["scipy"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--parts", action="store_true", help="time the parts too, on one device")
    args = parser.parse_args()
    title = f"Training step of {args.config}, median of {args.runs} ({device_line()})"
    rows, results = [], []
    for devices, size, batch, dtype, remat, matcher in itertools.product(
        args.devices, args.sizes, args.batches, args.dtypes, args.remat, args.matchers
    ):
        if batch % devices:
            continue
        config = read_config(args.config)
        config["model"] |= {"compute_dtype": dtype, "remat": remat}
        height, width = (int(side) for side in size.split("x"))
        found = measure(
            config,
            devices=devices,
            size=(height, width),
            batch_size=batch,
            matcher=matcher,
            runs=args.runs,
            parts=args.parts,
        )
        case = {
            "devices": devices,
            "images": size,
            "batch": batch,
            "type": dtype,
            "remat": remat,
            "matcher": matcher,
        }
        results.append({**case, "seconds": found})
        numbers = [
            f"{1e3 * found['step']:.0f}",
            f"{batch / found['step']:.2f}",
            *(f"{1e3 * found[p]:.1f}" if p in found else "" for p in PARTS),
        ]
        rows.append([*case.values(), *numbers])
        print(row(rows[-1]), flush=True)
    columns = [
        "devices", "images", "batch", "type", "remat", "matcher", "step ms", "images/s",
        *(f"{part} ms" for part in PARTS),
    ]  # fmt: skip
    numbers = {"device": jax.devices()[0].device_kind, "results": results}
    report(f"{title}\n\n{table(columns, rows)}", numbers, args.output)


if __name__ == "__main__":
    main()
