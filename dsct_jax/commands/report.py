"""What a run has learned so far: curves.png and metrics.md from its metrics.jsonl."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsct_jax.errors import UserError
from dsct_jax.evaluation.evaluate import LOWER_IS_BETTER
from dsct_jax.evaluation.report import format_table
from dsct_jax.visualization.drawing import BLUE, GREEN, PINK, VERMILION

Series = tuple[list[int], list[float]]  # steps, values

LOSSES = {"loss_class": VERMILION, "loss_bbox": BLUE, "loss_giou": GREEN}
METRICS = {"mean_iou": BLUE, "mAP": VERMILION, "accuracy": GREEN, "macro_f1": PINK}  # all in 0..1
LEVELS = {  # dashed lines: name in the log -> what it is a level of, and its text
    "chance_mAP": ("mAP", "mAP of chance"),
    "majority_accuracy": ("accuracy", "accuracy of the most common class"),
}


def read_metrics(path: Path) -> dict[str, Series]:
    """Name -> (steps, values) of every number in a run's metrics.jsonl; a last line cut short by a
    kill is skipped.

    Raises:
        UserError: the file is missing, holds nothing, or a line before the last is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the --workdir of a run of train.py")
    lines = path.read_text(encoding="utf-8").splitlines()
    series: dict[str, Series] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            step = entry.pop("step")
        except (json.JSONDecodeError, KeyError, AttributeError):
            if number == len(lines):
                break
            reason = "not a JSON object with a step; remove the line"
            raise UserError(f"{path}, line {number}: {reason}") from None
        for name, value in entry.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(value))
    if not series:
        raise UserError(f"{path}: holds no metrics yet")
    return series


def draw_curves(series: Mapping[str, Series], path: Path, *, title: str) -> None:
    """Total loss, the terms of the last layer, and validation metrics, side by side in one PNG."""
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
    for name, (metric, text) in LEVELS.items():
        if f"val/{name}" in series:
            level = series[f"val/{name}"][1][-1]
            metrics.axhline(level, color=METRICS[metric], linestyle="--", label=text)
    metrics.set_ylim(0, 1)
    titles = ("Training loss, all layers", "Training loss terms, last layer", "Validation")
    for axes, text in zip((total, terms, metrics), titles, strict=True):
        axes.set_title(text, fontsize=14)
        axes.set_xlabel("step", fontsize=13)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=12)
        else:
            place: dict[str, Any] = {"ha": "center", "transform": axes.transAxes}
            axes.text(0.5, 0.5, "nothing logged yet", fontsize=13, **place)
    figure.savefig(path)


def _plot(axes: Axes, series: Series, *, color: str, label: str, marker: str | None = None) -> None:
    marker = "o" if len(series[0]) == 1 else marker
    axes.plot(*series, color=color, label=label, linewidth=2, marker=marker, markersize=5)


def metrics_table(series: Mapping[str, Series]) -> str:
    """Markdown tables of the validation metrics and of the training numbers."""
    lines: list[str] = []
    validation = {name: values for name, values in series.items() if name.startswith("val/")}
    if validation:
        lines += ["| validation | first | last | best | at step |", "|---|---:|---:|---:|---:|"]
    for name, (steps, values) in validation.items():
        name = name.removeprefix("val/")
        choose = np.nanargmin if name in LOWER_IS_BETTER else np.nanargmax
        best = -1 if np.isnan(values).all() else int(choose(values))
        numbers = " | ".join(f"{values[i]:.4f}" for i in (0, -1, best))
        lines.append(f"| {name} | {numbers} | {steps[best]} |")
    training = {name: values for name, values in series.items() if name not in validation}
    if training:
        lines += ["", "| training | first | last |", "|---|---:|---:|"]
    for name, (_, values) in training.items():
        lines.append(f"| {name} | {values[0]:.4g} | {values[-1]:.4g} |")
    return "\n".join([*lines, ""])


def write_report(workdir: Path) -> list[Path]:
    """Writes curves.png and metrics.md (with the tables of every metrics_<split>.json) into a run's
    folder; returns their paths.
    """
    series = read_metrics(workdir / "metrics.jsonl")
    curves, table = workdir / "curves.png", workdir / "metrics.md"
    draw_curves(series, curves, title=workdir.resolve().name)
    text = [f"# {workdir.resolve().name}", "", metrics_table(series)]
    for evaluated in sorted(workdir.glob("metrics_*.json")):
        split = evaluated.stem.removeprefix("metrics_")
        measured = format_table(json.loads(evaluated.read_text(encoding="utf-8")))
        text += [f"## Evaluated on the {split} split", "", measured, ""]
    table.write_text("\n".join(text), encoding="utf-8")
    return [curves, table]


def run(arguments: argparse.Namespace) -> None:
    print("\n".join(map(str, write_report(arguments.workdir))))
