"""The paper's ablations as one command: trains and evaluates every row of a table with several
seeds, and prints it beside the paper's numbers.

    python -m benchmarks.ablate --table=6 --config=configs/demo.py --seeds=0,1,2 \
        --output=runs/ablations [--config.train.epochs=6 ...]

Rows are runs of train.py in OUTPUT/<setting>/seed<n>: the same command again skips finished ones,
continues an unfinished one from its checkpoint, and with --report prints the table from what there
is. Tables share the rows they have in common. --rows=baseline,both keeps the rows
whose name holds one of these words, for a larger budget or another setting of a few rows.
--launch='nice -n 5' (or srun ...) is put before each run.
"""

import dataclasses
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cues import accuracy_by_cue
from benchmarks.paper_tables import TABLES, Row, Table, network_section, paper_table
from data.command import override
from data.config import SPLITS
from dsct_jax.cli import Parser, run_command
from dsct_jax.config import differences, read_config, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.model.build import Network, network_config
from train import RunConfig

ROOT = Path(__file__).parent.parent
SCENE_LEVELS = (
    "known limits of the scenes: guessing 25 %, the face alone 62.5 %, face and what is near 85 %, "
    "everything 100 %"
)

_Measured = dict[str, list[float]]  # column -> percent of each seed


@dataclasses.dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: Row
    seed: int
    config: dict[str, Any]
    workdir: Path

    def is_finished(self, split: str) -> bool:
        """Whether it was evaluated; raises UserError where the directory holds a run with other
        settings.
        """
        settings = self.workdir / "config.json"
        if not settings.is_file():
            return False
        if changed := [
            text
            for text in differences(to_builtins(json.loads(settings.read_text())), self.config)
            if not text.startswith("name:")
        ]:
            raise UserError(
                f"{self.workdir}: holds a run with other settings (config.{changed[0]}); remove "
                "it, or choose another --output"
            )
        return (self.workdir / f"metrics_{split}.json").is_file() and (
            self.workdir / f"predictions_{split}.npz"
        ).is_file()


def row_config(config: Mapping[str, Any], row: Row, seed: int) -> dict[str, Any]:
    """The complete configuration of a row. Raises UserError for a value that the model does not
    accept.
    """
    changed = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()
    }
    changed["seed"] = seed
    if network := row.changes.get("model.name"):
        changed["model"] = network_section(network, config["model"])
    for name, value in row.changes.items():
        section, field = name.split(".")
        changed[section][field] = value
    try:
        RunConfig.from_mapping(changed)
    except UserError as error:
        raise UserError(f"row {row.name!r}: {error}") from None
    return changed


def choose_rows(table: Table, words: str) -> Table:
    """The table with the rows whose name holds one of the words ('baseline,both'); '' keeps all.
    Raises UserError for a word in no name.
    """
    wanted = words.split(",") if words else [""]
    if unknown := [word for word in wanted if not any(word in row.name for row in table.rows)]:
        raise UserError(
            f"--rows={words}: {unknown[0]!r} is in no name of this table's rows: "
            f"{'; '.join(row.name for row in table.rows)}"
        )
    return dataclasses.replace(
        table, rows=tuple(row for row in table.rows if any(word in row.name for word in wanted))
    )


def make_runs(
    table: Table, config: Mapping[str, Any], *, seeds: Sequence[int], output: Path
) -> list[Run]:
    """All runs of a table, seed after seed, so that a table is complete early; each is checked
    before the first starts.
    """
    return [
        Run(row, seed, row_config(config, row, seed), output / row.key / f"seed{seed}")
        for seed in seeds
        for row in table.rows
    ]


