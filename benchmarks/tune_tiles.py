"""Find the GPU kernels' tiles: `python -m benchmarks.tune_tiles` prints, for the GPU that jax sees,
the fastest for each of the two constants of pallas_kernels/pallas_gpu.py.

Few and many queries are tuned apart, each over the named workloads, both types of the values and
both directions together, with trained-like points.
"""

import concurrent.futures
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.tables import hardware, in_words, make_parser, report, table
from pallas_kernels import pallas_gpu
from pallas_kernels.workloads import WORKLOADS, Workload

CANDIDATES = tuple(
    pallas_gpu.Tile(queries, warps)
    for queries in (4, 8, 16, 32, 64)
    for warps in (1, 2, 4, 8)
    if warps <= queries
)
TUNED = {
    "MANY_QUERIES_TILE": ("encoder_800x1066", "encoder_480x640"),
    "FEW_QUERIES_TILE": ("decoder_304", "decoder_caer"),
}
ROTATING, REPEATS = 6, 20


def input_sets(workload: Workload, dtype) -> list[dict[str, jax.Array]]:
    """ROTATING sets of arguments, on the device."""
    sets = [
        {key: jnp.asarray(x) for key, x in workload.inputs(seed=seed).items()}
        for seed in range(ROTATING)
    ]
    return [{**arguments, "value": arguments["value"].astype(dtype)} for arguments in sets]


def compiled(workload: Workload, direction: str, tile: pallas_gpu.Tile, *, sets: list) -> Callable:
    """One direction over all sets, in one program: launching is not what is measured."""
    function = functools.partial(
        pallas_gpu.deformable_attention_from_offsets,
        spatial_shapes=workload.spatial_shapes,
        tile=tile,
    )

    def forward(arguments):
        return function(**arguments)

    def backward(arguments):
        # the forward pass's result is not needed, so it is not run
        out, pullback = jax.vjp(forward, arguments)
        return pullback(jnp.ones_like(out))

    one = jax.jit(forward if direction == "forward" else backward)  # traced once, not per set
    return jax.jit(lambda sets: [one(arguments) for arguments in sets]).lower(sets).compile()


def milliseconds(run: Callable, sets: list) -> float:
    """Median time of one set."""
    jax.block_until_ready(run(sets))
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(run(sets))
        times.append((time.perf_counter() - begin) * 1e3 / ROTATING)
    return statistics.median(times)


def relative_times(names: tuple[str, ...]) -> dict[pallas_gpu.Tile, float]:
    """Tile -> mean over all cases of its time relative to the case's best."""
    relative: dict[pallas_gpu.Tile, list[float]] = {tile: [] for tile in CANDIDATES}
    for name in names:
        for dtype in (jnp.float32, jnp.bfloat16):
            sets = input_sets(WORKLOADS[name], dtype)
            for direction in ("forward", "backward"):
                build = functools.partial(compiled, WORKLOADS[name], direction, sets=sets)
                with concurrent.futures.ThreadPoolExecutor() as pool:
                    programs = dict(zip(CANDIDATES, pool.map(build, CANDIDATES), strict=True))
                found = {tile: milliseconds(run, sets) for tile, run in programs.items()}
                best = min(found, key=found.__getitem__)
                print(f"{name} {jnp.dtype(dtype).name} {direction}: {best} {found[best]:.4f} ms")
                for tile, ms in found.items():
                    relative[tile].append(ms / found[best])
    return {tile: statistics.fmean(times) for tile, times in relative.items()}


def main() -> None:
    """Measures, prints the table, and writes it with the numbers."""
    parser = make_parser("benchmarks.tune_tiles", __doc__)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("the tuner measures GPU kernels, and jax sees no GPU")
    rows = [
        (constant, tile, f"{time:.3f}")
        for constant, names in TUNED.items()
        for tile, time in sorted(relative_times(names).items(), key=lambda item: item[1])[:4]
    ]
    text = table(("constant", "tile", "mean time relative to the best of each case"), rows)
    report(f"{in_words(hardware())}\n\n{text}", rows, arguments.output)


if __name__ == "__main__":
    main()
