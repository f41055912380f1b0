"""A model card of a run: what the model is, what it was trained and measured on, how sure the
numbers are, what it must not be used for."""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsct_jax.config import require, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import stored_decoder, with_fit_beside
from dsct_jax.inference.load import decoder_of, model_config
from dsct_jax.model.build import Network
from dsct_jax.postprocess import Decoder
from dsct_jax.weights.run_directory import DIRECTORY, read_metadata

MODEL_CARD = "MODEL_CARD.md"  # below the workdir

# metric -> its name in the card, and the metric of guessing; fractions, shown in percent
METRICS = {
    "mAP": ("mAP (step-wise average precision)", "chance_mAP"),
    "mAP_envelope": ("mAP (the authors' envelope)", ""),
    "mAP_eleven_point": ("mAP (11 points)", ""),
    "accuracy": ("accuracy", "majority_accuracy"),
    "macro_recall": ("macro recall", ""),
    "macro_f1": ("macro F1", ""),
    "mean_iou": ("mean IoU of the answering box", ""),
    "box_AP50": ("box AP at IoU 0.5", ""),
    "ece": ("expected calibration error", ""),
}

_RESEARCH = "Given out by its authors for non-commercial research"
_DATA = {
    "scenes": "The scenes drawn by this project (data/readers/scenes.py): figures, no images of "
    "people. No license is needed.",
    "coco": "Annotations in COCO style, brought by whoever trained this model. (?) Name the data "
    "set, how it was collected, and its license.",
    "emotic": f"EMOTIC. {_RESEARCH}; the images come from MSCOCO, ADE20K and others, with their "
    "terms.",
    "caer_s": f"CAER-S: frames of television series. {_RESEARCH}.",
    "ncaer_s": f"NCAER-S, made from the clips of CAER. {_RESEARCH}.",
}

_LIMITS = """\
Research on recognizing apparent emotions of people in context. (?) State your own intended use.

- The labels are what annotators thought they saw: **apparent** emotion, guessed from a picture.
  They are not what the person felt; people disagree about them. The model repeats those guesses; it
  does not read minds.
- Expressions differ between cultures, ages and persons, and the data show some of them far more
  often than others. (?) State for whom it was tested; the numbers above are averages over the test
  split and say nothing of groups that it hardly contains.
- The model looks at the surroundings as well as at the person. It can be right or wrong for reasons
  that have nothing to do with the person.
- A score is no certainty. Use the calibration error above, and the thresholds of the run, before a
  score decides anything.
- Numbers of another protocol cannot be compared with these (docs/datasets.md, docs/evaluation.md).
- **Not for** decisions about people: hiring, schooling, insurance, policing, border control,
  health, or watching people who have not agreed. In some places such uses are forbidden by law (in
  the European Union, inferring emotions at work and in education)."""

_LICENSES = """\
- Code: Apache-2.0.
- {weights}
- Data: see above. A model trained on data for non-commercial research is for non-commercial
  research.
- This model: (?) your license, within what the data and the starting weights allow."""


