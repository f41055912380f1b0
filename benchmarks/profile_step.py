"""Where the time of a training step goes, from jax's profiler: by part of the network, and by kind
of work.

    python -m benchmarks.profile_step --output=benchmarks/profile_step_cpu   # R50, 480x640, batch 1
    python -m benchmarks.profile_step --size 800x1066 --batch 8 --dtype bfloat16 \
        --output=benchmarks/profile_step_gpu

Milliseconds of a step, summed over the threads (CPU) or streams (GPU) that worked at the same time:
the columns do not add up to the time that passes, which stands above the table. A fused program
counts for the operation at its end.
"""

import collections
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from benchmarks.tables import device_line, make_parser, report, table
from benchmarks.training_step import build
from dsct_jax.config import read_config
from dsct_jax.model.layers import REMAT
from dsct_jax.training.halves import run_on_host
from dsct_jax.training.objective import match_on_host

PARTS = (
    "backbone",
    "encoder",
    "decoder",
    "heads",
    "matching",
    "losses",
    "optimizer",
)  # jax.named_scope in model/dsct.py and step.py
KINDS = (  # the first that is found; in a backbone, a convolution of 1x1 is an einsum
    ("deformable attention", r"deformable_attention"),
    ("convolutions", r"conv_general_dilated|convolution|bhwc,cd->bhwd"),
    ("matrix products", r"dot_general"),
    ("sums and maxima", r"reduce"),
    (
        "moved, not computed",
        r"transpose\)?$|transpose$|copy|reshape$|concatenate$|slice|broadcast|gather|split$|pad$",
    ),
)


def events(directory: Path) -> Iterator[tuple[str, str, float]]:
    """(module, operation, milliseconds without what ran inside it) of every operation of the
    programs in a recorded trace.
    """
    (path,) = directory.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            found = [
                (e.start_ns, e.start_ns + e.duration_ns, dict(e.stats))
                for e in line.events
                if not e.name.startswith("end: ")
            ]
            found = [(start, end, stats) for start, end, stats in found if "hlo_op" in stats]
            own: list[list] = []  # module, operation, nanoseconds
            open_: list[tuple[float, int]] = []  # end and number of what is still running
            for start, end, stats in sorted(found, key=lambda event: (event[0], -event[1])):
                while open_ and open_[-1][0] <= start:
                    open_.pop()
                if open_:
                    own[open_[-1][1]][2] -= end - start
                open_.append((end, len(own)))
                own.append([stats["hlo_module"], stats["hlo_op"], end - start])
            yield from ((module, operation, time_ / 1e6) for module, operation, time_ in own)


