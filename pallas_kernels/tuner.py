"""Find the GPU kernels' tiles: `python -m pallas_kernels.tuner` prints the fastest, `--write` puts
them into tile_table.py.

Runs on the GPU that jax sees. One entry a direction, type of the values and shape class: the best
    over the named workloads together, with
trained-like points.
"""

import argparse
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from pallas_kernels import pallas_gpu, tile_table, tiles
from pallas_kernels.workloads import WORKLOADS, Workload

CANDIDATES = tuple(
    tiles.Tile(queries, warps)
    for queries in (4, 8, 16, 32, 64)
    for warps in (1, 2, 4, 8)
    if warps <= queries
)
TUNED = (
    "encoder_800x1066",
    "encoder_800x1066_batch4",
    "encoder_480x640",
    "decoder_304",
    "decoder_caer",
)
ROTATING, REPEATS = 3, 30


def milliseconds(workload: Workload, dtype, direction: str, tile: tiles.Tile) -> float:
    """Median time of one direction, over rotating inputs."""
    function = functools.partial(
        pallas_gpu.deformable_attention_from_offsets,
        spatial_shapes=workload.spatial_shapes,
        tile=tile,
    )

    def forward(arguments):
        return function(**arguments)

    def backward(arguments):
        out, pullback = jax.vjp(forward, arguments)
        return pullback(
            jnp.ones_like(out)
        )  # the forward pass's result is not needed, so it is not run

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
        jax.block_until_ready(
            [run(arguments) for arguments in sets]
        )  # several in one wait: launching is not what is measured
        times.append((time.perf_counter() - begin) * 1e3 / ROTATING)
    return statistics.median(times)


def tune() -> dict[str, tuple[int, int]]:
    """Shape class -> (queries, warps) of the smallest sum of times relative to each workload's
    best.
    """
    times: dict[str, dict[tiles.Tile, list[float]]] = {}
    for name in TUNED:
        workload = WORKLOADS[name]
        for dtype in (jnp.float32, jnp.bfloat16):
            for direction in ("forward", "backward"):
                key = tiles.shape_class(
                    direction, jnp.dtype(dtype).name, workload.shapes()["logits"][1]
                )
                found = {
                    tile: milliseconds(workload, dtype, direction, tile) for tile in CANDIDATES
                }
                best = min(found.values())
                fastest = sorted(found, key=found.__getitem__)[:4]
                print(
                    f"{name} {key}: "
                    + ", ".join(
                        f"{tile.queries}x{tile.warps} {found[tile]:.4f} ms" for tile in fastest
                    ),
                    flush=True,
                )
                for tile, ms in found.items():
                    times.setdefault(key, {}).setdefault(tile, []).append(ms / best)
    table = {}
    for key, found_by_tile in times.items():
        totals = {tile: sum(relative) for tile, relative in found_by_tile.items()}
        winner = min(totals, key=totals.__getitem__)
        table[key] = (winner.queries, winner.warps)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="replace this device's entries in tile_table.py"
    )
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("the tuner measures GPU kernels, and jax sees no GPU")
    table = {**tile_table.TABLE, jax.devices()[0].device_kind: tune()}
    lines = []
    for device, entries in sorted(table.items()):
        lines += [
            f'    "{device}": {{',
            *(f'        "{key}": {tile},' for key, tile in sorted(entries.items())),
            "    },",
        ]
    text = (
        f'"""{tile_table.__doc__}"""\n\nTABLE: dict[str, dict[str, tuple[int, int]]] = {{\n'
        + "\n".join(lines)
        + "\n}\n"
    )
    print(text)
    if arguments.write:
        pathlib.Path(tile_table.__file__).write_text(text)


if __name__ == "__main__":
    main()
