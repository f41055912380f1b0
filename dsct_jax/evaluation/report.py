"""The metrics of `evaluate` for people to read: Markdown tables and plots."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_NO_PERCENT = ("mean_candidates", "brier")
_LONGEST = 13  # letters of a class name in the head of the confusion matrix
_HIDDEN = (
    "AP_envelope",
    "AP_eleven_point",
    "mAP_envelope",
    "mAP_eleven_point",
)  # of single classes and groups: in the JSON only
_HEADINGS = {
    "AP": "AP %",
    "mAP": "mAP %",
    "chance": "chance %",
    "accuracy": "accuracy %",
    "mAP_present": "mAP_present %",
    "share": "share %",
}


def format_table(metrics: dict[str, Any]) -> str:
    """The dictionary of `evaluate` as Markdown tables with columns that line up; shares in percent,
    intervals at 95 %.
    """
    about = [
        f"{name}: {metrics[name]}"
        for name in ("protocol", "split", "checkpoint")
        if metrics.get(name)
    ]
    counted = f"{metrics['num_images']} images, {metrics['num_people']} people ({metrics['num_labelled']} with labels)"
    lines = ["; ".join([counted, *about]), "", *_scalars(metrics)]
    lines += ["", *_entries("class", metrics["per_class"])]
    lines += ["", *_entries("people in the image", metrics["buckets"])]
    lines += ["", *_entries("found at IoU", metrics["detected"])]
    if "confusion_matrix" in metrics:
        names = list(metrics["per_class"])
        rows = [
            [name, *map(str, row)]
            for name, row in zip(names, metrics["confusion_matrix"], strict=True)
        ]
        lines += ["", *_table(["label \\ decided", *(name[:_LONGEST] for name in names)], rows)]
    return "\n".join(lines)


def _scalars(metrics: dict[str, Any]) -> list[str]:
    intervals = metrics.get("intervals", {})
    rows = [
        [
            name,
            f"{value:.4f}" if name in _NO_PERCENT else f"{100 * value:.2f} %",
            _interval(intervals.get(name)),
        ]
        for name, value in metrics.items()
        if isinstance(value, float)
    ]
    return _table(["metric", "value", "95 % interval"], rows, drop_empty=True)


def _entries(title: str, entries: dict[str, dict[str, Any]]) -> list[str]:
    """One row an entry; an interval's column follows its number."""
    known = [
        column
        for column in dict.fromkeys(column for entry in entries.values() for column in entry)
        if column not in _HIDDEN
    ]
    columns = sorted(known, key=lambda column: known.index(column.removesuffix("_interval")))
    heads = [
        "95 % interval" if column.endswith("_interval") else _HEADINGS.get(column, column)
        for column in columns
    ]
    return _table(
        [title, *heads],
        [
            [name, *(_cell(column, entry.get(column)) for column in columns)]
            for name, entry in entries.items()
        ],
    )


def _cell(column: str, value: float | int | list[float] | None) -> str:
    if isinstance(value, list):
        return _interval(value)
    if isinstance(value, float):
        return f"{value:.3f}" if column == "threshold" else f"{100 * value:.2f}"
    return "-" if value is None else str(value)


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}"


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, drop_empty: bool = False
) -> list[str]:
    """Markdown, padded: the first column to the left, numbers to the right."""
    cells = [list(heads), *map(list, rows)]
    kept = [i for i in range(len(heads)) if not drop_empty or any(row[i] for row in cells[1:])]
    widths = {i: max(3, *(len(row[i]) for row in cells)) for i in kept}

    def line(row: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in kept
            )
            + " |"
        )

    rule = (
        "|"
        + "|".join(
            ":" + "-" * (widths[i] + 1) if i == 0 else "-" * (widths[i] + 1) + ":" for i in kept
        )
        + "|"
    )
    return [line(cells[0]), rule, *map(line, cells[1:])]


_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_MOST_CELLS = 12  # classes up to which the numbers are written into the confusion matrix


def draw_evaluation(metrics: dict[str, Any], path: Path) -> None:
    """Writes the picture of what `evaluate` returned (intervals and confusion matrix only where
    they are in it) as a PNG.
    """
    from matplotlib.figure import Figure  # of the `plots` extra

    figure = Figure(figsize=(18, 11), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3)
    about = [
        f"{metrics['num_images']} images, {metrics['num_labelled']} labelled people",
        metrics.get("split"),
        metrics.get("protocol"),
    ]
    figure.suptitle("   ".join(part for part in about if part), fontsize=16)
    _classes(axes[0, 0], metrics)
    _buckets(axes[0, 1], metrics)
    _detected(axes[0, 2], metrics)
    _precision_recall(axes[1, 0], metrics)
    _reliability(axes[1, 1], metrics)
    if "confusion_matrix" in metrics:
        _confusion(axes[1, 2], metrics)
    else:
        _decided(axes[1, 2], metrics)
    for ax in axes.ravel():
        ax.tick_params(labelsize=11)
        ax.title.set_fontsize(14)
        ax.xaxis.label.set_fontsize(12)
        ax.yaxis.label.set_fontsize(12)
    figure.savefig(path)


def _errors(values: list[float], intervals: list[list[float] | None]) -> np.ndarray | None:
    """Lengths of the error bars below and above each value [2 n]; None where there is no interval."""
    if all(bounds is None for bounds in intervals):
        return None
    pairs = [
        (0.0, 0.0) if bounds is None else (value - bounds[0], bounds[1] - value)
        for value, bounds in zip(values, intervals, strict=True)
    ]
    return np.clip(np.array(pairs).T, 0, None)