def places_of(text: str) -> dict[str, tuple[str, str]]:
    """Operation of a compiled program -> where in the model it comes from (a path), and what it is
    (its own path, or else operations inside it).

    An operation that the compiler made up, such as a copy, has the place of the nearest operand
    that has one, or else of the nearest user.
    """
    instructions = {
        m[1]: m[2] for m in re.finditer(r"^ +(?:ROOT )?%?([\w.\-]+) = (.*)$", text, re.MULTILINE)
    }
    bodies = {
        m[1]: m[2]
        for m in re.finditer(r"^%([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    }
    own = {
        name: m[1]
        for name, line in instructions.items()
        if " parameter(" not in line and (m := re.search(r'op_name="([^"]*)"', line))
    }
    operands = {
        name: [x for x in re.findall(r"%([\w.\-]+)", line.split("calls=")[0]) if x in instructions]
        for name, line in instructions.items()
    }
    users = collections.defaultdict(list)
    for name, used in operands.items():
        for other in used:
            users[other].append(name)

    def nearest(name: str, neighbours: Mapping[str, list[str]], steps: int = 4) -> str:
        around = [name]
        for _ in range(steps):
            around = [other for near in around for other in neighbours.get(near, ())]
            if found := next(
                (own[near] for near in around if part_of(own.get(near, "")) != "other"), ""
            ):
                return found
        return ""

    places = {}
    for name, line in instructions.items():
        body = (
            bodies.get(called[1], "") if (called := re.search(r"calls=%([\w.\-]+)", line)) else line
        )
        what = own.get(name) or " ".join(re.findall(r"([\w\-]+)\(", body))
        places[name] = own.get(name) or nearest(name, operands) or nearest(name, users), what
    return places


def part_of(path: str) -> str:
    """The named scope, or "other"."""
    return next((part for part in PARTS if re.search(rf"\b{part}\b", path)), "other")


def direction_of(path: str) -> str:
    """Whether an operation belongs to the forward pass, the backward pass, or to what the backward
    pass computes again.
    """
    if "rematted_computation" in path:
        return "again"
    return "backward" if "transpose(" in path else "forward"


def kind_of(what: str) -> str:
    """Which of KINDS an operation is, by its path or by what is inside."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, what)), "element by element")


def main() -> None:
    """Profiles, prints the tables, and writes them."""
    parser = make_parser("benchmarks.profile_step", __doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/emotic_r50.py"))
    parser.add_argument("--size", default="480x640", help="HEIGHTxWIDTH of the padded images")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--remat", choices=REMAT, help="default: the configuration's")
    parser.add_argument("--steps", type=int, default=3, help="recorded, after two that are not")
    args = parser.parse_args()
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # programs that come from it carry the scopes of whoever compiled them
    config = read_config(args.config)
    config["model"] |= {
        "compute_dtype": args.dtype,
        "remat": args.remat or config["model"]["remat"],
    }
    height, width = (int(side) for side in args.size.split("x"))
    step, state, batch = build(
        config, devices=1, size=(height, width), batch_size=args.batch, matcher="scipy"
    )
    first = step.first_half.lower(state, batch, None).compile()
    forward = first(state, batch, None)
    second = step.second_half.lower(
        state, forward, run_on_host(match_on_host, forward.problem), batch
    ).compile()
    places = {"predict": places_of(first.as_text()), "finish": places_of(second.as_text())}
    passed = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(2 + args.steps):
            if number == 2:
                jax.profiler.start_trace(directory)
            start = time.perf_counter()
            forward = first(state, batch, None)
            solved = run_on_host(match_on_host, forward.problem)
            state, terms = second(state, forward, solved, batch)
            del forward
            jax.block_until_ready((state, terms))
            passed.append(time.perf_counter() - start)
        jax.profiler.stop_trace()
        found = list(events(Path(directory)))
    by_part: collections.Counter[tuple[str, str]] = collections.Counter()
    by_kind: collections.Counter[tuple[str, str]] = collections.Counter()
    for module, operation, milliseconds in found:
        path, what = places["finish" if "finish" in module else "predict"].get(
            operation, ("", operation)
        )
        by_part[part_of(path), direction_of(path)] += milliseconds / args.steps
        by_kind[kind_of(what), direction_of(path)] += milliseconds / args.steps
    about = f"{args.size}, batch {args.batch}, {args.dtype}, remat {config['model']['remat']}"
    fastest, slowest = (1e3 * f(passed[2:]) for f in (min, max))
    text = [
        f"Training step of {args.config}, {about} ({device_line()}): {fastest:.0f} to "
        f"{slowest:.0f} ms. Milliseconds of work:"
    ]
    numbers = {}
    for name, labels, counted in (
        ("part", (*PARTS, "other"), by_part),
        ("kind", (*(kind for kind, _ in KINDS), "element by element"), by_kind),
    ):
        directions = ("forward", "again", "backward")
        numbers[name] = {
            label: [counted[label, direction] for direction in directions] for label in labels
        }
        rows = [
            (label, *(f"{x:.0f}" for x in (*ms, sum(ms))), f"{sum(ms) / counted.total():.0%}")
            for label, ms in numbers[name].items()
        ]
        text.append(table((name, *directions, "all", "share"), rows))
    report("\n\n".join(text), numbers, args.output)


if __name__ == "__main__":
    main()
