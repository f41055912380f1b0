"""Both matchers by batch, layers, queries and people: SciPy on the host beside the Hungarian
algorithm on the device.

    python -m benchmarks.matching --output=benchmarks/matching_cpu

Timed is what stands between the cost and the assignment on the device: for SciPy the way to the
host and back, for the device its program. Costs are drawn as the model's begin: without structure.
The two must agree in every pair, or the table is not written.
"""

import statistics
import time

import jax
import numpy as np

from benchmarks.tables import device_line, make_parser, report, row, table
from dsct_jax.training.matching import assign_on_device, assign_on_host

CASES = [  # batch, layers, queries, padded people
    (1, 6, 4, 16), (4, 6, 4, 16), (32, 6, 4, 16), (4, 6, 9, 16), (32, 6, 9, 16), (128, 6, 9, 16),
    (32, 1, 9, 16), (32, 6, 9, 4), (4, 6, 100, 20), (4, 6, 300, 50), (32, 6, 300, 50),
]  # fmt: skip


def measure(case: tuple[int, int, int, int], rounds: int) -> dict[str, float]:
    """Median milliseconds of both, taking turns; AssertionError where they assign differently."""
    b, layers, q, t = case
    rng = np.random.default_rng(0)
    cost = jax.device_put(rng.uniform(-4, 8, (layers, b, q, t)).astype(np.float32))
    valid = jax.device_put(np.arange(t) < rng.integers(1, t + 1, (b, 1)))
    device = jax.jit(assign_on_device)

    def host(cost, valid):
        return jax.device_put(assign_on_host(np.asarray(cost), np.asarray(valid)))

    np.testing.assert_array_equal(host(cost, valid), device(cost, valid))
    seconds: dict[str, list[float]] = {"scipy": [], "device": []}
    for i in range(rounds):
        # an array that the host has not seen; the same assignment
        fresh = jax.block_until_ready(cost + np.float32(i))
        for name, assign in (("scipy", host), ("device", device)):
            start = time.perf_counter()
            jax.block_until_ready(assign(fresh, valid))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measures, prints the table, and writes it with the numbers."""
    parser = make_parser("benchmarks.matching", __doc__)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    sizes, rows, results = ("batch", "layers", "queries", "people"), [], []
    for case in CASES:
        found = measure(case, args.rounds)
        results.append(dict(zip(sizes, case, strict=True)) | found)
        ratio = found["device"] / found["scipy"]
        rows.append((*case, f"{found['scipy']:.2f}", f"{found['device']:.2f}", f"{ratio:.1f}"))
        print(row(rows[-1]), flush=True)
    title = f"Assignment only, milliseconds, median of {args.rounds} ({device_line()})"
    text = table((*sizes, "scipy", "device", "device / scipy"), rows)
    numbers = {"device": jax.devices()[0].device_kind, "results": results}
    report(f"{title}\n\n{text}", numbers, args.output)


if __name__ == "__main__":
    main()
