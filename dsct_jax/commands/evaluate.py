"""Every metric of a predictions_<split>.npz, computed again without a model."""

import argparse
from pathlib import Path
from typing import Any

from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import FILE as FIT_FILE
from dsct_jax.evaluation.calibration import fit_decoder, read_fit, save_fit, with_fit_beside
from dsct_jax.evaluation.evaluate import evaluate, write_evaluation
from dsct_jax.evaluation.report import format_table
from dsct_jax.evaluation.results import ResultsInfo, Shown, SplitResults, read_results
from dsct_jax.postprocess import Decoder
from dsct_jax.visualization.drawing import contact_sheet, draw_shown


def run(arguments: argparse.Namespace) -> None:
    if arguments.nms is not None and not 0 <= arguments.nms <= 1:
        raise UserError(f"--nms={arguments.nms} must lie in [0, 1]")
    if arguments.resamples < 0:
        raise UserError(f"--resamples={arguments.resamples} must be 0 or more")
    results = read_results(arguments.predictions)
    metrics = evaluate(
        results,
        nms_threshold=arguments.nms,
        decoder=_fitted(results.about, arguments),
        resamples=arguments.resamples,
        seed=arguments.seed,
    )
    print(format_table(metrics))
    if arguments.output is not None:
        suffix = f"_{results.about.split}" if results.about.split else ""
        paths = write_evaluation(metrics, arguments.output, suffix=suffix)
        print("\nwritten: " + "   ".join(map(str, paths)))


def _fitted(about: ResultsInfo, arguments: argparse.Namespace) -> Decoder:
    """What was fitted to the same weights on another split: as named, as the file carries, or as
    thresholds.json beside it has.
    """
    path = arguments.thresholds
    if path is None:
        if about.decoder.fitted_on or about.split == "val":
            return about.decoder
        folder = arguments.predictions.parent
        return with_fit_beside(folder, about.decoder, checkpoint=about.checkpoint)
    decoder, checkpoint = read_fit(path, about.decoder)
    if checkpoint and about.checkpoint and checkpoint != about.checkpoint:
        reason = f"fitted for {checkpoint}, but {arguments.predictions} is of {about.checkpoint}"
        raise UserError(f"--thresholds={path}: {reason}; evaluate that one, or fit again")
    if decoder.fitted_on == about.split:
        reason = f"fitted on {about.split}, the split of {arguments.predictions} itself"
        remedy = "where they would prove nothing; name another split"
        raise UserError(f"--thresholds={path}: {reason}, {remedy}")
    return decoder


def write_results(
    results: SplitResults, metrics: dict[str, Any], shown: list[Shown], workdir: Path
) -> None:
    """Writes what train.py --mode=eval has found, and says where it is."""
    split, decoder = results.about.split, results.about.decoder
    found = results.about.boxes.startswith("found")
    suffix = f"_{split}_found" if found else f"_{split}"
    predictions, sheet = (workdir / f"predictions{suffix}{end}" for end in (".npz", ".png"))
    results.save(predictions)
    numbers = write_evaluation(metrics, workdir, suffix=suffix)
    line = f"numbers: {'   '.join(map(str, numbers))}   predictions: {predictions}"
    if split == "val" and not found:
        decoder = fit_decoder(results)
        save_fit(decoder, workdir / FIT_FILE, checkpoint=results.about.checkpoint)
    if pictures := draw_shown(shown, decoder):  # none where all of them are damaged
        contact_sheet(pictures, 6).save(sheet)
        line += f"   drawings (dashed: annotated): {sheet}"
    print(line)
    if split == "val" and not found:
        what = "temperature and thresholds fitted for prediction and for the other splits"
        print(f"{what}: {workdir / FIT_FILE}")
    elif not decoder.fitted_on:
        print("no thresholds fitted on validation: --mode=eval --split=val makes them")
