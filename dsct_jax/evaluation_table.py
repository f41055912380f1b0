"""The metrics of `evaluate` as Markdown that can also be read in a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

_NO_PERCENT = ("mean_candidates", "brier")
_LONGEST = 13  # letters of a class name in the head of the confusion matrix
_HIDDEN = ("AP_envelope", "AP_eleven_point", "mAP_envelope", "mAP_eleven_point")  # of single classes and groups: in the JSON only
_HEADINGS = {"AP": "AP %", "mAP": "mAP %", "chance": "chance %", "accuracy": "accuracy %", "mAP_present": "mAP_present %", "share": "share %"}


def format_table(metrics: dict[str, Any]) -> str:
    """The dictionary of `evaluate` as Markdown tables with columns that line up; shares in percent, intervals at 95 %."""
    about = [f"{name}: {metrics[name]}" for name in ("protocol", "split", "checkpoint") if metrics.get(name)]
    counted = f"{metrics['num_images']} images, {metrics['num_people']} people ({metrics['num_labelled']} with labels)"
    lines = ["; ".join([counted, *about]), "", *_scalars(metrics)]
    lines += ["", *_entries("class", metrics["per_class"])]
    lines += ["", *_entries("people in the image", metrics["buckets"])]
    lines += ["", *_entries("found at IoU", metrics["detected"])]
    if "confusion_matrix" in metrics:
        names = list(metrics["per_class"])
        rows = [[name, *map(str, row)] for name, row in zip(names, metrics["confusion_matrix"], strict=True)]
        lines += ["", *_table(["label \\ decided", *(name[:_LONGEST] for name in names)], rows)]
    return "\n".join(lines)


def _scalars(metrics: dict[str, Any]) -> list[str]:
    intervals = metrics.get("intervals", {})
    rows = [
        [name, f"{value:.4f}" if name in _NO_PERCENT else f"{100 * value:.2f} %", _interval(intervals.get(name))]
        for name, value in metrics.items()
        if isinstance(value, float)
    ]
    return _table(["metric", "value", "95 % interval"], rows, drop_empty=True)


def _entries(title: str, entries: dict[str, dict[str, Any]]) -> list[str]:
    """One row an entry; an interval's column follows its number."""
    known = [column for column in dict.fromkeys(column for entry in entries.values() for column in entry) if column not in _HIDDEN]
    columns = sorted(known, key=lambda column: known.index(column.removesuffix("_interval")))
    heads = ["95 % interval" if column.endswith("_interval") else _HEADINGS.get(column, column) for column in columns]
    return _table([title, *heads], [[name, *(_cell(column, entry.get(column)) for column in columns)] for name, entry in entries.items()])


def _cell(column: str, value: float | int | list[float] | None) -> str:
    if isinstance(value, list):
        return _interval(value)
    if isinstance(value, float):
        return f"{value:.3f}" if column == "threshold" else f"{100 * value:.2f}"
    return "-" if value is None else str(value)


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, drop_empty: bool = False) -> list[str]:
    """Markdown, padded: the first column to the left, numbers to the right."""
    cells = [list(heads), *map(list, rows)]
    kept = [i for i in range(len(heads)) if not drop_empty or any(row[i] for row in cells[1:])]
    widths = {i: max(3, *(len(row[i]) for row in cells)) for i in kept}

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in kept) + " |"

    rule = "|" + "|".join(":" + "-" * (widths[i] + 1) if i == 0 else "-" * (widths[i] + 1) + ":" for i in kept) + "|"
    return [line(cells[0]), rule, *map(line, cells[1:])]
