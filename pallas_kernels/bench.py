"""Time deformable attention where jax runs, from a checkout: `python -m pallas_kernels.bench`, with
`--torch` beside PyTorch's grid_sample formulation.

For each workload, pattern of points and implementation: milliseconds of the forward pass and of
forward and backward together (median and spread of interleaved rounds over rotating inputs),
temporary memory, and the rate of the work itself: rows gathered in TB/s (forward) and float32
additions into the gradient of the values in G/s (from the difference). Writes a table and JSON.
"""

import dataclasses
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tables import hardware, in_words, make_parser, report, table
from pallas_kernels.deformable_attention import IMPLEMENTATIONS, chosen_implementation
from pallas_kernels.workloads import PATTERNS, WORKLOADS, Workload

DEFAULT_WORKLOADS = ("encoder_800x1066", "encoder_480x640", "decoder_304")
COLUMNS = (
    "workload", "points", "values", "implementation", "forward ms (min-max)", "both ms (min-max)",
    "memory MiB", "gather TB/s", "G adds/s",
)  # fmt: skip
ROTATING = 6  # input sets, so that a GPU's cache does not keep one
Runs = tuple[list[Callable], list[float | None]]


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
    # temporary memory of the compiled program, or PyTorch's growth of resident memory
    forward_mib: float | None
    both_mib: float | None
    gather_tb_s: float
    adds_g_s: float | None  # None: lost in the spread

    def cells(self) -> list[str]:
        """Of its table row."""
        pairs = ((self.forward_ms, self.forward_spread), (self.both_ms, self.both_spread))
        times = [f"{ms:.2f} ({low:.2f}-{high:.2f})" for ms, (low, high) in pairs]
        memory = ["?" if x is None else f"{x:.0f}" for x in (self.forward_mib, self.both_mib)]
        rates = ["?" if x is None else f"{x:.3g}" for x in (self.gather_tb_s, self.adds_g_s)]
        names = [self.workload, self.pattern, self.values, self.implementation]
        return [*names, *times, " / ".join(memory), *rates]


def jax_runs(workload: Workload, implementation: str, groups: list) -> Runs:
    """Two functions of a group's number (forward; both passes), and the temporary memory in MiB."""
    attend = IMPLEMENTATIONS[implementation].deformable_attention_from_offsets

    def forward(value, reference_points, offsets, logits, _):
        return attend(value, workload.spatial_shapes, reference_points, offsets, logits)

    def both(value, reference_points, offsets, logits, cotangent):
        def of_differentiated(value, offsets, logits):
            return forward(value, reference_points, offsets, logits, None)

        out, pullback = jax.vjp(of_differentiated, value, offsets, logits)
        return out, pullback(cotangent)

    def of_group(f):
        one = jax.jit(f)  # traced once, not per set
        return lambda group: [one(*arguments) for arguments in group]

    compiled = [jax.jit(of_group(f)).lower(groups[0]).compile() for f in (forward, both)]
    runs = [
        lambda i, run=run: jax.block_until_ready(run(groups[i % len(groups)])) for run in compiled
    ]
    analyses = [run.memory_analysis() for run in compiled]
    return runs, [None if found is None else found.temp_size_in_bytes / 2**20 for found in analyses]


def torch_runs(workload: Workload, groups: list) -> Runs:
    """The same for the released ms_deform_attn_core_pytorch, softmax and locations included."""
    import torch
    from torch.nn.functional import grid_sample

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, groups[0][0][0].dtype.name)
    groups = jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float32), device=device), groups)
    shapes = workload.spatial_shapes
    sizes = torch.tensor(shapes, dtype=torch.float32, device=device).flip(-1)  # (width, height)

    def attend(value, reference_points, offsets, logits):
        b, _, n, d = value.shape
        q, l, p = offsets.shape[1], offsets.shape[3], offsets.shape[4]
        grids = 2 * (reference_points[:, :, None, :, None] + offsets / sizes[:, None]) - 1
        weights = torch.softmax(logits.reshape(b, q, n, l * p), -1)
        weights = weights.transpose(1, 2).reshape(b * n, 1, q, l * p)
        samples = []
        parts = value.split([height * width for height, width in shapes], 1)
        for level, (shape, part) in enumerate(zip(shapes, parts, strict=True)):
            image = part.flatten(2).transpose(1, 2).reshape(b * n, d, *shape)
            grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1).to(image.dtype)
            samples.append(grid_sample(image, grid, "bilinear", "zeros", align_corners=False))
        out = (torch.stack(samples, -2).flatten(-2) * weights.to(image.dtype)).sum(-1)
        return out.view(b, n * d, q).transpose(1, 2)

    def forward(value, reference_points, offsets, logits, _):
        with torch.no_grad():
            return attend(value.to(dtype), reference_points, offsets, logits)

    def both(value, reference_points, offsets, logits, cotangent):
        leaves = [x.clone().requires_grad_() for x in (value.to(dtype), offsets, logits)]
        out = attend(leaves[0], reference_points, *leaves[1:])
        return out.detach(), torch.autograd.grad(out, leaves, cotangent.to(out.dtype))

    def of_group(f):
        def run(i):
            found = [f(*arguments) for arguments in groups[i % len(groups)]]
            if device == "cuda":
                torch.cuda.synchronize()
            return found

        return run

    return [of_group(forward), of_group(both)], [None, None]


