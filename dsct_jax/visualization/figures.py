"""The paper's figures as drawings: introspections -> matplotlib figures. Text can be read at half
the size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from dsct_jax.inference.introspection import Introspection, Layer, principal_components
from dsct_jax.visualization.drawing import BLUE, ORANGE, PALETTE, VERMILION

SPATIAL, SEMANTIC, REFERENCE = BLUE, ORANGE, VERMILION
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
NOBODY = "nobody"  # the label of a person found where none is annotated
_GREY = "#9A9A9A"
_FONT = 15
# of the attention: the samples beyond carry next to nothing and would hide the others
_SHOWN_SHARE = 0.98


def _panels(
    images: Sequence[Image.Image], columns: int, *, width: float = 4.6
) -> tuple[Figure, np.ndarray]:
    """A figure with a row of panels for each image, and room for headings and a legend."""
    aspects = [image.height / image.width for image in images]
    height = sum(width * aspect + 0.35 for aspect in aspects) + 0.9
    figure = Figure(figsize=(width * columns, height), dpi=100, layout="constrained")
    return figure, figure.subplots(len(images), columns, squeeze=False, height_ratios=aspects)


def _show(axes: Axes, image: Image.Image, title: str = "", *, faded: float = 0.0) -> None:
    """The image without ticks, `faded` towards white so that marks stand out."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    extent = (0, image.width, image.height, 0)
    axes.imshow(pixels * (1 - faded) + faded, extent=extent, interpolation="lanczos")
    axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
    if title:
        axes.set_title(title, fontsize=_FONT)


def _box(axes: Axes, box: Sequence[float], color: str) -> None:
    x1, y1, x2, y2 = box
    for edge, width in (("black", 4.5), (color, 2.5)):
        style: dict[str, Any] = {"fill": False, "edgecolor": edge, "linewidth": width}
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))


def _star(axes: Axes, point: np.ndarray, color: str = REFERENCE) -> None:
    edge: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 1.2}
    axes.plot(*point, marker="*", markersize=19, color=color, clip_on=False, zorder=5, **edge)


def _points(axes: Axes, points: np.ndarray, areas: np.ndarray | float, **style: Any) -> None:
    """Dots [n 2] with a black edge, each of its area."""
    axes.scatter(points[:, 0], points[:, 1], s=areas, edgecolors="black", **style)


def _legend(figure: Figure, entries: Mapping[str, tuple[str, str]]) -> None:
    """Below everything: name -> (marker, color)."""
    style: dict[str, Any] = {"markeredgecolor": "black", "linestyle": "none", "markersize": 12}
    handles = [Line2D([], [], marker=m, color=c, label=n, **style) for n, (m, c) in entries.items()]
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(2, len(handles))}
    figure.legend(handles=handles, fontsize=_FONT, frameon=False, **place)


def activation_figure(introspections: Sequence[Introspection], *, stage: str) -> Figure:
    """Fig. 7: each image, and how strongly each level of the `stage` (backbone or encoder) answers
    to it, each on its own scale.
    """
    maps = [getattr(one, stage) for one in introspections]
    figure, panels = _panels([one.image for one in introspections], 1 + len(maps[0]), width=3.6)
    figure.suptitle(f"Activation after the {stage}", fontsize=_FONT + 2)
    for position, (row, one, levels) in enumerate(zip(panels, introspections, maps, strict=True)):
        _show(row[0], one.image, "" if position else "image")
        for number, (axes, level) in enumerate(zip(row[1:], levels, strict=True), 3):
            name, (height, width) = "C" if stage == "backbone" else "level ", level.shape
            _show(axes, one.image.convert("L"), f"{name}{number}, {height}x{width}")
            span = (level - level.min()) / max(float(np.ptp(level)), 1e-12)
            extent = (0, one.image.width, one.image.height, 0)
            heat = axes.imshow(
                span, extent=extent, cmap="cividis", alpha=0.7, interpolation="bilinear"
            )
    bar = figure.colorbar(heat, ax=list(panels[:, -1]), shrink=0.8)
    bar.set_ticks([0, 1], labels=["least", "most"], fontsize=_FONT - 2)
    return figure


def sampling_figure(introspections: Sequence[Introspection], *, layer: int) -> Figure:
    """Fig. 8 and 9: where each subject query samples, alone and with the context queries fused into
    it. A dot's area is its attention weight (times that of its context query).
    """
    figure, panels = _panels([one.image for one in introspections], 3)
    number = layer % len(introspections[0].layers) + 1
    figure.suptitle(f"Sampling points, decoder layer {number}", fontsize=_FONT + 2)
    headings = ("people found", "subject queries alone", "with their context queries")
    for position, (row, one) in enumerate(zip(panels, introspections, strict=True)):
        titles = ("", "", "") if position else headings
        for axes, title, faded in zip(row, titles, (0.0, 0.35, 0.35), strict=True):
            _show(axes, one.image, title, faded=faded)
        seen = one.layers[layer]
        for number, (subject, query) in enumerate(zip(one.subjects, one.queries, strict=True)):
            color = PALETTE[number % len(PALETTE)]
            for axes in row:
                _box(axes, subject.box, color)
                _star(axes, seen.subject_points[query], color)
            _dots(row[1], seen.subject_samples[query], seen.subject_weights[query], color)
            points, weights = contextual_samples(seen, int(query))
            _dots(row[2], points, weights, color)
    point, samples = "reference point (color: person)", "sampling point, area = weight"
    _legend(figure, {point: ("*", "white"), samples: ("o", "white")})
    return figure


