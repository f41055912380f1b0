"""Forward and training step of the full R50 model on the CPU, beside Hugging Face's DeformableDetr
of the same size.

    python -m benchmarks.model_cpu --torch --output=benchmarks/model_cpu
    python -m benchmarks.model_cpu --modalities --output=benchmarks/modalities_cpu

Float32, random weights, one image; nothing is computed twice to save memory (model.remat="none"),
as in PyTorch. Each measurement is a process of its own with the given number of threads, so that
peak memory is its own; the processes of the two implementations take turns, and the table gives the
median over all timed runs with their range.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from benchmarks.tables import make_parser, report, table
from dsct_jax.model.modalities import MODALITIES

HEIGHT, WIDTH = 480, 640
MODES = ("forward", "train")
# our model with the plain jnp definition of deformable attention: what the fast path is worth
PLAIN = "ours-reference"
# the frozen networks beside the backbone (model.modalities), each alone and together
SUBSETS = {"none": (), **{name: (name,) for name in MODALITIES}, "all": MODALITIES}


def measure_ours(
    mode: str, runs: int, implementation: str | None = None, modalities: Sequence[str] = ()
) -> tuple[list[float], dict[str, float]]:
    """Seconds of `runs` forward passes or training steps of configs/emotic_r50, dropout on in
    training, compiled before; and how many million parameters, and values of frozen networks and
    norms, there are.

    `implementation` names one of deformable attention's; None is what the model picks by itself.
    """
    import jax

    from configs.emotic_r50 import get_config
    from dsct_jax.batch import Batch, Targets
    from dsct_jax.config import dataclass_from_dict, to_builtins
    from dsct_jax.inference.load import model_config
    from dsct_jax.model.build import Network
    from dsct_jax.parallel import make_mesh, shard_batch
    from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig
    from dsct_jax.training.objective import SetPrediction
    from dsct_jax.training.step import initial_state, make_eval_step, make_train_step

    config, mesh = to_builtins(get_config()), make_mesh()
    config["model"] |= {"remat": "none", "modalities": tuple(modalities)}
    functions = Network(model_config(config))
    params, norm_stats = functions.init(0)
    millions = {
        name: sum(x.size for x in values.values()) / 1e6
        for name, values in (("trained", params), ("frozen", norm_stats))
    }
    rng = np.random.default_rng(0)
    sizes = np.array([[HEIGHT, WIDTH]], np.int32)
    labels = (rng.random((1, 16, 26)) < 0.2).astype(np.float32)
    targets = Targets(
        rng.uniform(0.3, 0.5, (1, 16, 4)).astype(np.float32), labels, np.arange(16)[None] < 2
    )
    image = rng.integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)
    batch = shard_batch(
        Batch(image, sizes, targets, np.zeros(1, np.int32), sizes, np.ones(1, bool)), mesh
    )
    if mode == "forward" and implementation:
        forward = jax.jit(
            lambda p, f, batch: functions.bind(p, f)(
                *functions.inputs(batch), implementation=implementation
            )
        )
        passes = timed(lambda: jax.block_until_ready(forward(params, norm_stats, batch)), runs)
        return passes, millions
    if mode == "forward":
        step = make_eval_step(functions, mesh=mesh)
        passes = timed(lambda: jax.block_until_ready(step(params, norm_stats, batch)), runs)
        return passes, millions
    optimizer_config = dataclass_from_dict(OptimizerConfig, "optimizer", config["optimizer"])
    optimizer, state = initial_state(
        params, norm_stats, optimizer_config, total_steps=1000, mesh=mesh
    )
    objective = SetPrediction(LossConfig(), MatcherConfig(), multi_label=True)
    step = make_train_step(functions, optimizer, objective=objective, mesh=mesh, seed=0)

    def run():
        nonlocal state
        state, terms = step(state, batch)
        jax.block_until_ready((state, terms))

    return timed(run, runs), millions


def measure_torch(mode: str, runs: int) -> tuple[list[float], dict[str, float]]:
    """The same of transformers' DeformableDetr: ResNet-50, 6 + 6 layers, 304 queries, its own loss
    and Hungarian matcher, AdamW.
    """
    import torch
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False,
        backbone_config=backbone, num_queries=304, num_labels=26, auxiliary_loss=True,
    )  # fmt: skip
    model = DeformableDetrForObjectDetection(config)
    images = torch.randn(1, 3, HEIGHT, WIDTH)
    mask = torch.ones(1, HEIGHT, WIDTH, dtype=torch.long)
    if mode == "forward":
        model.eval()

        def run():
            with torch.no_grad():
                model(pixel_values=images, pixel_mask=mask)

        return timed(run, runs), {}
    labels = [{"class_labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4) * 0.2 + 0.3}]
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=1e-4)

    def train():
        optimizer.zero_grad()
        model(pixel_values=images, pixel_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()

    return timed(train, runs), {}


def timed(run, runs: int) -> list[float]:
    """Seconds of each of `runs` calls after two that are not counted."""
    seconds = []
    for i in range(runs + 2):
        start = time.perf_counter()
        run()
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return seconds


def in_process(implementation: str, mode: str, runs: int, threads: int) -> dict:
    """One measurement in a process of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={threads}",
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.model_cpu",
        f"--measure={implementation}:{mode}",
        f"--runs={runs}",
    ]
    out = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Measures, prints the table, and writes it with the raw numbers."""
    parser = make_parser("benchmarks.model_cpu", __doc__)
    parser.add_argument(
        "--torch",
        action="store_true",
        help="measure transformers' DeformableDetr too (needs the torch extra)",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="processes for each measurement, taking turns"
    )
    parser.add_argument("--runs", type=int, default=3, help="timed runs per process")
    parser.add_argument("--threads", type=int, default=2)
    text = "ours without and with each of model.modalities, and with all (nothing else)"
    parser.add_argument("--modalities", action="store_true", help=text)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure_here(*args.measure.split(":"), args.runs)
        return
    ours = list(SUBSETS) if args.modalities else ["ours"]
    implementations = {"forward": [*ours, *[PLAIN] * (not args.modalities)], "train": ours}
    if args.torch:
        for names in implementations.values():
            names.append("transformers")
    results: dict[str, dict] = {}
    for round_number in range(args.rounds):
        for mode in MODES:
            for name in implementations[mode]:
                found = in_process(name, mode, args.runs, args.threads)
                millions = found["millions"]
                entry = {"seconds": [], "peak_gib": [], "millions": millions}
                entry = results.setdefault(f"{mode} {name}", entry)
                entry["seconds"] += found["seconds"]
                entry["peak_gib"].append(found["peak_gib"])
                print(
                    f"round {round_number + 1}/{args.rounds}: {mode} {name} "
                    f"{min(found['seconds']):.2f} s",
                    flush=True,
                )
    report(format_results(results, args.threads), results, args.output)


def measure_here(name: str, mode: str, runs: int) -> None:
    """The measurement of `in_process`, as json."""
    measure = {
        "ours": measure_ours,
        "transformers": measure_torch,
        PLAIN: partial(measure_ours, implementation="reference"),
        **{key: partial(measure_ours, modalities=subset) for key, subset in SUBSETS.items()},
    }[name]
    seconds, millions = measure(mode, runs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gib": peak, "millions": millions}))


def format_results(results: dict[str, dict], threads: int) -> str:
    """A markdown table with medians, ranges, peak memory and the ratio to transformers."""
    import jax

    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    title = (
        f"R50, {HEIGHT}x{WIDTH}, batch 1, float32, CPU ({versions}, {threads} threads, "
        f"{platform.machine()})"
    )
    columns = (
        "what", "seconds, median (min to max)", "peak memory GiB", "parameters + frozen values, M",
        "speed against transformers",
    )  # fmt: skip
    rows = []
    for name, entry in results.items():
        median = statistics.median(entry["seconds"])
        other = results.get(f"{name.split()[0]} transformers")
        ratio = f"{statistics.median(other['seconds']) / median:.2f}x" if other else ""
        spread = f"{median:.2f} ({min(entry['seconds']):.2f} to {max(entry['seconds']):.2f})"
        sizes = " + ".join(f"{number:.1f}" for number in entry["millions"].values())
        rows.append((name, spread, f"{max(entry['peak_gib']):.1f}", sizes, ratio))
    return f"{title}\n\n{table(columns, rows)}"


if __name__ == "__main__":
    main()
