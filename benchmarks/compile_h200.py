"""Compile the GPU kernels completely for an H200 on a machine without a GPU: `python -m
benchmarks.compile_h200`.

Lowering alone misses what only the compiler finds: too much shared memory, tensors too large,
    errors of ptxas. Nothing is executed. Needs Python 3.12
and `pip install jax==0.11.2 jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2`.
"""

import os

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # the CUDA plugin then registers without looking for a driver

import argparse
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import pallas_gpu, tiles
from pallas_kernels.workloads import WORKLOADS, Workload

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
TILES = (
    None,
    tiles.Tile(8, 2),
    tiles.Tile(16, 4),
    tiles.Tile(32, 4),
    tiles.Tile(64, 4),
    tiles.Tile(64, 8),
)


def compile_h200(function, *arguments, devices: int = 1, spec: P | None = None):
    """`function` compiled for that many H200s, its arguments laid out by `spec` (None: replicated),
    and whether a kernel spills registers.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200, topology=f"1x1x{devices}"
    )
    mesh = Mesh(np.array(topology.devices), ("data",))
    sharding = NamedSharding(mesh, spec or P())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        try:
            return lowered.compile(
                compiler_options={"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
            ), False
        except jax.errors.JaxRuntimeError as error:
            if "register spilling" not in str(error):
                raise
            return lowered.compile(), True


def functions(workload: Workload, tile: tiles.Tile | None):
    """(name, function of the arguments) of both directions."""

    def forward(arguments):
        return pallas_gpu.deformable_attention_from_offsets(
            spatial_shapes=workload.spatial_shapes, tile=tile, **arguments
        )

    def backward(arguments, cotangent):
        return jax.vjp(forward, arguments)[1](cotangent)[0]

    return ("forward", forward), ("backward", backward)


def check(workload: Workload, dtype, tile: tiles.Tile | None, dump: pathlib.Path) -> list[str]:
    """One table row a direction."""
    arguments = {
        key: jax.ShapeDtypeStruct(shape, dtype if key == "value" else jnp.float32)
        for key, shape in workload.shapes().items()
    }
    cotangent = jax.ShapeDtypeStruct(
        (*workload.shapes()["logits"][:2], workload.heads * workload.head_size), dtype
    )
    rows = []
    for direction, function in functions(workload, tile):
        begin = time.perf_counter()
        compiled, spills = compile_h200(
            function, arguments, *([cotangent] if direction == "backward" else [])
        )
        seconds, temporary = (
            time.perf_counter() - begin,
            compiled.memory_analysis().temp_size_in_bytes / 2**20,
        )
        kernel = f"deformable_attention_{direction}"
        shared = [
            re.findall(rf"{kernel}.*shared_memory: (\d+)", file.read_text())
            for file in dump.glob("*thunk_sequence.txt")
        ]
        if not any(shared):
            raise RuntimeError(
                f"{workload.name} {direction}: the compiled program does not contain the kernel "
                f"{kernel}"
            )
        used = f"{'yes' if spills else 'no'} | {max(int(x) for found in shared for x in found)}"
        for file in dump.iterdir():
            file.unlink()
        name = "default" if tile is None else f"{tile.queries} queries, {tile.warps} warps"
        rows.append(
            f"| {workload.name} | {jnp.dtype(dtype).name} | {direction} | {name} | {seconds:.1f} "
            f"| {temporary:.1f} | {used} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this file")
    parser.add_argument(
        "--all-tiles",
        action="store_true",
        help="every tile of the tuner for the encoder, not only the default",
    )
    arguments = parser.parse_args()
    header = [
        f"# GPU kernels compiled for an H200 without a GPU (jax {jax.__version__})\n",
        "| workload | values | direction | tile | compile s | temporary MiB | spills registers | "
        "shared memory bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(header))
    rows = []
    dump = pathlib.Path(os.environ["XLA_FLAGS"].rsplit("--xla_dump_to=", 1)[1].split()[0])
    for workload in WORKLOADS.values():
        for dtype in (jnp.float32, jnp.bfloat16):
            for tile in (
                TILES if arguments.all_tiles and workload.name == "encoder_800x1066" else (None,)
            ):
                rows += check(workload, dtype, tile, dump)
    if arguments.output:
        arguments.output.write_text("\n".join([*header, *rows]) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        # Read when the first program is compiled; the shared memory of each kernel is read from the
        # dump.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
        main()
