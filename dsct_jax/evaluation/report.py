"""The metrics of `evaluate` for people to read: Markdown tables and plots."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_NO_PERCENT = ("mean_candidates", "brier")
_LONGEST = 13  # letters of a class name in the head of the confusion matrix
# Of single classes and groups these stand in the JSON only.
_HIDDEN = ("AP_envelope", "AP_eleven_point", "mAP_envelope", "mAP_eleven_point")
_IN_PERCENT = ("AP", "mAP", "chance", "accuracy", "mAP_present", "share")  # say so in the heading


def format_table(metrics: dict[str, Any]) -> str:
    """The result of `evaluate` as aligned Markdown tables; shares in percent, 95 % intervals."""
    images, people, labelled = (metrics[f"num_{name}"] for name in ("images", "people", "labelled"))
    about = [f"{images} images, {people} people ({labelled} with labels)"]
    fields = ("protocol", "split", "checkpoint", "boxes")
    about += [f"{name}: {metrics[name]}" for name in fields if metrics.get(name)]
    lines = ["; ".join(about), "", *_scalars(metrics)]
    titles = {"per_class": "class", "buckets": "people in the image", "detected": "found at IoU"}
    for name, title in titles.items():
        lines += ["", *_entries(title, metrics[name])]
    if "confusion_matrix" in metrics:
        names = list(metrics["per_class"])
        counts = zip(names, metrics["confusion_matrix"], strict=True)
        heads = ["label \\ decided", *(name[:_LONGEST] for name in names)]
        lines += ["", *_table(heads, [[name, *map(str, row)] for name, row in counts])]
    return "\n".join(lines)


def _scalars(metrics: dict[str, Any]) -> list[str]:
    intervals, rows = metrics.get("intervals", {}), []
    for name, value in metrics.items():
        if isinstance(value, float):
            text = f"{value:.4f}" if name in _NO_PERCENT else f"{100 * value:.2f} %"
            rows.append([name, text, _interval(intervals.get(name))])
    return _table(["metric", "value", "95 % interval"], rows, drop_empty=True)


def _entries(title: str, entries: dict[str, dict[str, Any]]) -> list[str]:
    """One row per entry; an interval's column follows its number."""
    names = dict.fromkeys(name for entry in entries.values() for name in entry)
    known = [name for name in names if name not in _HIDDEN]
    columns = sorted(known, key=lambda column: known.index(column.removesuffix("_interval")))
    heads = [
        "95 % interval" if name.endswith("_interval") else f"{name}{' %' * (name in _IN_PERCENT)}"
        for name in columns
    ]
    rows = [
        [name, *(_cell(column, entry.get(column)) for column in columns)]
        for name, entry in entries.items()
    ]
    return _table([title, *heads], rows)


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
    columns = [
        (head, *cells)
        for head, cells in zip(heads, zip(*rows, strict=True), strict=True)
        if not drop_empty or any(cells)
    ]
    padded = []
    for i, cells in enumerate(columns):
        width = max(3, *map(len, cells))
        texts = [cell.rjust(width) if i else cell.ljust(width) for cell in cells]
        rule = "-" * (width + 1)
        padded.append([f" {texts[0]} ", f"{rule}:" if i else f":{rule}"])
        padded[-1] += [f" {text} " for text in texts[1:]]
    return [f"|{'|'.join(line)}|" for line in zip(*padded, strict=True)]


_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_MOST_CELLS = 12  # classes up to which the numbers are written into the confusion matrix


def draw_evaluation(metrics: dict[str, Any], path: Path) -> None:
    """Writes the plots of what `evaluate` returned as a PNG."""
    from matplotlib.figure import Figure  # of the `plots` extra

    figure = Figure(figsize=(18, 11), dpi=100, layout="constrained")
    counted = f"{metrics['num_images']} images, {metrics['num_labelled']} labelled people"
    about = [counted, metrics.get("split"), metrics.get("protocol")]
    about += [f"boxes {metrics['boxes']}"] if metrics.get("boxes") else []
    figure.suptitle("   ".join(part for part in about if part), fontsize=16)
    last = _confusion if "confusion_matrix" in metrics else _decided
    panels = (_classes, _buckets, _detected, _precision_recall, _reliability, last)
    for ax, draw in zip(figure.subplots(2, 3).ravel(), panels, strict=True):
        draw(ax, metrics)
        ax.tick_params(labelsize=11)
        for text, size in ((ax.title, 14), (ax.xaxis.label, 12), (ax.yaxis.label, 12)):
            text.set_fontsize(size)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=11, loc="lower right" if draw is _classes else "best")
    figure.savefig(path)


def _errors(values: list[float], intervals: list[list[float] | None]) -> np.ndarray | None:
    """Lengths of the error bars below and above each value [2 n]; None without intervals."""
    if all(bounds is None for bounds in intervals):
        return None
    pairs = zip(values, (bounds or (np.nan, np.nan) for bounds in intervals), strict=True)
    lengths = np.array([(value - low, high - value) for value, (low, high) in pairs]).T
    return np.clip(np.nan_to_num(lengths), 0, None)


def _each(entries: Iterable[dict[str, Any]], name: str, default: Any = None) -> list[Any]:
    return [entry.get(name, default) for entry in entries]


