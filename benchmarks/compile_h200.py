"""Compile for an H200 on a machine without a GPU: every GPU kernel, or a whole training step with
what it would take.

    python -m benchmarks.compile_h200 kernels [--all-tiles] [--output=OUTPUT]
    python -m benchmarks.compile_h200 step --size=800x1066 --batch=4 --dtype=bfloat16 --remat=light
    python -m benchmarks.compile_h200 step --size=480x640 --batch=8 --modalities

Lowering alone misses what only the compiler finds: too much shared memory, tensors too large,
errors of ptxas. Nothing is executed. A step takes about ten minutes on two cores. Needs Python 3.12
and `pip install jax==0.11.2 jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2`.
"""

import os

# the CUDA plugin then registers without looking for a driver
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.model_cpu import SUBSETS
from benchmarks.tables import add_output, report, row, table
from dsct_jax.config import dataclass_from_dict, read_config
from dsct_jax.inference.load import model_config
from dsct_jax.model.build import Network
from dsct_jax.model.layers import REMAT
from dsct_jax.parallel import make_mesh
from dsct_jax.training.config import MATCHERS, LossConfig, MatcherConfig
from dsct_jax.training.memory_plan import Plan, format_plan, make_plan
from dsct_jax.training.objective import SetPrediction
from dsct_jax.training.optimizer import OptimizerConfig
from dsct_jax.training.step import initial_state, make_train_step
from pallas_kernels import pallas_gpu
from pallas_kernels.pallas_gpu import Tile
from pallas_kernels.workloads import WORKLOADS, Workload

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
TILES = (None, Tile(8, 2), Tile(16, 4), Tile(32, 4), Tile(64, 4), Tile(64, 8))
KINDS = ("trained", "frozen")
COLUMNS = (
    "workload", "values", "direction", "tile", "compile s", "temporary MiB", "spills registers",
    "shared memory bytes",
)  # fmt: skip


def h200_mesh(like: Mesh | None = None) -> Mesh:
    """A mesh of one H200 that is not there, with the axes of `like`."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200, topology="1x1x1"
    )
    devices = np.array(topology.devices)
    return (
        Mesh(devices.reshape(like.devices.shape), like.axis_names) if like else Mesh(devices, "d")
    )


def compile_h200(function, *arguments):
    """`function` compiled for an H200, and whether a kernel spills registers."""
    mesh = h200_mesh()
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())),
        arguments,
    )
    strict = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        try:
            return lowered.compile(compiler_options=strict), False
        except jax.errors.JaxRuntimeError as error:
            if "register spilling" not in str(error):
                raise
            return lowered.compile(), True


def functions(workload: Workload, tile: Tile | None):
    """(name, function of the arguments) of both directions."""

    def forward(arguments):
        return pallas_gpu.deformable_attention_from_offsets(
            spatial_shapes=workload.spatial_shapes, tile=tile, **arguments
        )

    def backward(arguments, cotangent):
        return jax.vjp(forward, arguments)[1](cotangent)[0]

    return ("forward", forward), ("backward", backward)


def check(workload: Workload, dtype, tile: Tile | None, dump: Path) -> Iterator[tuple]:
    """A table row per direction."""
    shapes = workload.shapes()
    arguments = {
        key: jax.ShapeDtypeStruct(shape, dtype if key == "value" else jnp.float32)
        for key, shape in shapes.items()
    }
    size = (*shapes["logits"][:2], workload.heads * workload.head_size)
    cotangent = [jax.ShapeDtypeStruct(size, dtype)]
    for direction, function in functions(workload, tile):
        begin = time.perf_counter()
        extra = cotangent if direction == "backward" else []
        compiled, spills = compile_h200(function, arguments, *extra)
        seconds = time.perf_counter() - begin
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
        kernel = f"deformable_attention_{direction}"
        pattern = re.compile(rf"{kernel}.*shared_memory: (\d+)")
        dumped = [file.read_text() for file in dump.glob("*thunk_sequence.txt")]
        shared = [int(found) for text in dumped for found in pattern.findall(text)]
        if not shared:
            raise RuntimeError(f"{workload.name}: the compiled program does not contain {kernel}")
        for file in dump.iterdir():
            file.unlink()
        name = "default" if tile is None else f"{tile.queries} queries, {tile.warps} warps"
        case = (workload.name, jnp.dtype(dtype).name, direction, name)
        spilled = "yes" if spills else "no"
        yield *case, f"{seconds:.1f}", f"{temporary:.1f}", spilled, max(shared)


def check_kernels(args: argparse.Namespace) -> None:
    """Every workload, with the default tile or, of the encoder, with each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # Read when the first program is compiled; the dump says how much memory a kernel shares.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
        for workload in WORKLOADS.values():
            every = args.all_tiles and workload.name == "encoder_800x1066"
            for dtype in (jnp.float32, jnp.bfloat16):
                for tile in TILES if every else (None,):
                    for cells in check(workload, dtype, tile, Path(folder)):
                        print(row(cells), flush=True)
                        rows.append(cells)
    title = f"# GPU kernels compiled for an H200 without a GPU (jax {jax.__version__})"
    report(f"{title}\n\n{table(COLUMNS, rows)}", rows, args.output)