def resident_growth(run: Callable) -> float:
    """MiB by which this process's resident memory peaks above its start in `run` (Linux)."""
    status = pathlib.Path("/proc/self/status")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    run(0)
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1024


def make_inputs(workload: Workload, pattern: str, dtype) -> list[list[jax.Array]]:
    """ROTATING sets of value, reference points, offsets, logits and cotangent."""
    sets = []
    for seed in range(ROTATING):
        value, *rest = (jnp.asarray(x) for x in workload.inputs(pattern, seed=seed).values())
        shape = (*workload.shapes()["logits"][:2], workload.heads * workload.head_size)
        cotangent = jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
        sets.append([value.astype(dtype), *rest, cotangent])
    return sets


def measure(
    workload: Workload, pattern: str, dtype, implementations: list[str], rounds: int
) -> list[Result]:
    """All implementations side by side: each round times every one of them once."""
    sets = make_inputs(workload, pattern, dtype)
    # a GPU works through all sets in one call, in one stream: launching is not what is measured
    per_call = len(sets) if jax.default_backend() == "gpu" else 1
    groups = [sets[i : i + per_call] for i in range(0, len(sets), per_call)]
    runs: dict[str, list[Callable]] = {}
    memory: dict[str, list[float | None]] = {}
    times: dict[str, tuple[list[float], list[float]]] = {}
    for name in implementations:
        made = torch_runs(workload, groups) if name == "torch" else jax_runs(workload, name, groups)
        runs[name], memory[name] = made
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
                found.append((time.perf_counter() - begin) * 1e3 / per_call)
    values = workload.gathered_rows * workload.head_size
    results = []
    for name in implementations:
        forward, both = (statistics.median(found) for found in times[name])
        spreads = [(min(found), max(found)) for found in times[name]]
        names = (workload.name, pattern, jnp.dtype(dtype).name, name)
        gather = values * sets[0][0].dtype.itemsize / forward / 1e9
        adds = values / (both - forward) / 1e6 if both > forward else None
        measured = (forward, spreads[0], both, spreads[1])
        first, second = memory[name]
        results.append(Result(*names, *measured, first, second, gather, adds))
    return results


def main() -> None:
    """Measures, prints the table, and writes it with the numbers."""
    parser = make_parser("pallas_kernels.bench", __doc__)
    flag = functools.partial(parser.add_argument, nargs="+")
    names = ", ".join(WORKLOADS)
    flag("--workloads", choices=WORKLOADS, default=DEFAULT_WORKLOADS, metavar="NAME", help=names)
    flag("--patterns", choices=PATTERNS, default=PATTERNS)
    best = "default: xla, and what the model uses here"
    flag("--implementations", choices=IMPLEMENTATIONS, help=best)
    flag("--dtype", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch", action="store_true", help="PyTorch's in the same rounds")
    arguments = parser.parse_args()
    details = hardware()
    if arguments.torch:
        import torch

        details["torch"] = torch.__version__
    results = []
    for workload in (WORKLOADS[name] for name in arguments.workloads):
        given = {
            x: jax.ShapeDtypeStruct(workload.shapes()[x], jnp.float32) for x in ("value", "offsets")
        }
        best = chosen_implementation(given["value"], given["offsets"])
        implementations = arguments.implementations or list(dict.fromkeys(["xla", best]))
        implementations = [*implementations, *(["torch"] if arguments.torch else [])]
        for dtype in arguments.dtype:
            for pattern in arguments.patterns:
                print(f"{workload.name}, {pattern}, {dtype} ...", flush=True)
                results += measure(workload, pattern, dtype, implementations, arguments.rounds)
    rows = table(COLUMNS, (result.cells() for result in results))
    numbers = {"hardware": details, "results": [dataclasses.asdict(result) for result in results]}
    report(f"# Deformable attention\n\n{in_words(details)}\n\n{rows}", numbers, arguments.output)


if __name__ == "__main__":
    main()
