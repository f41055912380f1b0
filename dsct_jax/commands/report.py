"""What a run has learnt so far, for people: curves.png and metrics.md from its metrics.jsonl.

python -m dsct_jax report runs/demo
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsct_jax.cli import Parser, run_command
from dsct_jax.errors import UserError
from dsct_jax.evaluation.report import format_table

Series = tuple[list[int], list[float]]  # steps, values

LOSSES = {"loss_class": "#D55E00", "loss_bbox": "#0072B2", "loss_giou": "#009E73"}
METRICS = {
    "mean_iou": "#0072B2",
    "mAP": "#D55E00",
    "accuracy": "#009E73",
    "macro_f1": "#CC79A7",
}  # on one axis, 0 to 1
LEVELS = {
    "chance_mAP": "mAP of chance",
    "majority_accuracy": "accuracy of the commonest class",
}  # dashed lines
LOWER_IS_BETTER = ("total", "loss", "error", "ece", "brier")


def read_metrics(path: Path) -> dict[str, Series]:
    """Name -> (steps, values) of every number in a run's metrics.jsonl; a last line cut short by a
    kill is left out.

    Raises:
        UserError: the file is missing, holds nothing, or a line before the last is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the --workdir of a run of train.py")
    lines = path.read_text().splitlines()
    series: dict[str, Series] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            step = entry.pop("step")
        except (json.JSONDecodeError, KeyError, AttributeError):
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: not a JSON object with a step; remove the line"
            ) from None
        for name, value in entry.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(value))
    if not series:
        raise UserError(f"{path}: holds no metrics yet")
    return series


def draw_curves(series: Mapping[str, Series], path: Path, *, title: str) -> None:
    """Total loss, the terms of the last decoder layer, and the validation metrics, side by side in
    one PNG.
    """
    figure = Figure(figsize=(16, 4.8), dpi=120, layout="constrained")
    total, terms, metrics = figure.subplots(1, 3)
    figure.suptitle(title, fontsize=15)
    if "train/total" in series:
        _plot(total, series["train/total"], color="black", label="total")
        total.set_yscale("log" if min(series["train/total"][1]) > 0 else "linear")
    for name, color in LOSSES.items():
        if f"train/{name}" in series:
            _plot(terms, series[f"train/{name}"], color=color, label=name.removeprefix("loss_"))
    for name, color in METRICS.items():
        if f"val/{name}" in series:
            _plot(metrics, series[f"val/{name}"], color=color, label=name, marker="o")
    for (name, text), color in zip(
        LEVELS.items(), (METRICS["mAP"], METRICS["accuracy"]), strict=True
    ):
        if f"val/{name}" in series:
            metrics.axhline(series[f"val/{name}"][1][-1], color=color, linestyle="--", label=text)
    metrics.set_ylim(0, 1)
    for axes, heading in (
        (total, "Training loss, all layers"),
        (terms, "Training loss terms, last layer"),
        (metrics, "Validation"),
    ):
        axes.set_title(heading, fontsize=14)
        axes.set_xlabel("step", fontsize=13)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=12)
        else:
            axes.text(
                0.5, 0.5, "nothing logged yet", ha="center", transform=axes.transAxes, fontsize=13
            )
    figure.savefig(path)


def _plot(axes: Axes, series: Series, *, color: str, label: str, marker: str | None = None) -> None:
    steps, values = series
    axes.plot(
        steps,
        values,
        color=color,
        label=label,
        linewidth=2,
        marker="o" if len(steps) == 1 else marker,
        markersize=5,
    )


def metrics_table(series: Mapping[str, Series]) -> str:
    """A Markdown table of the validation metrics (first, last, best with its step), then one of the
    last training numbers.
    """
    validation = {
        name.removeprefix("val/"): values
        for name, values in series.items()
        if name.startswith("val/")
    }
    lines: list[str] = []
    if validation:
        lines += ["| validation | first | last | best | at step |", "|---|---:|---:|---:|---:|"]
        for name, (steps, values) in validation.items():
            best = (
                int((np.nanargmin if name.startswith(LOWER_IS_BETTER) else np.nanargmax)(values))
                if not np.isnan(values).all()
                else -1
            )
            lines.append(
                f"| {name} | {values[0]:.4f} | {values[-1]:.4f} | {values[best]:.4f} | "
                f"{steps[best]} |"
            )
        lines.append("")
    training = {name: values for name, values in series.items() if not name.startswith("val/")}
    if training:
        lines += ["| training | first | last |", "|---|---:|---:|"]
        lines += [
            f"| {name} | {values[0]:.4g} | {values[-1]:.4g} |"
            for name, (_, values) in training.items()
        ]
        lines.append("")
    return "\n".join(lines)


def write_report(workdir: Path) -> list[Path]:
    """Writes curves.png and metrics.md (with the tables of every metrics_<split>.json of
    --mode=eval) into a run's folder; returns their paths.
    """
    series = read_metrics(workdir / "metrics.jsonl")
    curves, table = workdir / "curves.png", workdir / "metrics.md"
    draw_curves(series, curves, title=workdir.resolve().name)
    text = [f"# {workdir.resolve().name}", "", metrics_table(series)]
    for evaluated in sorted(workdir.glob("metrics_*.json")):
        split = evaluated.stem.removeprefix("metrics_")
        text += [
            f"## Evaluated on the {split} split",
            "",
            format_table(json.loads(evaluated.read_text())),
            "",
        ]
    table.write_text("\n".join(text))
    return [curves, table]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one line on stderr and exit status 2."""
    parser = Parser(prog="python -m dsct_jax report", description=__doc__)
    parser.add_argument("workdir", type=Path, help="the --workdir of a run")
    return run_command(
        lambda: print("\n".join(map(str, write_report(parser.parse_args(argv).workdir))))
    )
