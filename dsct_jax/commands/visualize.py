"""The paper's figures from any checkpoint and any images: what the network answered, and what it
looked at."""

import argparse
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dsct_jax.boxes import elementwise_iou
from dsct_jax.cli import progress, whole_file
from dsct_jax.commands.flags import load_model, selection
from dsct_jax.commands.ground_truth import GroundTruth, read_ground_truth
from dsct_jax.commands.inputs import find_inputs
from dsct_jax.commands.parsers import CHECKPOINT
from dsct_jax.commands.report import read_metrics
from dsct_jax.config import expanded_path
from dsct_jax.errors import UserError
from dsct_jax.inference.introspection import Introspection, introspect
from dsct_jax.inference.load import load
from dsct_jax.inference.predict import predict, read_rgb
from dsct_jax.postprocess import Subject
from dsct_jax.visualization.drawing import contact_sheet, draw_subjects, sort_left_to_right
from dsct_jax.visualization.figures import (
    NOBODY,
    activation_figure,
    context_figure,
    embedding_figure,
    loss_figure,
    sampling_figure,
)

_COLORS = 256  # of the file
_MAX_IMAGES = 12  # on one picture; more could not be read
_SAME_PERSON = 0.5  # IoU from which a found person is an annotated one


def predictions_sheet(
    files: Sequence[Path],
    images: Sequence[Image.Image],
    answers: Sequence[Sequence[Subject]],
    *,
    truth: GroundTruth | None,
) -> Image.Image:
    """Fig. 5 and 6: every image with its people; with `truth`, the annotated ones left of them."""
    tiles, captions = [], []
    for file, image, people in zip(files, images, answers, strict=True):
        if truth is not None:
            tiles.append(draw_subjects(image, sort_left_to_right(truth.get(file.name, []))))
            captions.append(f"{file.name}: annotated")
        tiles.append(draw_subjects(image, sort_left_to_right(people)))
        captions.append(f"{file.name}: predicted" if truth is not None else file.name)
    return contact_sheet(tiles, 4, captions=captions)


def compare_sheet(
    files: Sequence[Path],
    images: Sequence[Image.Image],
    names: Sequence[str],
    answers: Sequence[Sequence[Sequence[Subject]]],
    *,
    truth: GroundTruth | None,
) -> Image.Image:
    """Fig. 13: the answers of the checkpoints side by side, two images per row. With `truth` each
    caption counts the annotated people whose emotions are right.
    """
    tiles, captions = [], []
    for number, (file, image) in enumerate(zip(files, images, strict=True)):
        annotated = (truth or {}).get(file.name, [])
        for name, answer in zip(names, answers, strict=True):
            people = sort_left_to_right(answer[number])
            tiles.append(draw_subjects(image, people, ground_truth=annotated))
            if truth is not None:
                right = sum(_is_right(person, people) for person in annotated)
                name = f"{name}: {right} of {len(annotated)} right"
            captions.append(name)
    legend = None if truth is None else "dashed, white: annotated"
    return contact_sheet(tiles, 2 * len(answers), captions=captions, legend=legend)


def _is_right(person: Subject, found: Sequence[Subject]) -> bool:
    labels = _labels_at(person, found)
    return labels is not None and set(labels) == set(person.labels)


def _labels_at(person: Subject, candidates: Sequence[Subject]) -> tuple[str, ...] | None:
    """The labels of the candidate that overlaps a person most, None where none does enough."""
    if not candidates:
        return None
    boxes = np.array([candidate.box for candidate in candidates])
    overlaps = elementwise_iou(boxes, np.array(person.box))
    best = int(overlaps.argmax())
    return candidates[best].labels if overlaps[best] >= _SAME_PERSON else None


def embeddings(
    introspections: Sequence[Introspection], files: Sequence[Path], *, truth: GroundTruth | None
) -> Figure:
    """Principal components of all people, by annotated emotion with `truth` (NOBODY where none is
    annotated), else by predicted one.
    """
    labels = []
    for one, file in zip(introspections, files, strict=True):
        for subject in one.subjects:
            annotated = [subject] if truth is None else truth.get(file.name, [])
            found = _labels_at(subject, annotated)
            labels.append(NOBODY if found is None else (*found, "none")[0])
    if len(labels) < 3:
        remedy = "principal components need at least 3, so give more images"
        raise UserError(f"embeddings: {len(labels)} people were found; {remedy}")
    source = "predicted emotion" if truth is None else "annotated emotion"
    return embedding_figure(introspections, labels, source=source)