def _classes(ax: Any, metrics: dict[str, Any]) -> None:
    entries = sorted(metrics["per_class"].items(), key=lambda item: item[1]["AP"])
    values = [entry["AP"] for _, entry in entries]
    rows = np.arange(len(entries))
    ax.barh(
        rows,
        values,
        color=_BLUE,
        xerr=_errors(values, [entry.get("AP_interval") for _, entry in entries]),
        ecolor="black",
    )
    ax.plot(
        [entry["chance"] for _, entry in entries],
        rows,
        "D",
        color=_ORANGE,
        markersize=5,
        label="chance (share of people)",
    )
    ax.set_yticks(rows, [f"{name} ({entry['people']})" for name, entry in entries])
    ax.set(xlim=(0, 1), xlabel="AP", title="Classes (people), by AP")
    ax.legend(fontsize=11, loc="lower right")


def _buckets(ax: Any, metrics: dict[str, Any]) -> None:
    entries = {name: entry for name, entry in metrics["buckets"].items() if "mAP" in entry}
    values = [entry["mAP"] for entry in entries.values()]
    columns = np.arange(len(entries))
    intervals = [entry.get("mAP_interval") for entry in entries.values()]
    ax.bar(
        columns - 0.2,
        values,
        0.4,
        color=_BLUE,
        label="mAP",
        yerr=_errors(values, intervals),
        ecolor="black",
    )
    ax.bar(
        columns + 0.2,
        [entry["accuracy"] for entry in entries.values()],
        0.4,
        color=_ORANGE,
        label="accuracy",
    )
    ax.set_xticks(columns, [f"{name}\n({entry['images']})" for name, entry in entries.items()])
    ax.set(ylim=(0, 1), xlabel="people in the image (images)", title="By number of people")
    ax.legend(fontsize=11)


def _detected(ax: Any, metrics: dict[str, Any]) -> None:
    thresholds = [float(name) for name in metrics["detected"]]
    ax.plot(
        thresholds,
        [entry["share"] for entry in metrics["detected"].values()],
        color=_GREEN,
        marker="s",
        label="share of people found",
    )
    for name, color, marker in (("mAP_present", _BLUE, "o"), ("accuracy", _ORANGE, "^")):
        ax.plot(
            thresholds,
            [entry.get(name, np.nan) for entry in metrics["detected"].values()],
            color=color,
            marker=marker,
            label=f"{name} of these",
        )
    ax.set(
        ylim=(0, 1),
        xlabel="IoU from which a person is found",
        title=f"Given detection; box AP {100 * metrics['box_AP']:.1f} %",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=11)


def _precision_recall(ax: Any, metrics: dict[str, Any]) -> None:
    curve = metrics["precision_recall"]
    ax.plot(
        curve["recall"], curve["precision"], color=_BLUE, linewidth=2, label="mean of the classes"
    )
    ax.axhline(metrics["chance_mAP"], color=_GREY, linestyle="--", label="chance")
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="recall",
        ylabel="precision (best at this recall or above)",
        title=f"mAP {100 * metrics['mAP']:.2f} %",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=11)


def _reliability(ax: Any, metrics: dict[str, Any]) -> None:
    ax.plot([0, 1], [0, 1], color=_GREY, linestyle="--", label="perfect")
    found = metrics["calibration"]
    lines = [("bins", _BLUE, "o", f"as predicted, ECE {100 * metrics['ece']:.1f} %")]
    if "bins_calibrated" in found:
        temperature, error = found["temperature"], 100 * metrics["ece_calibrated"]
        lines.append(
            (
                "bins_calibrated",
                _ORANGE,
                "^",
                f"temperature {temperature:.2f} ({found['fitted_on']}), ECE {error:.1f} %",
            )
        )
    for name, color, marker, label in lines:
        ax.plot(
            [entry["stated"] for entry in found[name]],
            [entry["true"] for entry in found[name]],
            color=color,
            marker=marker,
            label=label,
        )
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="stated probability",
        ylabel="share that is true",
        title="Reliability",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=11)


def _confusion(ax: Any, metrics: dict[str, Any]) -> None:
    counts, names = np.array(metrics["confusion_matrix"]), list(metrics["per_class"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _MOST_CELLS:
        for (row, column), number in np.ndenumerate(counts):
            ax.text(
                column,
                row,
                str(number),
                ha="center",
                va="center",
                fontsize=11,
                color="white" if shares[row, column] > 0.5 else "black",
            )
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.set(
        xlabel="decided",
        ylabel="label",
        title=f"Confusion (people); accuracy {100 * metrics['accuracy']:.2f} %",
    )


def _decided(ax: Any, metrics: dict[str, Any]) -> None:
    """Multi-label: precision and recall of each class's decisions."""
    entries = metrics["per_class"]
    rows = np.arange(len(entries))
    fitted = metrics.get("macro_f1_fitted")
    title = (
        f"Threshold 0.5; macro F1 {100 * metrics['macro_f1']:.1f} %"
        if fitted is None
        else f"Fitted thresholds; macro F1 {100 * fitted:.1f} %"
    )
    ax.barh(
        rows + 0.2,
        [entry["recall"] for entry in entries.values()],
        0.4,
        color=_ORANGE,
        label="recall",
    )
    ax.barh(
        rows - 0.2,
        [entry["precision"] for entry in entries.values()],
        0.4,
        color=_GREEN,
        label="precision",
    )
    ax.set_yticks(rows, list(entries))
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), title=title)
    ax.legend(fontsize=11)
