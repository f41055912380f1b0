"""One stage or two, on the same people, in the same training time, with the same judge.

    python -m benchmarks.one_stage_or_two --config=configs/faces_single.py --minutes=10 \
        --seeds=0,1,2 --output=runs/one_or_two [--config.data.data_dir=DIR ...]

DSCT as configured, DSCT without context queries, and each two-stage network with the annotated
boxes (given) and with those that DSCT of the same seed finds (found). Every network trains for
--minutes of its own steps, whose time is measured first, on the data and with the augmentation of
--config; optimizer, losses and crops of a two-stage network are those of its own configuration,
batches of at most --largest-batch people. Runs are kept in OUTPUT as those of
benchmarks.ablate: the same command again goes on where it stopped. Writes
OUTPUT/one_stage_or_two.md, .json and .png.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablate import (
    Run,
    chance_levels,
    parameters,
    parse_seeds,
    row_config,
    step_seconds,
    summary,
)
from benchmarks.ablate import train_and_evaluate as train
from benchmarks.paper_tables import Row
from benchmarks.tables import hardware, in_words, report, table
from data.command import override
from dsct_jax.cli import Parser, progress, run_command
from dsct_jax.config import read_config, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.inference.load import load
from dsct_jax.inference.predict import predict
from dsct_jax.model.build import NETWORKS
from train import RunConfig, build_dataset

CONFIGS = Path(__file__).parent.parent / "configs"
TWO_STAGE = "caer_net_s,glamor_net,emo_net"
ONE_STAGE = {"dsct": {}, "dsct_without_context": {"model.num_context_queries": 0}}
MEASURED_STEPS = 80
TIMED_IMAGES = 20
GIVEN, FOUND = "given", "found"


def two_stage_row(name: str, config: Mapping[str, Any], *, largest_batch: int) -> Row:
    """What configs/<name>.py says of network, losses and optimizer, on the data of `config`."""
    if not (CONFIGS / f"{name}.py").is_file():
        raise UserError(f"--two-stage={name}: there is no configs/{name}.py")
    own = to_builtins(read_config(CONFIGS / f"{name}.py"))
    if own["model"]["name"] != "two_stage":
        raise UserError(f"--two-stage={name}: configs/{name}.py is no two-stage network")
    changes = {
        f"{section}.{field}": value
        for section in ("model", "optimizer", "loss")
        for field, value in own[section].items()
    }
    if not config["multi_label"]:
        changes["loss.class_loss"] = "cross_entropy"  # EMO-Net's squares are for several labels
    changes["train.batch_size"] = min(own["train"]["batch_size"], largest_batch)
    return Row(name, changes, key=name)


def steps_of(row: Row, config: Mapping[str, Any], arguments: Any) -> int:
    """How many steps of a row fit into --minutes, by the shortest time that one took."""
    timing = {"train.steps": MEASURED_STEPS, "train.log_every": MEASURED_STEPS // 8}
    trial = Row(row.name, row.changes | timing, key=row.key)
    run = Run(trial, 0, row_config(config, trial, 0), arguments.output / "timing" / row.key)
    if not run.is_finished(arguments.split):
        train(run, split=arguments.split, launch=shlex.split(arguments.launch))
    return max(1, round(60 * arguments.minutes / min(step_seconds(run))))


def train_all(rows: Sequence[Row], config: Mapping[str, Any], arguments: Any) -> list[Run]:
    """The finished runs of every row and seed; those of one seed find people for each other."""
    runs = []
    budgets = {row.key: steps_of(row, config, arguments) for row in rows}
    launch, split = shlex.split(arguments.launch), arguments.split
    for seed in parse_seeds(arguments.seeds):
        finder = arguments.output / "dsct" / f"seed{seed}"
        for row in rows:
            budget = Row(row.name, row.changes | {"train.steps": budgets[row.key]}, key=row.key)
            workdir = arguments.output / row.key / f"seed{seed}"
            run = Run(budget, seed, row_config(config, budget, seed), workdir)
            found = [] if row.key in ONE_STAGE else [f"--boxes={finder}"]
            last = workdir / f"metrics_{split}{'_found' * bool(found)}.json"
            if not (run.is_finished(split) and last.is_file()):
                print(f"seed {seed}: {row.name}, {budgets[row.key]} steps: {workdir}", flush=True)
                train(run, split=split, launch=launch, boxes=found)
            runs.append(run)
    return runs


def measure(run: Run, boxes: str, split: str) -> dict[str, float]:
    """Column -> percent of one finished run with boxes of that kind."""
    suffix = f"_{split}_found" if boxes == FOUND else f"_{split}"
    metrics = json.loads((run.workdir / f"metrics{suffix}.json").read_text(encoding="utf-8"))
    metric = "mAP" if run.config["multi_label"] else "accuracy"
    values = {metric: metrics[metric]}
    if not run.config["multi_label"]:
        values["macro F1"] = metrics["macro_f1"]
    if not boxes:
        values["box IoU"] = metrics["mean_iou"]
    buckets = {
        f"{people} in image": bucket[metric]
        for people, bucket in metrics["buckets"].items()
        if metric in bucket
    }
    if len(buckets) > 1:
        values |= buckets
    return {name: 100 * value for name, value in values.items()}


def milliseconds(run: Run, finder: Path, split: str) -> float:
    """Of one image from pixels to people, the median without the first; a two-stage network's with
    the run in `finder` that finds the people.
    """
    data = build_dataset(RunConfig.from_mapping(run.config), split, training=False)
    images = [record.load() for record in data.records[: TIMED_IMAGES + 1]]
    model, two_stage = load(run.workdir), run.row.key not in ONE_STAGE
    detector = load(finder) if two_stage else model
    times = []
    for image in images:
        started = time.perf_counter()
        people = predict(detector, image)
        if two_stage and people:
            predict(model, image, boxes=[person.box for person in people])
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[1:])


def draw(lines: Mapping[tuple[str, str], Mapping[str, list[float]]], metric: str, path: Path):
    """A bar for each network and kind of boxes, with the seeds as dots."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 0.5 * len(lines) + 1), layout="constrained")
    axes = figure.subplots()
    color = {"": "tab:blue", GIVEN: "tab:green", FOUND: "tab:orange"}
    for place, ((_, boxes), values) in enumerate(lines.items()):
        seeds = values[metric]
        axes.barh(place, statistics.fmean(seeds), color=color[boxes], alpha=0.6)
        axes.plot(seeds, [place] * len(seeds), "k.")
    labels = [f"{name}, boxes {boxes}" if boxes else name for name, boxes in lines]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} (%), dots: seeds")
    figure.savefig(path, dpi=150)


