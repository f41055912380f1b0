"""What each person of a video felt when: timeline.csv and a picture per video."""

import array
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsct_jax.cli import whole_file
from dsct_jax.commands.inputs import DRAWN
from dsct_jax.inference.tracking import smoothed

MOST_BARS = 1000  # of a person in the picture; each is the mean of its time


def person_series(entry: Mapping[str, Any], class_names: Sequence[str]) -> dict[int, Any]:
    """Number -> (seconds [n], boxes [n 4], confidence [n], probabilities [n k], smoothed [n k]) of
    a video's entry in predictions.json.
    """
    seen: dict[int, array.array[float]] = defaultdict(lambda: array.array("d"))
    for frame in entry["frames"]:
        for person in frame["subjects"]:
            if person.get("person") is not None:
                scores = (person["probabilities"][name] for name in class_names)
                row = frame["seconds"], *person["box"], person["confidence"], *scores
                seen[person["person"]].extend(row)
    series = {}
    for number, values in sorted(seen.items()):
        rows = np.array(values).reshape(-1, 6 + len(class_names))
        seconds, boxes, confidence, raw = rows[:, 0], rows[:, 1:5], rows[:, 5], rows[:, 6:]
        series[number] = seconds, boxes, confidence, raw, smoothed(seconds, raw, confidence)
    return series


def write_timelines(
    videos: Sequence[Mapping[str, Any]], class_names: Sequence[str], output: Path
) -> list[Path]:
    """Writes timeline.csv, and timeline_<video>.png where matplotlib is installed; their paths."""
    paths = [output / "timeline.csv"]
    smooth_names = [f"{name}_smooth" for name in class_names]
    with whole_file(paths[0], newline="") as file:
        writer = csv.writer(file)
        head = ["file", "person", "seconds", "x1", "y1", "x2", "y2", "confidence"]
        writer.writerow([*head, *class_names, *smooth_names])
        for entry in videos:
            for number, columns in person_series(entry, class_names).items():
                for at, box, sure, raw, smooth in zip(*columns, strict=True):
                    values = [*box, sure, *raw, *smooth]
                    row = [entry["file"], number, f"{at:.3f}", *(f"{x:.6g}" for x in values)]
                    writer.writerow(row)
    for entry in videos:
        place = Path(entry["drawn"]).relative_to(DRAWN).with_suffix("")  # no two have the same
        path = output / f"timeline_{'_'.join(place.parts)}.png"
        try:
            figure = draw_timeline(entry, class_names)
        except ModuleNotFoundError:
            break  # the numbers do not need the picture
        if figure is not None:
            figure.savefig(path)
            paths.append(path)
    return paths


def draw_timeline(entry: Mapping[str, Any], class_names: Sequence[str]) -> Any:
    """A band per person, colored by the likeliest emotion, as high as it is probable; gaps stay
    gaps. None where nobody has a number.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from dsct_jax.visualization.drawing import PALETTE

    series = person_series(entry, class_names)
    if not series:
        return None
    size = (10, 1.2 + 0.6 * len(series))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes, step = figure.subplots(), entry["every"] / entry["frames_per_second"]
    start = min(seconds[0] for seconds, *_ in series.values())
    end = max(seconds[-1] for seconds, *_ in series.values())
    step = max(step, (end - start) / MOST_BARS)
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(class_names))]
    for row, (seconds, *_, smooth) in enumerate(series.values()):
        places = np.round((seconds - start) / step).astype(int)
        bars, first = np.unique(places, return_index=True)
        means = np.add.reduceat(smooth, first) / np.diff([*first, len(smooth)])[:, None]
        likeliest = means.argmax(1)
        heights = -0.9 * means[np.arange(len(means)), likeliest]  # the axis points down
        shades, left = [colors[index] for index in likeliest], start + bars * step
        axes.bar(left, heights, width=step, bottom=row + 0.45, color=shades, align="edge")
    axes.set_yticks(range(len(series)), [f"person {number}" for number in series])
    axes.set(xlabel="seconds", ylim=(len(series) - 0.4, -0.6), title=Path(entry["file"]).name)
    shown = sorted({int(i) for *_, smooth in series.values() for i in smooth.argmax(1)})
    handles = [Patch(color=colors[i], label=class_names[i]) for i in shown]
    figure.legend(handles=handles, loc="outside right upper")
    return figure