def model_card(workdir: Path, *, split: str = "test") -> str:
    """The card of the run in `workdir` as Markdown. Raises UserError where the directory holds no
    config.json, or no metrics of the split.
    """
    config = read_json(workdir / "config.json", "it is no run directory")
    remedy = f"train.py --mode=eval --split={split} writes it"
    metrics = read_json(workdir / f"metrics_{split}.json", remedy)
    environment = read_json(workdir / "env.json") if (workdir / "env.json").is_file() else {}
    decoder = _decoder(config, workdir, str(metrics.get("checkpoint", "")))
    start = config.get("init_from")
    weights = "It started from random values: no other weights are in it."
    if start:
        weights = f"The weights it started from ({start}): (?) their license."
    sections = {
        "Model": _model_lines(config, environment),
        "Data and protocol": _data_lines(config, metrics, split),
        f"Metrics on the {split} split": _metric_lines(metrics),
        "From scores to labels": _threshold_lines(decoder),
        "What it is for, and what not": [_LIMITS],
        "Licenses": [_LICENSES.format(weights=weights)],
        "Who answers for it": ["(?) Name, address, date. (?) How to report a problem."],
    }
    parts = [f"# Model card: {config.get('name', workdir.name)}"]
    parts += [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n\n".join(parts) + "\n"


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """A run's file. Raises UserError: missing, after which `remedy` stands, or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: missing; {remedy}")
    try:
        return dict(to_builtins(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _model_lines(config: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    network = Network(model_config(config))
    fields = dataclasses.asdict(network.config)
    name, parameters = fields.pop("name"), sum(map(math.prod, network.param_shapes.values()))
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fields.items())
    kind = "one emotion per person"
    if require(config, "multi_label", bool):
        kind = "any number of emotions per person (multi-label)"
    train, seed = config.get("train", {}), config.get("seed", "(?)")
    steps, epochs = train.get("steps"), train.get("epochs")
    length = f"{steps} steps" if steps else f"{epochs:g} epochs" if epochs else "(?) epochs"
    lines = [
        "From an image to its people's boxes and apparent emotions, in JAX.",
        "",
        f"- Network {name}: {settings}.",
        f"- {parameters:,} parameters.",
        f"- {kind}: {', '.join(require(config, 'class_names', tuple))}.",
        f"- Started from: {config.get('init_from') or 'random values'}.",
        f"- Trained for {length}, batch {train.get('batch_size', '(?)')}, seed {seed}.",
    ]
    if versions := environment.get("versions"):
        packages = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"- Code: commit {environment.get('commit') or '(?)'}; {packages}.")
    return lines


def _data_lines(config: Mapping[str, Any], metrics: Mapping[str, Any], split: str) -> list[str]:
    data = require(config, "data", Mapping)
    source = str(data.get("source"))
    protocol = metrics.get("protocol") or data.get("protocol") or "custom"
    images, people, labeled = (
        metrics.get(f"num_{what}", "(?)") for what in ("images", "people", "labelled")
    )
    return [
        _DATA.get(source, f"{source}. (?) How it was collected, and its license."),
        "",
        f"- Protocol: **{protocol}**. Only results of the same protocol can be compared.",
        f"- Training: {data.get('train')}; validation: {data.get('val')}; "
        f"test: {data.get('test')}.",
        f"- Measured on {split}: {images} images, {people} people, {labeled} of them labeled.",
        "- Each annotated person is answered by the query whose box overlaps it most: a person "
        "who was not found still gets an answer.",
        "- (?) Who annotated, how many per person, how well they agreed. (?) Did the people shown "
        "agree?",
    ]


def _metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    intervals = metrics.get("intervals", {})
    note = "No intervals: these metrics were written without a bootstrap; run --mode=eval again."
    if intervals:
        resamples = metrics.get("resamples", "(?)")
        note = f"Intervals: percentile bootstrap over images, {resamples} resamples."
    rows = [
        (title, *map(_percent, (metrics[name], intervals.get(name), metrics.get(guessing))))
        for name, (title, guessing) in METRICS.items()
        if isinstance(metrics.get(name), int | float)
    ]
    lines = [*_table(("metric", "value", "95 % interval", "guessing"), rows), "", note]
    if classes := metrics.get("per_class"):
        rows = [
            (name, *map(_percent, (row.get("AP"), row.get("AP_interval"))), row.get("people", ""))
            for name, row in classes.items()
        ]
        lines += ["", *_table(("class", "AP", "95 % interval", "people"), rows)]
    return lines


def _decoder(config: Mapping[str, Any], workdir: Path, checkpoint: str) -> Decoder:
    """With what was fitted to the weights that were measured, `checkpoint` being "step 3"."""
    decoder, step = decoder_of(config), checkpoint.removeprefix("step ")
    folder = workdir / DIRECTORY / step
    if step.isdecimal() and folder.is_dir():
        return stored_decoder(decoder, read_metadata(folder), workdir, int(step))
    return with_fit_beside(workdir, decoder, checkpoint=checkpoint)


def _threshold_lines(decoder: Decoder) -> list[str]:
    if not decoder.fitted_on:
        several = decoder.multi_label
        rule = "a class counts above 0.5" if several else "the most probable class counts"
        return [f"Nothing was fitted on validation: {rule}."]
    lines = [
        f"Temperature {decoder.temperature:.3g}, fitted on {decoder.fitted_on}: divide the logits "
        "by it to calibrate the scores."
    ]
    if decoder.thresholds:
        pairs = zip(decoder.class_names, decoder.thresholds, strict=True)
        rows = [(name, f"{value:.3f}") for name, value in pairs]
        rule = "A class counts above its threshold, which holds for scores without the temperature:"
        lines += ["", rule, "", *_table(("class", "threshold"), rows)]
    return lines


def _percent(value: Any) -> str:
    """A share, or the two bounds of its interval."""
    if isinstance(value, int | float):
        return f"{100 * value:.2f} %"
    return f"{100 * value[0]:.2f} to {100 * value[1]:.2f}" if value else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output or arguments.workdir / MODEL_CARD
    card = model_card(arguments.workdir, split=arguments.split)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(card, encoding="utf-8")
    questions = card.count("(?)")
    print(f"written: {output}; {questions} questions in it, marked (?), are for you to answer")
