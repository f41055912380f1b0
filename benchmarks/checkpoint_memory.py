"""What a process keeps of every checkpoint that it has written, and whose it is: resident memory
after N saves, and after N calls of tensorstore.

python -m benchmarks.checkpoint_memory --config=configs/debug.py --saves=80
"""

import argparse
import ctypes
import dataclasses
import gc
import importlib.metadata
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import tensorstore

from dsct_jax.config import dataclass_from_dict, read_config
from dsct_jax.inference.load import model_config
from dsct_jax.model.build import Network
from dsct_jax.parallel import make_mesh
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.meter import memory
from dsct_jax.training.optimizer import OptimizerConfig
from dsct_jax.training.step import initial_state


def resident_mib() -> float:
    """Of this process, after Python and malloc have given back what nobody uses (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return memory()["process_mib"]


def grown(run: Callable[[], object], times: int) -> list[float]:
    """MiB after each quarter of `times` calls, after two that are not counted."""
    run(), run()
    before, after = resident_mib(), []
    for i in range(times):
        run()
        if (i + 1) % (times // 4) == 0:
            after.append(resident_mib() - before)
    return after


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/debug.py"))
    parser.add_argument("--saves", type=int, default=80, help="a multiple of 4")
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    config = read_config(args.config)
    optimizer_config = dataclass_from_dict(OptimizerConfig, "optimizer", config["optimizer"])
    functions = Network(model_config(config))
    _, state = initial_state(
        *functions.init(0), optimizer_config, total_steps=1, mesh=make_mesh(jax.devices()[:1])
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), metadata={"config": config})

        def save() -> None:
            nonlocal state
            state = dataclasses.replace(state, step=state.step + jnp.int32(1))
            checkpoints.save(state)
            checkpoints.wait()

        saves = grown(save, args.saves)
        checkpoints.close()
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": "/nowhere/"}}
    calls = grown(lambda: [tensorstore.Spec(spec).to_json() for _ in range(1000)], 20)
    arrays = len(jax.tree.leaves(state))
    print(
        f"orbax-checkpoint {importlib.metadata.version('orbax-checkpoint')}, tensorstore "
        f"{importlib.metadata.version('tensorstore')}"
    )
    print(
        f"{args.saves} checkpoints of {arrays} arrays: {saves[-1] / args.saves:.2f} MiB each; by "
        f"quarter {', '.join(f'{x:.1f}' for x in saves)} MiB"
    )
    print(
        "tensorstore.Spec(...).to_json(), which orbax calls for every array: "
        f"{calls[-1] / 20 * 1024 / 1000:.2f} KiB a call"
    )


if __name__ == "__main__":
    main()
