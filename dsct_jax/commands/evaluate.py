"""Every metric of a predictions_<split>.npz, computed again without a model."""

import argparse

from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import read_fit, with_fit_beside
from dsct_jax.evaluation.evaluate import evaluate, write_evaluation
from dsct_jax.evaluation.report import format_table
from dsct_jax.evaluation.results import ResultsInfo, read_results
from dsct_jax.postprocess import Decoder


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
