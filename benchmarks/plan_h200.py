"""What a training step would take on an H200, compiled completely on a machine without one: memory,
and that every kernel compiles.

    python -m benchmarks.plan_h200 --size 800x1066 --batch 4 --dtype bfloat16 --remat light

Nothing is executed. Needs what `benchmarks.compile_h200` needs; takes about ten minutes on two
cores.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # the CUDA plugin then registers without looking for a driver

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from benchmarks.compile_h200 import H200
from dsct_jax.config import dataclass_from_dict, read_config
from dsct_jax.inference.load import model_config
from dsct_jax.model.build import Network
from dsct_jax.model.layers import REMAT
from dsct_jax.parallel import make_mesh
from dsct_jax.training.config import MATCHERS, LossConfig, MatcherConfig, OptimizerConfig
from dsct_jax.training.memory_plan import format_plan, make_plan
from dsct_jax.training.objective import SetPrediction
from dsct_jax.training.step import initial_state, make_train_step


def main() -> None:
    """Compiles and prints the plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/emotic_r50.py"))
    parser.add_argument("--size", default="800x1066", help="HEIGHTxWIDTH of the padded images")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--remat", choices=REMAT, default="light")
    parser.add_argument("--matcher", choices=MATCHERS, default="scipy")
    args = parser.parse_args()
    config = read_config(args.config)
    config["model"] |= {"compute_dtype": args.dtype, "remat": args.remat}
    here = make_mesh(jax.devices()[:1])
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200, topology="1x1x1"
    )
    mesh = Mesh(np.array(topology.devices).reshape(here.devices.shape), here.axis_names)
    functions = Network(model_config(config))
    optimizer_config = dataclass_from_dict(OptimizerConfig, "optimizer", config["optimizer"])
    optimizer, state = initial_state(*functions.init(0), optimizer_config, total_steps=1, mesh=here)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
        ),
        state,
    )
    objective = SetPrediction(
        dataclass_from_dict(LossConfig, "loss", config["loss"]),
        MatcherConfig(implementation=args.matcher),
        multi_label=config["multi_label"],
    )
    step = make_train_step(functions, optimizer, objective=objective, mesh=mesh, seed=0)
    height, width = (int(side) for side in args.size.split("x"))
    sizes = {
        "batch_size": args.batch,
        "max_targets": config["data"]["max_targets"],
        "num_classes": len(config["class_names"]),
    }
    print(
        f"{args.config}, {args.dtype}, remat {args.remat}, matcher {args.matcher}, for an H200 "
        f"(jax {jax.__version__})"
    )
    print(format_plan(make_plan(step, state, [(height, width)], **sizes)))


if __name__ == "__main__":
    main()