def train_and_evaluate(
    run: Run, *, split: str, launch: Sequence[str], boxes: Sequence[str] = ()
) -> None:
    """Two processes of train.py, and an evaluation for each flag of `boxes`; their output goes to
    OUTPUT/<setting>/seed<n>.log.

    Raises:
        UserError: one of them failed; the line ends with its last one.
    """
    run.workdir.parent.mkdir(parents=True, exist_ok=True)
    settings, log = (
        run.workdir.parent / f"seed{run.seed}.json",
        run.workdir.parent / f"seed{run.seed}.log",
    )
    settings.write_text(json.dumps(run.config, indent=1) + "\n")
    command = [
        *launch,
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={settings}",
        f"--workdir={run.workdir}",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    with log.open("a") as file:
        evaluate = ["--mode=eval", f"--split={split}"]
        for extra in ([], evaluate, *([*evaluate, flag] for flag in boxes)):
            try:
                done = subprocess.run(
                    [*command, *extra],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    check=False,
                )
            except OSError as error:
                raise UserError(
                    f"--launch={shlex.join(launch)}: {error.strerror or error}"
                ) from None
            if done.returncode:
                last = (log.read_text().splitlines() or ["no output"])[-1]
                raise UserError(
                    f"row {run.row.name!r}, seed {run.seed}: train.py ended with status "
                    f"{done.returncode}: {last} (all of it: {log})"
                )


def measure(run: Run, *, split: str, by_people: bool) -> dict[str, float]:
    """Column -> percent of one finished run; the first column is the metric of the task (mAP or
    accuracy).
    """
    metrics = json.loads((run.workdir / f"metrics_{split}.json").read_text())
    metric, multi_label = ("mAP", True) if run.config["multi_label"] else ("accuracy", False)
    if by_people:
        return {
            people: 100 * bucket[metric]
            for people, bucket in metrics["buckets"].items()
            if metric in bucket
        }
    found = {metric: 100 * metrics[metric]}
    if run.config["data"]["source"] == "scenes" and not multi_label:
        found |= {cue: 100 * value for cue, value in accuracy_by_cue(run.workdir, split).items()}
    return found | {"box IoU": 100 * metrics["mean_iou"]}


def log_entries(run: Run) -> list[dict[str, Any]]:
    """The lines of its metrics.jsonl."""
    lines = (run.workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def step_seconds(run: Run) -> list[float]:
    """The median time of a step, in each interval that was logged."""
    p50 = "time/step_seconds_p50"
    return [entry[p50] for entry in log_entries(run) if p50 in entry]


def parameters(run: Run) -> float:
    """Thousands of them, without what is frozen in every case."""
    network = Network(network_config(run.config["model"], len(run.config["class_names"])))
    return sum(map(math.prod, network.param_shapes.values())) / 1000


def costs(run: Run, reach: float) -> dict[str, float]:
    """What a finished run took: thousands of parameters, milliseconds of a step (median), and
    epochs to the first validation that is right for the share `reach`, where one was.
    """
    entries = log_entries(run)
    found = {
        "k parameters": parameters(run),
        "ms per step": 1000 * statistics.median(step_seconds(run)),
    }
    metric = "val/mAP" if run.config["multi_label"] else "val/accuracy"
    steps = [entry["step"] for entry in entries if entry.get(metric, 0) >= reach]
    if steps:
        share = min(steps) / max(entry["step"] for entry in entries)
        found[f"epochs to {100 * reach:.0f} %"] = share * run.config["train"]["epochs"]
    return found


def collect(table: Table, runs: Sequence[Run], *, split: str) -> dict[str, _Measured]:
    """Row key -> column -> one value for each finished seed."""
    found: dict[str, _Measured] = {row.key: {} for row in table.rows}
    for run in runs:
        if run.is_finished(split):
            values = measure(run, split=split, by_people=table.by_people)
            if table.reach:
                values |= costs(run, table.reach)
            for column, value in values.items():
                found[run.row.key].setdefault(column, []).append(value)
    return found


def summary(values: Sequence[float]) -> str:
    """'91.2 ± 0.4', the spread being the sample standard deviation over the seeds; a single run has
    none.
    """
    if not values:
        return "-"
    return f"{statistics.fmean(values):.1f}" + (
        f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    )


def format_markdown(
    table: Table, measured: Mapping[str, _Measured], *, notes: Sequence[str]
) -> str:
    """The table in percent: ours (mean ± standard deviation over the seeds) beside the paper's
    numbers.
    """
    ours = list(dict.fromkeys(column for row in measured.values() for column in row))
    papers = list(dict.fromkeys(column for row in table.rows for column in row.paper))
    head = [
        table.title.partition(":")[0],
        "seeds",
        *ours,
        *(f"paper: {column}" for column in papers),
    ]
    lines = [table.title, "", " | ".join(head), " | ".join(["---"] * len(head))]
    for row in table.rows:
        values = measured[row.key]
        seeds = max(map(len, values.values()), default=0)
        cells = [row.name, str(seeds), *(summary(values.get(column, ())) for column in ours)]
        lines.append(
            " | ".join(
                [
                    *cells,
                    *(
                        f"{row.paper[column]:.2f}" if column in row.paper else "-"
                        for column in papers
                    ),
                ]
            )
        )
    return "\n".join([*lines[:2], *(f"| {line} |" for line in lines[2:]), "", *notes])


def chance_levels(runs: Sequence[Run], *, split: str) -> list[str]:
    """What the numbers have to be compared with."""
    finished = next((run for run in runs if run.is_finished(split)), None)
    if finished is None:
        return ["no run is finished yet"]
    metrics = json.loads((finished.workdir / f"metrics_{split}.json").read_text())
    name, level = (
        ("a constant prediction", "chance_mAP")
        if finished.config["multi_label"]
        else ("the most frequent class", "majority_accuracy")
    )
    notes = [
        f"{split} split: {metrics['num_images']} images, {metrics['num_people']} people; {name}: "
        f"{100 * metrics[level]:.1f} %"
    ]
    scenes = finished.config["data"]["source"] == "scenes" and not finished.config["multi_label"]
    return notes + [SCENE_LEVELS] * scenes


def parse_seeds(text: str) -> tuple[int, ...]:
    """'0,1,2' -> (0, 1, 2)."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(
            f"--seeds={text}: must be whole numbers with commas between them, none twice, such as "
            "0,1,2"
        )
    return tuple(int(part) for part in parts)


def make_parser() -> Parser:
    """The command's own flags; --config.FIELD=VALUE changes the configuration of every row."""
    parser = Parser(prog="python -m benchmarks.ablate", description=__doc__)
    parser.add_argument("--table", required=True, help=f"of the paper: {', '.join(TABLES)}")
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="what the rows are changes of, such as configs/demo.py",
    )
    parser.add_argument(
        "--rows",
        default="",
        help="words with commas between them: the rows whose name holds one of them; default: all",
    )
    parser.add_argument("--seeds", default="0,1,2", help="a run each; default: 0,1,2")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="directory of the runs, shared by all tables of one budget",
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="what the rows are compared on"
    )
    parser.add_argument("--launch", default="", help="command put before each run")
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing; print the table from the finished runs",
    )
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Runs the command: trains what is missing, prints the table, writes it to
    OUTPUT/table<name>.md and .json.
    """
    arguments, overrides = make_parser().parse_known_args(argv)
    config = override(read_config(arguments.config), overrides)
    table = choose_rows(paper_table(arguments.table, config), arguments.rows)
    seeds, split = parse_seeds(arguments.seeds), arguments.split
    runs = make_runs(table, config, seeds=seeds, output=arguments.output)
    missing = [] if arguments.report else [run for run in runs if not run.is_finished(split)]
    print(
        f"{table.title}: {len(table.rows)} rows x {len(seeds)} seeds, {len(missing)} of "
        f"{len(runs)} runs to do",
        flush=True,
    )
    started = time.monotonic()
    for number, one in enumerate(missing, 1):
        print(
            f"[{number}/{len(missing)}, {time.monotonic() - started:.0f} s] {one.row.name}, seed "
            f"{one.seed}: {one.workdir}",
            flush=True,
        )
        train_and_evaluate(one, split=split, launch=shlex.split(arguments.launch))
    measured = collect(table, runs, split=split)
    text = format_markdown(table, measured, notes=chance_levels(runs, split=split))
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = f"table{arguments.table}".replace("tablefigure", "figure")
    (arguments.output / f"{stem}.md").write_text(text + "\n")
    numbers = {
        row.name: {"changes": row.changes, "paper": dict(row.paper), "ours": measured[row.key]}
        for row in table.rows
    }
    (arguments.output / f"{stem}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\n{text}\n\nwritten: {arguments.output / stem}.md and .json")


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(None)))