def losses(runs: Sequence[str]) -> Figure:
    """Fig. 12 for the runs in these directories. Raises UserError where one has logged nothing."""
    names = [expanded_path(run).resolve().name for run in runs]
    names = names if len(set(names)) == len(runs) else list(runs)
    series = {}
    for name, run in zip(names, runs, strict=True):
        series[name] = read_metrics(expanded_path(run) / "metrics.jsonl")
        if "train/loss_class" not in series[name]:
            remedy = "name the --workdir of a training"
            raise UserError(f"{name}: its metrics.jsonl has no training loss; {remedy}")
    return loss_figure(series)


def draw(arguments: argparse.Namespace) -> Image.Image | Figure:
    """The picture that the command line asks for."""
    figure = arguments.figure
    if figure == "losses":
        return losses(arguments.paths)
    if arguments.checkpoint is None:
        raise UserError(f"--checkpoint is missing: a {CHECKPOINT}")
    files, truth = _images(arguments), None
    model, chosen = load_model(arguments), selection(arguments)
    if arguments.ground_truth is not None:
        truth = read_ground_truth(arguments.ground_truth, model.class_names)
    if figure in ("predictions", "compare"):
        names, models = [""], [model]
        if figure == "compare":
            names = _two_names(arguments)
            models.append(load(arguments.compare_with, arguments.compare_config))
        images = [read_rgb(file) for file in files]
        answers = [predict(one, images, **dataclasses.asdict(chosen)) for one in models]
        if figure == "predictions":
            return predictions_sheet(files, images, answers[0], truth=truth)
        return compare_sheet(files, images, names, answers, truth=truth)
    shown = progress(files, total=len(files))
    introspections = [introspect(model, read_rgb(file), selection=chosen) for file in shown]
    if figure == "activation":
        return activation_figure(introspections, stage=arguments.stage)
    if figure == "embeddings":
        return embeddings(introspections, files, truth=truth)
    return _draw_queries(arguments, introspections, files)


def _images(arguments: argparse.Namespace) -> list[Path]:
    files, videos = find_inputs(arguments.paths, exclude=arguments.output)
    if videos:
        remedy = "figures are drawn of images, and python -m dsct_jax predict draws videos"
        raise UserError(f"{videos[0]}: is a video; {remedy}")
    if len(files) > _MAX_IMAGES and arguments.figure != "embeddings":
        reason = f"do not fit on one picture that can be read; give at most {_MAX_IMAGES}"
        raise UserError(f"{len(files)} images {reason}")
    return files


def _two_names(arguments: argparse.Namespace) -> list[str]:
    if arguments.compare_with is None:
        what = "the second checkpoint, drawn to the right of the first"
        raise UserError(f"--compare-with is missing: {what}")
    if arguments.names is None:
        return [str(arguments.checkpoint), str(arguments.compare_with)]
    names = arguments.names.split(",")
    if len(names) != 2:
        raise UserError(f"--names={arguments.names}: must be two names with a comma between them")
    return names


def _draw_queries(
    arguments: argparse.Namespace, introspections: Sequence[Introspection], files: Sequence[Path]
) -> Figure:
    """The figures of single people: sampling and context."""
    first, person, reason = introspections[0], arguments.person, None
    layers, people = len(first.layers), len(first.subjects)
    empty = [file for file, one in zip(files, introspections, strict=True) if not one.subjects]
    if not 0 <= arguments.layer <= layers:
        reason = f"--layer={arguments.layer}: the decoder has layers 1 to {layers}"
    elif empty:
        remedy = "lower --min-confidence or give another image"
        reason = f"{empty[0]}: nobody was found in it, so there is no query to draw; {remedy}"
    elif arguments.figure == "sampling":
        return sampling_figure(introspections, layer=arguments.layer - 1)
    elif len(introspections) > 1:
        reason = f"context: draws one image, not {len(introspections)}"
    elif not len(first.context_points):
        why = "config.model.num_context_queries is 0"
        reason = f"{arguments.checkpoint}: has no context queries ({why}), nothing to draw"
    elif not 1 <= person <= people:
        found = f"{people} people were found in {files[0]}"
        reason = f"--person={person}: {found}, counted from 1, surest first"
    if reason:
        raise UserError(reason)
    return context_figure(first, person=person - 1)


def as_image(picture: Image.Image | Figure) -> Image.Image:
    """A figure as RGB pixels, at its own resolution."""
    if isinstance(picture, Image.Image):
        return picture
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if output.suffix.lower() != ".png":
        raise UserError(f"--output={output}: must be the name of a .png file")
    image = as_image(draw(arguments))
    # dithered: a third of the file, and neither images nor color maps show steps
    palette = image.quantize(_COLORS, method=Image.Quantize.FASTOCTREE)
    image = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    with whole_file(output, "wb") as file:
        image.save(file, "png", optimize=True)
    print(output)
