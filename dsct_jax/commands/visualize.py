"""The paper's figures from any checkpoint and any images: what the network answered, and what it
looked at.

    python -m dsct_jax visualize FIGURE PATH... --checkpoint=runs/demo --output=figure.png

FIGURE is one of
    predictions   boxes and emotions, beside those of --ground-truth (Figures 5 and 6)
    activation    how strongly each level of the --stage (backbone or encoder) answers (Figure 7)
    sampling      reference and sampling points of each person, alone and with the context
                  (Figures 8 and 9)
    context       the context queries that each layer selects for a person, and their weights
                  (Figures 4 and 10)
    beside        the answers of two checkpoints, such as early and late fusion (Figure 13)
    embeddings    principal components of the embeddings of all people
    losses        training loss of classification and localization; PATHs are runs (Figure 12)

PATHs are images, folders or quoted patterns. --ground-truth is what `python -m data samples` writes
beside the images (COCO style).
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dsct_jax.boxes import elementwise_iou
from dsct_jax.cli import Parser, expanded_path, progress, whole_file
from dsct_jax.commands.flags import CHECKPOINT, add_checkpoint, add_selection, load_model, selection
from dsct_jax.commands.ground_truth import GroundTruth, read_ground_truth
from dsct_jax.commands.inputs import find_inputs
from dsct_jax.commands.report import read_metrics
from dsct_jax.config import read_config
from dsct_jax.errors import UserError
from dsct_jax.inference.introspection import Introspection, introspect
from dsct_jax.inference.load import Model, load
from dsct_jax.inference.predict import predict, read_rgb
from dsct_jax.postprocess import Selection, Subject
from dsct_jax.visualization.drawing import contact_sheet, draw_subjects, sort_left_to_right
from dsct_jax.visualization.figures import (
    NOBODY,
    activation_figure,
    context_figure,
    embedding_figure,
    loss_figure,
    sampling_figure,
)

FIGURES = ("predictions", "activation", "sampling", "context", "beside", "embeddings", "losses")
_COLORS = 256  # of the file
_MAX_IMAGES = 12  # on one picture; more could not be read
_SAME_PERSON = 0.5  # IoU from which a found person is an annotated one


def predictions_sheet(
    model: Model, files: Sequence[Path], *, truth: GroundTruth | None, selection: Selection
) -> Image.Image:
    """Fig. 5 and 6: every image with the people found in it; with `truth`, the annotated ones to
    the left of it.
    """
    images = [read_rgb(file) for file in files]
    tiles: list[Image.Image] = []
    captions: list[str] = []
    for file, image, people in zip(files, images, _answers(model, images, selection), strict=True):
        if truth is not None:
            tiles.append(draw_subjects(image, sort_left_to_right(truth.get(file.name, []))))
            captions.append(f"{file.name}: annotated")
        tiles.append(draw_subjects(image, sort_left_to_right(people)))
        captions.append(f"{file.name}: predicted" if truth is not None else file.name)
    return contact_sheet(tiles, 4, captions=captions)


def beside_sheet(
    models: Sequence[Model],
    names: Sequence[str],
    files: Sequence[Path],
    *,
    truth: GroundTruth | None,
    selection: Selection,
) -> Image.Image:
    """Fig. 13: the answers of all checkpoints side by side, two images per row.

    With `truth` each caption counts the annotated people whose emotions are right.
    """
    images = [read_rgb(file) for file in files]
    answers = [_answers(model, images, selection) for model in models]
    tiles: list[Image.Image] = []
    captions: list[str] = []
    for number, (file, image) in enumerate(zip(files, images, strict=True)):
        annotated = None if truth is None else truth.get(file.name, [])
        for name, found in zip(names, answers, strict=True):
            people = sort_left_to_right(found[number])
            tiles.append(draw_subjects(image, people, ground_truth=annotated))
            if annotated is not None:
                right = sum(_is_right(person, people) for person in annotated)
                name = f"{name}: {right} of {len(annotated)} right"
            captions.append(name)
    legend = None if truth is None else "dashed, white: annotated"
    return contact_sheet(tiles, 2 * len(models), captions=captions, legend=legend)


def _answers(
    model: Model, images: Sequence[Image.Image], selection: Selection
) -> list[list[Subject]]:
    return predict(
        model,
        images,
        threshold=selection.threshold,
        min_confidence=selection.min_confidence,
        nms=selection.nms,
    )


def _is_right(person: Subject, found: Sequence[Subject]) -> bool:
    match = _same_person(person, found)
    return match is not None and set(match.labels) == set(person.labels)


def _same_person(person: Subject, candidates: Sequence[Subject]) -> Subject | None:
    """The candidate that overlaps a person most, None where none does enough."""
    if not candidates:
        return None
    boxes = np.array([candidate.box for candidate in candidates])
    overlaps = elementwise_iou(boxes, np.array(person.box))
    best = int(overlaps.argmax())
    return candidates[best] if overlaps[best] >= _SAME_PERSON else None


def embeddings(
    introspections: Sequence[Introspection], files: Sequence[Path], *, truth: GroundTruth | None
) -> Figure:
    """Principal components of all people, by annotated emotion with `truth` (NOBODY where none is
    annotated), else by predicted one.
    """
    labels = [
        _embedding_label(subject, file, truth)
        for one, file in zip(introspections, files, strict=True)
        for subject in one.subjects
    ]
    if len(labels) < 3:
        raise UserError(
            f"embeddings: {len(labels)} people were found; principal components need at least 3, "
            "so give more images"
        )
    return embedding_figure(
        introspections, labels, source="predicted emotion" if truth is None else "annotated emotion"
    )


def _embedding_label(subject: Subject, file: Path, truth: GroundTruth | None) -> str:
    if truth is None:
        return subject.labels[0] if subject.labels else "none"
    match = _same_person(subject, truth.get(file.name, []))
    return NOBODY if match is None else (match.labels[0] if match.labels else "none")


def losses(runs: Sequence[str]) -> Figure:
    """Fig. 12 for the runs in these directories. Raises UserError where one has logged nothing."""
    short = {run: Path(run).resolve().name for run in runs}
    names = short if len(set(short.values())) == len(runs) else {run: run for run in runs}
    series = {name: read_metrics(Path(run) / "metrics.jsonl") for run, name in names.items()}
    if missing := [name for name, found in series.items() if "train/loss_class" not in found]:
        raise UserError(
            f"{missing[0]}: its metrics.jsonl has no training loss; name the --workdir of a "
            "training"
        )
    return loss_figure(series)


def draw(arguments: argparse.Namespace) -> Image.Image | Figure:
    """The picture that the command line asks for."""
    figure = arguments.figure
    if figure == "losses":
        return losses(arguments.paths)
    if arguments.checkpoint is None:
        raise UserError(f"--checkpoint is missing: a {CHECKPOINT}")
    files = _images(arguments)
    model, chosen = load_model(arguments), selection(arguments)
    truth = None
    if arguments.ground_truth is not None:
        truth = read_ground_truth(arguments.ground_truth, model.class_names)
    if figure == "predictions":
        return predictions_sheet(model, files, truth=truth, selection=chosen)
    if figure == "beside":
        names = _two_names(arguments)
        config = arguments.compare_config
        other = load(arguments.compare_with, None if config is None else read_config(config))
        return beside_sheet([model, other], names, files, truth=truth, selection=chosen)
    introspections = [
        introspect(model, read_rgb(file), selection=chosen)
        for file in progress(files, total=len(files))
    ]
    if figure == "activation":
        return activation_figure(introspections, stage=arguments.stage)
    if figure == "embeddings":
        return embeddings(introspections, files, truth=truth)
    return _draw_queries(arguments, introspections, files)


def _images(arguments: argparse.Namespace) -> list[Path]:
    files, videos = find_inputs(arguments.paths, exclude=arguments.output)
    if videos:
        raise UserError(
            f"{videos[0]}: is a video; figures are drawn of images, and python -m dsct_jax "
            "predict draws videos"
        )
    if len(files) > _MAX_IMAGES and arguments.figure != "embeddings":
        raise UserError(
            f"{len(files)} images do not fit on one picture that can be read; give at most "
            f"{_MAX_IMAGES}"
        )
    return files


def _two_names(arguments: argparse.Namespace) -> list[str]:
    if arguments.compare_with is None:
        raise UserError(
            "--compare-with is missing: the second checkpoint, drawn to the right of the first"
        )
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
    first, person = introspections[0], arguments.person
    layers, people = len(first.layers), len(first.subjects)
    if not 0 <= arguments.layer <= layers:
        raise UserError(f"--layer={arguments.layer}: the decoder has layers 1 to {layers}")
    for file, one in zip(files, introspections, strict=True):
        if not one.subjects:
            raise UserError(
                f"{file}: nobody was found in it, so there is no query to draw; lower "
                "--min-confidence or give another image"
            )
    if arguments.figure == "sampling":
        return sampling_figure(introspections, layer=arguments.layer - 1)
    if len(introspections) > 1:
        raise UserError(f"context: draws one image, not {len(introspections)}")
    if not len(first.context_points):
        raise UserError(
            f"{arguments.checkpoint}: has no context queries (config.model.num_context_queries is "
            "0), so there is nothing to draw"
        )
    if not 1 <= person <= people:
        raise UserError(
            f"--person={person}: {people} people were found in {files[0]}, counted from 1, surest "
            "first"
        )
    return context_figure(first, person=person - 1)


def as_image(picture: Image.Image | Figure) -> Image.Image:
    """A figure as RGB pixels, at its own resolution."""
    if isinstance(picture, Image.Image):
        return picture
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _few_colors(image: Image.Image) -> Image.Image:
    """256 colors, dithered: a third of the file, and neither images nor color maps show steps."""
    palette = image.quantize(_COLORS, method=Image.Quantize.FASTOCTREE)
    return image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("figure", choices=FIGURES, metavar="FIGURE", help=", ".join(FIGURES))
    paths = "image, folder of images, or quoted glob pattern (losses: run directory)"
    add("paths", nargs="+", metavar="PATH", help=paths)
    add_checkpoint(parser, required=False)
    parser.add_output("--output", folder=False, required=True, help="the picture, .png")
    truth = "COCO-style annotations of the images (predictions, beside, embeddings)"
    add("--ground-truth", type=expanded_path, help=truth)
    add("--compare-with", type=expanded_path, help="second checkpoint (beside)")
    add("--compare-config", type=expanded_path, help="its configuration; needed for .pth only")
    add("--names", help="of the two checkpoints, as 'early fusion,late fusion' (beside)")
    stages = ["backbone", "encoder"]
    add("--stage", choices=stages, default=stages[0], help="whose maps are drawn (activation)")
    add("--layer", type=int, default=0, help="decoder layer from 1; 0 = the last (sampling)")
    add("--person", type=int, default=1, help="whose context queries; 1 = the surest (context)")
    add_selection(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """The command with its arguments parsed. Raises UserError for what cannot be used."""
    output = arguments.output
    if output.suffix.lower() != ".png":
        raise UserError(f"--output={output}: must be the name of a .png file")
    picture = _few_colors(as_image(draw(arguments)))
    with whole_file(output, "wb") as file:
        picture.save(file, "png", optimize=True)
    print(output)
