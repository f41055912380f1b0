"""Time deformable attention where jax runs: `python -m pallas_kernels.bench`, with `--torch` beside
PyTorch's grid_sample formulation.

For each workload, pattern of points and implementation: milliseconds of the forward pass and of
    forward and backward together (median and spread
of interleaved rounds over rotating inputs), temporary memory, and the rate of the work itself:
rows gathered in TB/s (forward) and float32 additions into the gradient of the values in G/s (from
the difference). Writes a table and JSON.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_attention import IMPLEMENTATIONS, chosen_implementation
from pallas_kernels.workloads import PATTERNS, WORKLOADS, Workload

DEFAULT_WORKLOADS = ("encoder_800x1066", "encoder_480x640", "decoder_304")
ROTATING = 3  # input sets, so that a GPU's cache does not keep one


@dataclasses.dataclass
class Result:
    workload: str
    pattern: str
    values: str
    implementation: str
    forward_ms: float
    forward_spread: tuple[float, float]
    both_ms: float  # forward and backward
    both_spread: tuple[float, float]
    forward_mib: (
        float | None
    )  # temporary memory of the compiled program, or PyTorch's growth of resident memory
    both_mib: float | None
    gather_tb_s: float
    adds_g_s: float | None  # None: lost in the spread


def jax_runs(
    workload: Workload, implementation: str, sets: list
) -> tuple[list[Callable], list[float | None]]:
    """Two functions of a set number (forward; both passes) that wait for the result, and the
    temporary memory of each in MiB.
    """
    function = functools.partial(
        IMPLEMENTATIONS[implementation].deformable_attention_from_offsets,
        spatial_shapes=workload.spatial_shapes,
    )

    def forward(value, reference_points, offsets, logits, cotangent):
        return function(
            value=value, reference_points=reference_points, offsets=offsets, logits=logits
        )

    def both(value, reference_points, offsets, logits, cotangent):
        run = functools.partial(forward, reference_points=reference_points, cotangent=cotangent)
        out, pullback = jax.vjp(lambda v, o, w: run(v, offsets=o, logits=w), value, offsets, logits)
        return out, pullback(cotangent)

    compiled = [jax.jit(f).lower(*sets[0]).compile() for f in (forward, both)]
    runs = [lambda i, run=run: jax.block_until_ready(run(*sets[i % len(sets)])) for run in compiled]
    analyses = [run.memory_analysis() for run in compiled]
    return runs, [None if found is None else found.temp_size_in_bytes / 2**20 for found in analyses]


def torch_runs(workload: Workload, sets: list) -> tuple[list[Callable], list[float | None]]:
    """The same for the formulation of the released code (ms_deform_attn_core_pytorch), softmax and
    locations included.
    """
    import torch
    from torch.nn.functional import grid_sample

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, sets[0][0].dtype.name)
    sets = [
        [torch.tensor(np.asarray(x, np.float32), device=device) for x in arguments]
        for arguments in sets
    ]
    sizes = torch.tensor(
        [(width, height) for height, width in workload.spatial_shapes],
        dtype=torch.float32,
        device=device,
    )

    def attend(value, reference_points, offsets, logits):
        b, _, n, d = value.shape
        q, l, p = offsets.shape[1], offsets.shape[3], offsets.shape[4]
        grids = 2 * (reference_points[:, :, None, :, None] + offsets / sizes[:, None]) - 1
        weights = (
            torch.softmax(logits.reshape(b, q, n, l * p), -1)
            .transpose(1, 2)
            .reshape(b * n, 1, q, l * p)
        )
        samples = []
        for level, part in enumerate(
            value.split([height * width for height, width in workload.spatial_shapes], 1)
        ):
            image = (
                part.flatten(2).transpose(1, 2).reshape(b * n, d, *workload.spatial_shapes[level])
            )
            grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1).to(image.dtype)
            samples.append(
                grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            )
        out = (torch.stack(samples, -2).flatten(-2) * weights.to(image.dtype)).sum(-1)
        return out.view(b, n * d, q).transpose(1, 2)

    def wait(x):
        if device == "cuda":
            torch.cuda.synchronize()
        return x

    def forward(i):
        value, reference_points, offsets, logits, _ = sets[i % len(sets)]
        with torch.no_grad():
            return wait(attend(value.to(dtype), reference_points, offsets, logits))

    def both(i):
        value, reference_points, offsets, logits, cotangent = sets[i % len(sets)]
        leaves = [
            value.to(dtype).requires_grad_(),
            offsets.clone().requires_grad_(),
            logits.clone().requires_grad_(),
        ]
        out = attend(leaves[0], reference_points, *leaves[1:])
        return out.detach(), wait(torch.autograd.grad(out, leaves, cotangent.to(out.dtype)))

    return [forward, both], [None, None]


def resident_growth(run: Callable) -> float:
    """MiB by which the resident memory of this process peaks above its start while `run` works
    (Linux).
    """
    status = pathlib.Path("/proc/self/status")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    run(0)
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1024


def measure(
    workload: Workload, pattern: str, dtype, implementations: list[str], rounds: int
) -> list[Result]:
    """All implementations side by side: each round times every one of them once."""
    sets = []
    for seed in range(ROTATING):
        arguments = workload.inputs(pattern, seed=seed)
        cotangent = np.random.default_rng(seed).normal(
            size=(*arguments["logits"].shape[:2], workload.heads * workload.head_size)
        )
        value, *rest = (jnp.asarray(x) for x in arguments.values())
        sets.append([value.astype(dtype), *rest, jnp.asarray(cotangent, dtype)])
    runs: dict[str, list[Callable]] = {}
    memory: dict[str, list[float | None]] = {}
    times: dict[str, tuple[list[float], list[float]]] = {}
    for name in implementations:
        runs[name], memory[name] = (
            torch_runs(workload, sets) if name == "torch" else jax_runs(workload, name, sets)
        )
        for run in runs[name]:
            run(0)
        if name == "torch" and jax.default_backend() == "cpu":
            memory[name] = [resident_growth(run) for run in runs[name]]
        times[name] = ([], [])
    for i in range(rounds):
        for name in implementations:
            for run, found in zip(runs[name], times[name], strict=True):
                begin = time.perf_counter()
                run(i)
                found.append((time.perf_counter() - begin) * 1e3)
    results = []
    for name in implementations:
        forward, both = (statistics.median(found) for found in times[name])
        values = workload.gathered_rows * workload.head_size
        gather = values * sets[0][0].dtype.itemsize / forward / 1e9
        spreads = [(min(found), max(found)) for found in times[name]]
        adds = values / (both - forward) / 1e6 if both > forward else None
        names = (workload.name, pattern, jnp.dtype(dtype).name, name)
        results.append(
            Result(
                *names,
                forward,
                spreads[0],
                both,
                spreads[1],
                memory[name][0],
                memory[name][1],
                gather,
                adds,
            )
        )
    return results


def table(results: list[Result]) -> list[str]:
    lines = [
        "| workload | points | values | implementation | forward ms (min-max) | both ms (min-max) "
        "| memory MiB | gather TB/s | G adds/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        forward, both = (
            f"{x:.2f} ({a:.2f}-{b:.2f})"
            for x, (a, b) in ((r.forward_ms, r.forward_spread), (r.both_ms, r.both_spread))
        )
        memory = " / ".join("?" if x is None else f"{x:.0f}" for x in (r.forward_mib, r.both_mib))
        names = " | ".join([r.workload, r.pattern, r.values, r.implementation])
        lines.append(
            f"| {names} | {forward} | {both} | {memory} | {r.gather_tb_s:.3g} | "
            f"{'?' if r.adds_g_s is None else f'{r.adds_g_s:.3g}'} |"
        )
    return lines


def hardware() -> dict[str, str]:
    """Where and with what this ran."""
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    cpu = pathlib.Path("/proc/cpuinfo")
    if device.platform == "cpu" and cpu.exists():
        found["device"] = cpu.read_text().split("model name\t: ")[1].split("\n")[0]
    return {**found, "cores": str(os.cpu_count()), "xla_flags": os.environ.get("XLA_FLAGS", "")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=DEFAULT_WORKLOADS,
        metavar="NAME",
        help=", ".join(WORKLOADS),
    )
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        help="default: xla, and what the model uses here",
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--torch", action="store_true", help="PyTorch's grid_sample formulation in the same rounds"
    )
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.md and OUTPUT.json")
    arguments = parser.parse_args()
    details = hardware()
    if arguments.torch:
        import torch

        details["torch"] = torch.__version__
    results = []
    for name in arguments.workloads:
        workload = WORKLOADS[name]
        shapes = {
            key: jax.ShapeDtypeStruct(shape, jnp.float32)
            for key, shape in workload.shapes().items()
        }
        best = chosen_implementation(shapes["value"], shapes["offsets"])
        implementations = arguments.implementations or list(dict.fromkeys(["xla", best]))
        for dtype in arguments.dtype:
            for pattern in arguments.patterns:
                print(f"{name}, {pattern}, {dtype} ...", flush=True)
                results += measure(
                    workload,
                    pattern,
                    dtype,
                    [*implementations, *(["torch"] if arguments.torch else [])],
                    arguments.rounds,
                )
    text = [
        "# Deformable attention",
        "",
        ", ".join(f"{key} {value}" for key, value in details.items() if value),
        "",
        *table(results),
    ]
    print("\n".join(text))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".md").write_text("\n".join(text) + "\n")
        record = {
            "hardware": details,
            "results": [dataclasses.asdict(result) for result in results],
        }
        arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