def plan_steps(args: argparse.Namespace) -> None:
    """Compiles a training step, or one without and one with each and all modalities; prints the
    plans, and of several a table.
    """
    about = f"{args.dtype}, remat {args.remat}, matcher {args.matcher}"
    title = f"{args.config}, {args.size}, batch {args.batch}, {about}"
    title = f"{title}, for an H200 (jax {jax.__version__})"
    print(title)
    rows = []
    for name, modalities in (SUBSETS if args.modalities else {"": ()}).items():
        plan = plan_step(args, modalities)
        print(f"{name}\n{format_plan(plan)}", flush=True)
        peak = max(bucket.peak_bytes for bucket in plan.buckets) / 2**20
        parameters = [sum(getattr(part, kind) for part in plan.modules) for kind in KINDS]
        rows.append((name, *(f"{n / 1e6:.1f}" for n in parameters), f"{peak:,.0f}"))
    columns = ("modalities", *(f"{kind}, M" for kind in KINDS), "peak MiB of one device")
    if args.modalities:
        report(f"{title}\n\n{table(columns, rows)}", rows, args.output)


def plan_step(args: argparse.Namespace, modalities: Sequence[str]) -> Plan:
    """The plan of a training step compiled for an H200."""
    config = read_config(args.config)
    dtype = {"compute_dtype": args.dtype, "remat": args.remat}
    config["model"] |= dtype | {"modalities": tuple(modalities)}
    here = make_mesh(jax.devices()[:1])
    mesh = h200_mesh(here)
    functions = Network(model_config(config))
    optimizer_config = dataclass_from_dict(OptimizerConfig, "optimizer", config["optimizer"])
    optimizer, state = initial_state(*functions.init(0), optimizer_config, total_steps=1, mesh=here)

    def there(x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    step = make_train_step(
        functions,
        optimizer,
        objective=SetPrediction(
            dataclass_from_dict(LossConfig, "loss", config["loss"]),
            MatcherConfig(implementation=args.matcher),
            multi_label=config["multi_label"],
        ),
        mesh=mesh,
        seed=0,
    )
    height, width = (int(side) for side in args.size.split("x"))
    sizes = {
        "batch_size": args.batch,
        "max_targets": config["data"]["max_targets"],
        "num_classes": len(config["class_names"]),
    }
    return make_plan(step, jax.tree.map(there, state), [(height, width)], **sizes)


def main() -> None:
    """One of the two."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(required=True)
    kernels = commands.add_parser("kernels", help="every GPU kernel")
    kernels.add_argument("--all-tiles", action="store_true", help="of the encoder, every tile")
    add_output(kernels)
    kernels.set_defaults(run=check_kernels)
    step = commands.add_parser("step", help="a whole training step, and what it would take")
    step.add_argument("--config", type=Path, default=Path("configs/emotic_r50.py"))
    step.add_argument("--size", default="800x1066", help="HEIGHTxWIDTH of the padded images")
    step.add_argument("--batch", type=int, default=4)
    step.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    step.add_argument("--remat", choices=REMAT, default="light")
    step.add_argument("--matcher", choices=MATCHERS, default="scipy")
    text = "without, with each, and with all of model.modalities"
    step.add_argument("--modalities", action="store_true", help=text)
    add_output(step)
    step.set_defaults(run=plan_steps)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
