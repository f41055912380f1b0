"""A model card of a run: what the model is, what it was trained and measured on, how sure the
numbers are, what it must not be used for.

    python -m dsct_jax model_card --workdir=runs/demo [--split=test] [--output=MODEL_CARD.md]

Filled from the run's config.json, env.json, metrics_<split>.json (train.py --mode=eval) and, where
they exist, thresholds.json. What a run cannot know stands in the card as a question, marked "(?)".
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsct_jax.cli import Parser, run_command, writing
from dsct_jax.config import read_config, require, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.inference.load import model_config
from dsct_jax.model.build import Network

# metric -> its name in the card; fractions, shown in percent
_METRICS = {
    "mAP": "mAP (step-wise average precision)",
    "mAP_envelope": "mAP (the authors' envelope)",
    "mAP_eleven_point": "mAP (11 points)",
    "accuracy": "accuracy",
    "macro_recall": "macro recall",
    "macro_f1": "macro F1",
    "mean_iou": "mean IoU of the answering box",
    "box_AP50": "box AP at IoU 0.5",
    "ece": "expected calibration error",
}
_CHANCE = {"mAP": "chance_mAP", "accuracy": "majority_accuracy"}

_DATA = {
    "scenes": "The scenes drawn by this project (data/readers/scenes.py): figures, no images, no people. No licence is needed.",
    "coco": "Annotations in COCO style, brought by whoever trained this model. (?) Name the data set, how it was collected, and its licence.",
    "emotic": "EMOTIC. Given out by its authors for non-commercial research; the images come from MSCOCO, ADE20K and others, with their terms.",
    "caer_s": "CAER-S: frames of television series. Given out by its authors for non-commercial research.",
    "ncaer_s": "NCAER-S, made from the clips of CAER. CAER is given out by its authors for non-commercial research.",
}

_LIMITS = """\
- The labels are what annotators thought they saw: **apparent** emotion, guessed from a picture. They are not what the person felt; people disagree
  about them. The model repeats those guesses; it does not read minds.
- Expressions differ between cultures, ages and persons, and the data show some of them far more often than others. (?) State for whom it was tested;
  the numbers above are averages over the test split and say nothing of groups that it hardly contains.