def contextual_samples(layer: Layer, query: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [n 2] and weights [n] of a subject query and of all context queries fused into it (Eq.
    8: the subject itself counts 1).
    """
    chosen = layer.context_weights[query] > 0
    context = layer.context_samples[chosen].reshape(-1, 2)
    weights = layer.context_sample_weights[chosen] * layer.context_weights[query][chosen, None]
    points = np.concatenate([layer.subject_samples[query], context])
    return points, np.concatenate([layer.subject_weights[query], weights.reshape(-1)])


def _dots(axes: Axes, points: np.ndarray, weights: np.ndarray, color: str) -> None:
    order = np.argsort(-weights)
    enough = int(np.searchsorted(weights[order].cumsum(), _SHOWN_SHARE * weights.sum())) + 1
    kept = order[:enough]
    areas = 12 + 130 * weights[kept] / weights.max()
    _points(axes, points[kept], areas, color=color, linewidths=0.6, alpha=0.8, zorder=3)


def context_figure(one: Introspection, *, person: int) -> Figure:
    """Fig. 4 and 10: for one person, the context queries that each layer selects by distance and by
    relevance, and the weight each is given.
    """
    figure, panels = _panels([one.image] * 2, len(one.layers), width=4.2)
    subject, query = one.subjects[person], int(one.queries[person])
    labels = ", ".join(subject.labels) or "no emotion above the threshold"
    title = f"Context queries selected for person {person + 1} ({labels})"
    figure.suptitle(title, fontsize=_FONT + 2)
    rows = (("distance", "spatial", SPATIAL), ("relevance", "semantic", SEMANTIC))
    for column, layer in enumerate(one.layers):
        for row, (reason, field, color) in enumerate(rows):
            axes = panels[row, column]
            selected = getattr(layer, field)[query]
            weights = layer.context_weights[query][selected]
            share = f"{weights.sum():.0%} of the weight" if selected.any() else "not fused here"
            _show(axes, one.image, share if row else f"layer {column + 1}\n{share}", faded=0.35)
            _box(axes, subject.box, "white")
            rest, chosen = one.context_points[~selected], one.context_points[selected]
            _points(axes, rest, 14.0, color=_GREY, linewidths=0.4, zorder=2)
            areas = 40 + 500 * weights
            _points(axes, chosen, areas, color=color, linewidths=1, alpha=0.85, zorder=3)
            _star(axes, layer.subject_points[query])
            if column == 0:
                axes.set_ylabel(f"by {reason}", fontsize=_FONT)
    entries = {
        "the person's reference point": ("*", REFERENCE),
        "selected by distance (area = weight)": ("o", SPATIAL),
        "selected by relevance (area = weight)": ("o", SEMANTIC),
        "not selected": (".", _GREY),
    }
    _legend(figure, entries)
    return figure


def embedding_figure(
    introspections: Sequence[Introspection], labels: Sequence[str], *, source: str
) -> Figure:
    """Principal components of the embeddings of all subjects, with a label for each."""
    scores, shares = principal_components(
        np.concatenate([one.embeddings for one in introspections])
    )
    figure = Figure(figsize=(11.5, 7.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    names = sorted(set(labels), key=lambda name: (name == NOBODY, name))
    for number, name in enumerate(names):
        chosen = np.array([label == name for label in labels])
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        if name == NOBODY:
            color, marker = _GREY, "."
        style = {"color": color, "marker": marker, "linewidths": 0.6, "alpha": 0.85}
        _points(axes, scores[chosen], 70.0, label=f"{name} ({chosen.sum()})", **style)
    axes.set_title(f"Subject embeddings after the last layer, by {source}", fontsize=_FONT + 1)
    axes.set_xlabel(f"first principal component, {shares[0]:.0%} of the variance", fontsize=_FONT)
    axes.set_ylabel(f"second, {shares[1]:.0%}", fontsize=_FONT)
    axes.tick_params(labelsize=_FONT - 2)
    figure.legend(fontsize=_FONT, loc="outside right upper")
    return figure


def loss_figure(runs: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]]) -> Figure:
    """Fig. 12: classification and localization loss of the last layer over the steps of training;
    runs: name -> series of metrics.jsonl.
    """
    figure = Figure(figsize=(13, 5.2), dpi=100, layout="constrained")
    panels, styles = figure.subplots(1, 2), ("-", "--", "-.", ":")
    titles = ("classification", "localization, L1 + GIoU")
    terms = (("loss_class",), ("loss_bbox", "loss_giou"))
    for axes, title, names in zip(panels, titles, terms, strict=True):
        for number, (run, series) in enumerate(runs.items()):
            steps = series[f"train/{names[0]}"][0]
            values = np.sum([series[f"train/{name}"][1] for name in names], axis=0)
            color, style = PALETTE[-1 - number % len(PALETTE)], styles[number % len(styles)]
            axes.plot(steps, values, color=color, linestyle=style, linewidth=2.5, label=run)
        axes.set_title(f"Training loss: {title}", fontsize=_FONT + 1)
        axes.set_xlabel("step", fontsize=_FONT)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=_FONT - 2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=_FONT)
    return figure