def _classes(ax: Any, metrics: dict[str, Any]) -> None:
    named = sorted(metrics["per_class"].items(), key=lambda item: item[1]["AP"])
    entries, rows = [entry for _, entry in named], np.arange(len(named))
    values = _each(entries, "AP")
    errors = _errors(values, _each(entries, "AP_interval"))
    ax.barh(rows, values, color=_BLUE, xerr=errors, ecolor="black")
    chance, label = _each(entries, "chance"), "chance (share of people)"
    ax.plot(chance, rows, "D", color=_ORANGE, markersize=5, label=label)
    ax.set_yticks(rows, [f"{name} ({entry['people']})" for name, entry in named])
    ax.set(xlim=(0, 1), xlabel="AP", title="Classes (people), by AP")


def _buckets(ax: Any, metrics: dict[str, Any]) -> None:
    named = {name: entry for name, entry in metrics["buckets"].items() if "mAP" in entry}
    entries, columns = list(named.values()), np.arange(len(named))
    values = _each(entries, "mAP")
    errors = _errors(values, _each(entries, "mAP_interval"))
    ax.bar(columns - 0.2, values, 0.4, color=_BLUE, label="mAP", yerr=errors, ecolor="black")
    ax.bar(columns + 0.2, _each(entries, "accuracy"), 0.4, color=_ORANGE, label="accuracy")
    ax.set_xticks(columns, [f"{name}\n({entry['images']})" for name, entry in named.items()])
    ax.set(ylim=(0, 1), xlabel="people in the image (images)", title="By number of people")


def _detected(ax: Any, metrics: dict[str, Any]) -> None:
    entries = metrics["detected"].values()
    for name, color, marker, label in (
        ("share", _GREEN, "s", "share of people found"),
        ("mAP_present", _BLUE, "o", "mAP_present of these"),
        ("accuracy", _ORANGE, "^", "accuracy of these"),
    ):
        values, thresholds = _each(entries, name, np.nan), [float(x) for x in metrics["detected"]]
        ax.plot(thresholds, values, color=color, marker=marker, label=label)
    title = f"Boxes {metrics.get('boxes')}"
    if "box_AP" in metrics:
        title = f"Given detection; box AP {100 * metrics['box_AP']:.1f} %"
    ax.set(ylim=(0, 1), xlabel="IoU from which a person is found", title=title)
    ax.grid(alpha=0.3)


def _precision_recall(ax: Any, metrics: dict[str, Any]) -> None:
    curve, mean = metrics["precision_recall"], "mean of the classes"
    ax.plot(curve["recall"], curve["precision"], color=_BLUE, linewidth=2, label=mean)
    ax.axhline(metrics["chance_mAP"], color=_GREY, linestyle="--", label="chance")
    ax.set(xlim=(0, 1), xlabel="recall", title=f"mAP {100 * metrics['mAP']:.2f} %")
    ax.set(ylim=(0, 1), ylabel="precision (best at this recall or above)")
    ax.grid(alpha=0.3)


def _reliability(ax: Any, metrics: dict[str, Any]) -> None:
    ax.plot([0, 1], [0, 1], color=_GREY, linestyle="--", label="perfect")
    found = metrics["calibration"]
    lines = [("bins", _BLUE, "o", f"as predicted, ECE {100 * metrics['ece']:.1f} %")]
    if "bins_calibrated" in found:
        label = f"temperature {found['temperature']:.2f} ({found['fitted_on']})"
        label += f", ECE {100 * metrics['ece_calibrated']:.1f} %"
        lines.append(("bins_calibrated", _ORANGE, "^", label))
    for name, color, marker, label in lines:
        stated, true = _each(found[name], "stated"), _each(found[name], "true")
        ax.plot(stated, true, color=color, marker=marker, label=label)
    ax.set(xlim=(0, 1), xlabel="stated probability", title="Reliability")
    ax.set(ylim=(0, 1), ylabel="share that is true")
    ax.grid(alpha=0.3)


def _confusion(ax: Any, metrics: dict[str, Any]) -> None:
    counts, names = np.array(metrics["confusion_matrix"]), list(metrics["per_class"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _MOST_CELLS:
        for (row, column), number in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            ax.text(column, row, str(number), ha="center", va="center", fontsize=11, color=color)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), names)
    title = f"Confusion (people); accuracy {100 * metrics['accuracy']:.2f} %"
    ax.set(xlabel="decided", ylabel="label", title=title)


def _decided(ax: Any, metrics: dict[str, Any]) -> None:
    """Multi-label: precision and recall of each class's decisions."""
    entries = metrics["per_class"]
    rows, fitted = np.arange(len(entries)), metrics.get("macro_f1_fitted")
    default = ("Threshold 0.5", metrics["macro_f1"])
    what, value = default if fitted is None else ("Fitted thresholds", fitted)
    for name, offset, color in (("recall", 0.2, _ORANGE), ("precision", -0.2, _GREEN)):
        ax.barh(rows + offset, _each(entries.values(), name), 0.4, color=color, label=name)
    ax.set_yticks(rows, list(entries))
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), title=f"{what}; macro F1 {100 * value:.1f} %")