- The model introspections at the surroundings as well as at the person. It can be right or wrong for reasons that have nothing to do with the person.
- A score is no certainty. Use the calibration error above, and the thresholds of the run, before a score decides anything.
- Numbers of another protocol cannot be compared with these (docs/datasets.md, docs/evaluation.md).
- **Not for** decisions about people: hiring, schooling, insurance, policing, border control, health, or watching people who have not agreed. In some
  places such uses are forbidden by law (in the European Union, inferring emotions at work and in education)."""


def model_card(workdir: Path, *, split: str = "test") -> str:
    """The card of the run in `workdir` as Markdown.

    Raises:
        UserError: the directory holds no config.json, or no metrics of the split; the line says how
            to make them.
    """
    config = read_config(_existing(workdir / "config.json", "it is no run directory"))
    metrics = _read_json(
        _existing(
            workdir / f"metrics_{split}.json", f"train.py --mode=eval --split={split} writes it"
        )
    )
    environment = _read_json(workdir / "env.json") if (workdir / "env.json").is_file() else {}
    thresholds = (
        _read_json(workdir / "thresholds.json") if (workdir / "thresholds.json").is_file() else None
    )
    sections = {
        "Model": _model_lines(config, environment),
        "Data and protocol": _data_lines(config, metrics, split),
        f"Metrics on the {split} split": _metric_lines(metrics),
        "From scores to labels": _threshold_lines(config, thresholds),
        "What it is for, and what not": [
            "Research on recognising apparent emotions of people in context. (?) State your own "
            "intended use.",
            "",
            _LIMITS,
        ],
        "Licences": _licence_lines(config),
        "Who answers for it": ["(?) Name, address, date. (?) How to report a problem."],
    }
    parts = [f"# Model card: {config.get('name', workdir.name)}"]
    parts += [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n\n".join(parts) + "\n"


def _existing(path: Path, remedy: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: missing; {remedy}")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(to_builtins(json.loads(path.read_text())))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _model_lines(config: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    functions = Network(model_config(config))
    model = functions.config
    parameters = sum(int(np.prod(shape)) for shape in functions.param_shapes.values())
    kind = (
        "any number of emotions a person (multi-label)"
        if require(config, "multi_label", bool)
        else "one emotion a person"
    )
    versions, train = environment.get("versions", {}), config.get("train", {})
    length = (
        f"{train['steps']} steps" if train.get("steps") else f"{train.get('epochs', '(?)')} epochs"
    )
    lines = [
        "Decoupled Subject-Context Transformer (ACM MM 2024), in JAX: from a image to its "
        "people's boxes and apparent emotions, in one stage.",
        "",
        f"- Backbone {model.backbone} ({model.norm}), {model.num_encoder_layers} encoder and "
        f"{model.num_decoder_layers} decoder layers of size "
        f"{model.hidden_dim}, {model.num_subject_queries} subject and {model.num_context_queries} "
        f"context queries; fusion: {model.fusion}, "
        f"{model.num_spatial_neighbors} nearest and {model.num_semantic_neighbors} "
        f"{model.semantic_selection} in relevance.",
        f"- {parameters:,} parameters.",
        f"- {kind}: {', '.join(require(config, 'class_names', tuple))}.",
        f"- Started from: {config.get('init_from') or 'random values'}.",
        f"- Trained for {length}, batch {train.get('batch_size', '(?)')}, seed "
        f"{config.get('seed', '(?)')}.",
    ]
    if versions:
        lines.append(
            f"- Code: commit {environment.get('commit') or '(?)'}; "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + "."
        )
    return lines


def _data_lines(config: Mapping[str, Any], metrics: Mapping[str, Any], split: str) -> list[str]:
    data = require(config, "data", Mapping)
    source = str(data.get("source"))
    protocol = metrics.get("protocol") or data.get("protocol") or "custom"
    return [
        _DATA.get(source, f"{source}. (?) How it was collected, and its licence."),
        "",
        f"- Protocol: **{protocol}**. Only results of the same protocol can be compared.",
        f"- Training: {data.get('train')}; validation: {data.get('val')}; test: "
        f"{data.get('test')}.",
        f"- Measured on {split}: {metrics.get('num_images', '(?)')} images, "
        f"{metrics.get('num_people', '(?)')} people, "
        f"{metrics.get('num_labelled', '(?)')} of them labelled.",
        "- Each annotated person is answered by the query whose box overlaps it most: a person "
        "who was not found still gets an answer.",
        "- (?) Who annotated, how many a person, how well they agreed. (?) Did the people shown "
        "agree?",
    ]


def _metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    intervals = metrics.get("intervals", {})
    rows = [
        (
            title,
            _percent(metrics[name]),
            _interval(intervals.get(name)),
            _percent(metrics.get(_CHANCE.get(name, ""))),
        )
        for name, title in _METRICS.items()
        if isinstance(metrics.get(name), int | float)
    ]
    lines = _table(("metric", "value", "95 % interval", "guessing"), rows)
    if intervals:
        lines += [
            "",
            f"Intervals: percentile bootstrap over images, {metrics.get('resamples', '(?)')} "
            "resamples.",
        ]
    else:
        lines += [
            "",
            "No intervals: these metrics were written without a bootstrap; run train.py "
            "--mode=eval again.",
        ]
    classes = metrics.get("per_class", {})
    of_classes = [
        (
            name,
            _percent(row.get("AP")),
            _interval(row.get("AP_interval")),
            str(row.get("people", "")),
        )
        for name, row in classes.items()
    ]
    return (
        [*lines, "", *_table(("class", "AP", "95 % interval", "people"), of_classes)]
        if classes
        else lines
    )


def _threshold_lines(config: Mapping[str, Any], thresholds: Mapping[str, Any] | None) -> list[str]:
    names = require(config, "class_names", tuple)
    if thresholds is None:
        rule = (
            "a class counts above 0.5"
            if config.get("multi_label")
            else "the most probable class counts"
        )
        return [f"Nothing was fitted on validation: {rule}."]
    split = thresholds.get("fitted_on") or thresholds.get("split", "val")
    lines = [
        f"Temperature {thresholds.get('temperature', 1):.3g}, fitted on {split}: divide the "
        "logits by it to calibrate the scores."
    ]
    values = thresholds.get("thresholds")
    if values:
        lines += [
            "",
            "A class counts above its threshold, which holds for scores without the temperature:",
        ]
        lines += [
            "",
            *_table(
                ("class", "threshold"),
                [(name, f"{value:.3f}") for name, value in zip(names, values, strict=True)],
            ),
        ]
    return lines


def _licence_lines(config: Mapping[str, Any]) -> list[str]:
    start = config.get("init_from")
    weights = (
        f"- The weights it started from ({start}): (?) their licence."
        if start
        else "- It started from random values: no other weights are in it."
    )
    return [
        "- Code: Apache-2.0.",
        weights,
        "- Data: see above. A model trained on data for non-commercial research is for "
        "non-commercial research.",
        "- This model: (?) your licence, within what the data and the starting weights allow.",
    ]


def _percent(value: Any) -> str:
    return f"{100 * value:.2f} %" if isinstance(value, int | float) else ""


def _interval(bounds: Any) -> str:
    return f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}" if bounds else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="python -m dsct_jax model_card", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="directory of the run")
    parser.add_argument("--split", default="test", help="whose metrics_<split>.json to show")
    parser.add_argument(
        "--output", type=Path, help="file to write; left out: WORKDIR/MODEL_CARD.md"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """The command with its arguments parsed. Raises UserError for what cannot be used."""
    output = arguments.output or arguments.workdir / "MODEL_CARD.md"
    card = model_card(arguments.workdir, split=arguments.split)
    with writing(output):
        output.write_text(card)
    print(
        f"written: {output}; {card.count('(?)')} questions in it, marked (?), are for you to answer"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a user's mistake is one line on stderr and exit status 2."""
    return run_command(lambda: run(make_parser().parse_args(argv)))
