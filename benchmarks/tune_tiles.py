"""Find the GPU kernels' tiles: `python -m benchmarks.tune_tiles` prints, for the GPU that jax sees,
the fastest for each of the two constants of pallas_kernels/pallas_gpu.py.

Few and many queries are tuned apart, each over the named workloads, both types of the values and
both directions together, with trained-like points.
"""

import functools
import statistics
import time

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
    "MANY_QUERIES_TILE": ("encoder_800x1066", "encoder_800x1066_batch4", "encoder_480x640"),
    "FEW_QUERIES_TILE": ("decoder_304", "decoder_caer"),
}
ROTATING, REPEATS = 3, 30


def milliseconds(workload: Workload, dtype, direction: str, tile: pallas_gpu.Tile) -> float:
    """Median time of one direction, over rotating inputs."""
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

    run = jax.jit(forward if direction == "forward" else backward)
    sets = [
        {key: jnp.asarray(x) for key, x in workload.inputs(seed=seed).items()}
        for seed in range(ROTATING)
    ]
    sets = [{**arguments, "value": arguments["value"].astype(dtype)} for arguments in sets]
    jax.block_until_ready(run(sets[0]))
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        # several in one wait: launching is not what is measured
        jax.block_until_ready([run(arguments) for arguments in sets])
        times.append((time.perf_counter() - begin) * 1e3 / ROTATING)
    return statistics.median(times)


def relative_times(names: tuple[str, ...]) -> dict[pallas_gpu.Tile, float]:
    """Tile -> mean over all cases of its time relative to the case's best."""
    relative: dict[pallas_gpu.Tile, list[float]] = {tile: [] for tile in CANDIDATES}
    for name in names:
        for dtype in (jnp.float32, jnp.bfloat16):
            for direction in ("forward", "backward"):
                case = WORKLOADS[name], dtype, direction
                found = {tile: milliseconds(*case, tile) for tile in CANDIDATES}
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
