"""Milliseconds and images per second of the whole model's forward pass, where jax runs, by image
size, batch and type:

    python -m benchmarks.forward --output=benchmarks/forward_gpu

Random weights and images; `step` of a few passes that wait only at the end, `latency` of one that
waits.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks.tables import device_line, make_parser, report, row, table
from benchmarks.training_step import make_batch
from dsct_jax.config import read_config
from dsct_jax.inference.load import model_config
from dsct_jax.model.build import Network
from dsct_jax.parallel import make_mesh, shard_batch
from dsct_jax.training.step import make_eval_step

IN_FLIGHT = 5


def milliseconds(run: Callable, calls: int, runs: int) -> float:
    """Median over `runs` of the time per call, with one wait after so many calls."""
    jax.block_until_ready(run())
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        found.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(found)


def main() -> None:
    """Measures every combination, prints the table, and writes it with the numbers."""
    parser = make_parser("benchmarks.forward", __doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/emotic_r50.py"))
    parser.add_argument("--sizes", nargs="+", default=["800x1066"], help="HEIGHTxWIDTH")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    config, rows, results, mesh = read_config(args.config), [], [], make_mesh(jax.devices()[:1])
    for size, b, dtype in itertools.product(args.sizes, args.batches, args.dtypes):
        config["model"] |= {"compute_dtype": dtype}
        functions = Network(model_config(config))
        weights = jax.device_put(functions.init(0))
        height, width = (int(side) for side in size.split("x"))
        batch = shard_batch(make_batch(b, height, width, 4, len(config["class_names"])), mesh)
        step = make_eval_step(functions, mesh=mesh)

        def run(step=step, weights=weights, batch=batch):
            return step(*weights, batch)

        case = {"images": size, "batch": b, "type": dtype}
        latency, each = (milliseconds(run, calls, args.runs) for calls in (1, IN_FLIGHT))
        results.append({**case, "latency_ms": latency, "ms": each})
        rows.append([*case.values(), f"{latency:.1f}", f"{each:.1f}", f"{1e3 * b / each:.1f}"])
        print(row(rows[-1]), flush=True)
    columns = ["images", "batch", "type", "latency ms", "ms", "images/s"]
    title = f"Forward pass of {args.config}, median of {args.runs} ({device_line()})"
    numbers = {"device": jax.devices()[0].device_kind, "results": results}
    report(f"{title}\n\n{table(columns, rows)}", numbers, args.output)


if __name__ == "__main__":
    main()