def make_parser() -> Parser:
    """The command's flags; --config.FIELD=VALUE changes the configuration of every network."""
    parser = Parser(prog="python -m benchmarks.one_stage_or_two", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="DSCT and the data")
    parser.add_argument("--minutes", type=float, required=True, help="of training, per network")
    parser.add_argument("--two-stage", default=TWO_STAGE, help=f"of configs/; default: {TWO_STAGE}")
    parser.add_argument("--largest-batch", type=int, default=32)
    parser.add_argument("--seeds", default="0,1,2", help="a run each; default: 0,1,2")
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--split", default="test", help="what is compared on; default: test")
    parser.add_argument("--launch", default="", help="command put before each run")
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Runs the command."""
    arguments, overrides = make_parser().parse_known_args(argv)
    config = to_builtins(override(read_config(arguments.config), overrides))
    if "num_context_queries" not in NETWORKS[config["model"]["name"]].config.__dataclass_fields__:
        raise UserError(f"--config={arguments.config}: must be one of DSCT, to be compared with")
    rows = [Row(name, changes, key=name) for name, changes in ONE_STAGE.items()]
    for name in filter(None, arguments.two_stage.split(",")):
        rows.append(two_stage_row(name, config, largest_batch=arguments.largest_batch))
    runs = train_all(rows, config, arguments)
    lines: dict[tuple[str, str], dict[str, list[float]]] = {}
    costs = {
        one.row.key: {
            "steps": one.config["train"]["steps"],
            "k parameters": parameters(one),
            "ms per image": milliseconds(one, arguments.output / "dsct/seed0", arguments.split),
        }
        for one in progress(runs[: len(rows)], what="timing", unit="network")
    }
    for one in runs:
        for boxes in ("",) if one.row.key in ONE_STAGE else (GIVEN, FOUND):
            values = lines.setdefault((one.row.name, boxes), {})
            for column, value in measure(one, boxes, arguments.split).items():
                values.setdefault(column, []).append(value)
    columns = list(dict.fromkeys(column for values in lines.values() for column in values))
    head = ["network", "boxes", *columns, *next(iter(costs.values()))]
    body = [
        [name, boxes or "its own", *(summary(values.get(column, ())) for column in columns)]
        + [f"{cost:,.0f}" if cost >= 10 else f"{cost:.1f}" for cost in costs[name].values()]
        for (name, boxes), values in lines.items()
    ]
    seeds, budget = arguments.seeds, f"{arguments.minutes:g} minutes of training steps each"
    notes = [f"{budget}, seeds {seeds}; {in_words(hardware())}"]
    notes += chance_levels(runs, split=arguments.split)
    text = "\n\n".join(["# One stage or two", table(head, body), *notes])
    numbers = {f"{name} {boxes}".strip(): values for (name, boxes), values in lines.items()}
    output = arguments.output / "one_stage_or_two"
    report(text, {"percent": numbers, "costs": costs, "notes": notes}, output)
    draw(lines, columns[0], output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(None)))
