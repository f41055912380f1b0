"""The paper's figures from any checkpoint and any images: what the network answered, and what it
looked at.

    python -m dsct_jax visualize FIGURE PATH... --checkpoint=runs/demo --output=figure.png

FIGURE is one of
    predictions   boxes and emotions, beside the annotated ones with --ground-truth                      (Figures 5 and 6)
    activation    how strongly each level of the backbone (--stage=encoder: the encoder) answers  (Figure 7)
    sampling      reference and sampling points of each person, alone and with the context        (Figures 8 and 9)
    context       the context queries each layer selects for a person, and their weights          (Figures 4 and 10)
    beside        the answers of two checkpoints, such as early and late fusion                   (Figure 13)
    embeddings    principal components of the embeddings of all people
    losses        training loss of classification and localisation; PATHs are runs, no checkpoint (Figure 12)

PATHs are images, folders or quoted patterns. --ground-truth is what `python -m data samples` writes
beside the images (COCO style).
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from dsct_jax.cli import Parser, run_command, writing
from dsct_jax.commands.predict import find_inputs, read_image
from dsct_jax.commands.report import read_metrics
from dsct_jax.config import read_config
from dsct_jax.errors import UserError
from dsct_jax.inference.introspection import Introspection, introspect
from dsct_jax.inference.load import Model, load
from dsct_jax.inference.predict import predict
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

Truth = dict[str, list[Subject]]  # file name -> annotated people


def read_ground_truth(path: Path, class_names: Sequence[str]) -> Truth:
    """Annotated people by file name, from a COCO-style file: bbox [x y w h] in pixels, category_id
    a class number or a list of them.

    Raises:
        UserError: the file is missing, damaged, or names a class that the model does not have.
    """
    if not path.is_file():
        raise UserError(f"--ground-truth={path}: no such file")
    try:
        content = json.loads(path.read_text())
        names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        truth: Truth = {name: [] for name in names.values()}
        for person in content["annotations"]:
            x, y, w, h = (float(side) for side in person["bbox"])
            ids = (
                person["category_id"]
                if isinstance(person["category_id"], list)
                else [person["category_id"]]
            )
            labels = tuple(class_names[i] for i in ids)
            truth[names[person["image_id"]]].append(
                Subject(box=(x, y, x + w, y + h), probabilities={}, labels=labels, paper_score=1.0)
            )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"--ground-truth={path}: not COCO-style annotations for {len(class_names)} classes "
            f"({type(error).__name__}: {error})"
        ) from None
    return truth


def predictions_sheet(
    model: Model, files: Sequence[Path], *, truth: Truth | None, selection: Selection
) -> Image.Image:
    """Fig. 5 and 6: every image with the people found in it; with `truth`, the annotated ones to
    the left of it.
    """
    images = [read_image(file) for file in files]
    answers = _answers(model, images, selection)
    tiles: list[Image.Image] = []
    captions: list[str] = []
    for file, image, people in zip(files, images, answers, strict=True):
        if truth is not None:
            annotated = truth.get(file.name, [])
            tiles.append(draw_subjects(image, sort_left_to_right(annotated)))
            captions.append(f"{file.name}: annotated")
        tiles.append(draw_subjects(image, sort_left_to_right(people)))
        captions.append(f"{file.name}: predicted" if truth is not None else file.name)
    return contact_sheet(tiles, 4, captions=captions)


def beside_sheet(
    models: Sequence[Model],
    names: Sequence[str],
    files: Sequence[Path],
    *,
    truth: Truth | None,
    selection: Selection,
) -> Image.Image:
    """Fig. 13: the answers of all checkpoints side by side, two images a row.

    With `truth` each caption counts the annotated people whose emotions are right.
    """
    images = [read_image(file) for file in files]
    answers = [_answers(model, images, selection) for model in models]
    tiles: list[Image.Image] = []
    captions: list[str] = []
    for number, (file, image) in enumerate(zip(files, images, strict=True)):
        annotated = None if truth is None else truth.get(file.name, [])
        for name, found in zip(names, answers, strict=True):
            tiles.append(
                draw_subjects(image, sort_left_to_right(found[number]), ground_truth=annotated)
            )
            right = (
                ""
                if annotated is None
                else f": {sum(_is_right(person, found[number]) for person in annotated)} of {len(annotated)} right"
            )
            captions.append(f"{name}{right}")
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
    match = _nearest(person, found)
    return match is not None and set(match.labels) == set(person.labels)


def _nearest(person: Subject, candidates: Sequence[Subject]) -> Subject | None:
    """The candidate that overlaps a person most, None where none does enough to be the same person."""
    best = max(candidates, key=lambda other: _overlap(person, other), default=None)
    return best if best is not None and _overlap(person, best) >= _SAME_PERSON else None


def _overlap(a: Subject, b: Subject) -> float:
    """IoU of two boxes."""
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(one.box[2] - one.box[0]) * (one.box[3] - one.box[1]) for one in (a, b)]
    return width * height / (sum(areas) - width * height)


def introspect_all(
    model: Model, files: Sequence[Path], *, selection: Selection
) -> list[Introspection]:
    """What the model looked at in each file, with progress on the terminal where it takes long."""
    return [
        introspect(model, read_image(file), selection=selection)
        for file in tqdm(files, unit="image", delay=3, leave=False)
    ]


def embeddings(
    introspections: Sequence[Introspection], files: Sequence[Path], *, truth: Truth | None
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


def _embedding_label(subject: Subject, file: Path, truth: Truth | None) -> str:
    if truth is None:
        return subject.labels[0] if subject.labels else "none"
    match = _nearest(subject, truth.get(file.name, []))
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
    if arguments.figure == "losses":
        return losses(arguments.paths)
    if arguments.checkpoint is None:
        raise UserError(
            "--checkpoint is missing: a run directory, a .safetensors file or a released .pth "
            "(with --config)"
        )
    files, videos = find_inputs(arguments.paths, exclude=Path(arguments.output))
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
    model = _load(arguments.checkpoint, arguments.config)
    truth = (
        None
        if arguments.ground_truth is None
        else read_ground_truth(arguments.ground_truth, model.class_names)
    )
    selection = Selection(
        threshold=arguments.threshold, min_confidence=arguments.min_confidence, nms=arguments.nms
    )
    if arguments.figure == "predictions":
        return predictions_sheet(model, files, truth=truth, selection=selection)
    if arguments.figure == "beside":
        if arguments.compare_with is None:
            raise UserError(
                "--compare-with is missing: the second checkpoint, drawn to the right of the first"
            )
        names = (
            arguments.names.split(",")
            if arguments.names
            else [str(arguments.checkpoint), str(arguments.compare_with)]
        )
        if len(names) != 2:
            raise UserError(
                f"--names={arguments.names}: must be two names with a comma between them"
            )
        other = _load(arguments.compare_with, arguments.compare_config)
        return beside_sheet([model, other], names, files, truth=truth, selection=selection)
    introspections = introspect_all(model, files, selection=selection)
    if arguments.figure == "activation":
        return activation_figure(introspections, stage=arguments.stage)
    if arguments.figure == "embeddings":
        return embeddings(introspections, files, truth=truth)
    return _draw_queries(arguments, introspections, files)


def _load(checkpoint: str, config: str | None) -> Model:
    return load(checkpoint, read_config(Path(config)) if config else None)


def _draw_queries(
    arguments: argparse.Namespace, introspections: Sequence[Introspection], files: Sequence[Path]
) -> Figure:
    """The figures of single people: sampling and context."""
    layers, person = len(introspections[0].layers), arguments.person
    if not 1 <= arguments.layer <= layers and arguments.layer != 0:
        raise UserError(f"--layer={arguments.layer}: the decoder has layers 1 to {layers}")
    if nobody := [
        str(file) for file, one in zip(files, introspections, strict=True) if not one.subjects
    ]:
        raise UserError(
            f"{nobody[0]}: nobody was found in it, so there is no query to draw; lower "
            "--min-confidence or give another image"
        )
    if arguments.figure == "sampling":
        return sampling_figure(introspections, layer=arguments.layer - 1)
    if len(introspections) > 1:
        raise UserError(f"context: draws one image, not {len(introspections)}")
    if not len(introspections[0].context_points):
        raise UserError(
            f"{arguments.checkpoint}: has no context queries (config.model.num_context_queries is "
            "0), so there is nothing to draw"
        )
    if not 1 <= person <= len(introspections[0].subjects):
        raise UserError(
            f"--person={person}: {len(introspections[0].subjects)} people were found in "
            f"{files[0]}, counted from 1, surest first"
        )
    return context_figure(introspections[0], person=person - 1)


def as_image(picture: Image.Image | Figure) -> Image.Image:
    """A figure as RGB pixels, at its own resolution."""
    if isinstance(picture, Image.Image):
        return picture
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _few_colors(image: Image.Image) -> Image.Image:
    """256 colours, dithered: a third of the file, and neither images nor colour maps show steps."""
    palette = image.quantize(_COLORS, method=Image.Quantize.FASTOCTREE)
    return image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="python -m dsct_jax visualize", description=__doc__)
    parser.add_argument("figure", choices=FIGURES, metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="image, folder of images, or quoted glob pattern (losses: run directory)",
    )
    parser.add_argument(
        "--checkpoint", help="run directory, .safetensors file, or released .pth (with --config)"
    )
    parser.add_argument("--output", required=True, help="the picture, .png")
    parser.add_argument(
        "--config",
        help="configuration (.py or .json) that describes the weights; needed for .pth only",
    )
    parser.add_argument(
        "--ground-truth",
        type=Path,
        help="COCO-style annotations of the images (predictions, beside, embeddings)",
    )
    parser.add_argument("--compare-with", help="second checkpoint (beside)")
    parser.add_argument("--compare-config", help="its configuration; needed for .pth only")
    parser.add_argument(
        "--names",
        help="what the two checkpoints are called, such as 'early fusion,late fusion' (beside)",
    )
    parser.add_argument(
        "--stage",
        choices=["backbone", "encoder"],
        default="backbone",
        help="whose maps are drawn (activation)",
    )
    parser.add_argument(
        "--layer", type=int, default=0, help="decoder layer from 1; 0 = the last (sampling)"
    )
    parser.add_argument(
        "--person",
        type=int,
        default=1,
        help="whose context queries, from 1, surest first (context)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="multi-label: probability that makes a class a label; else as fitted",
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        help="confidence below which a query is nobody; else as fitted, or 0.3",
    )
    parser.add_argument(
        "--nms",
        type=float,
        default=Selection.nms,
        help="overlap (IoU) above which two boxes are the same person; 1 = keep all",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """The command with its arguments parsed. Raises UserError for what cannot be used."""
    output = Path(arguments.output)
    if output.suffix.lower() != ".png":
        raise UserError(f"--output={output}: must be the name of a .png file")
    picture = draw(arguments)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _few_colors(as_image(picture)).save(output, optimize=True)
    print(output)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a user's mistake is one line on stderr and exit status 2."""
    return run_command(lambda: run(make_parser().parse_args(argv)))
