"""Every metric of a predictions_<split>.npz, computed again without a model.

python -m dsct_jax evaluate runs/demo/predictions_test.npz [--output=FOLDER]
"""

import argparse

from dsct_jax.cli import Parser, expanded_path
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import read_calibration
from dsct_jax.evaluation.evaluate import RESAMPLES, evaluate, write_evaluation
from dsct_jax.evaluation.report import format_table
from dsct_jax.evaluation.results import read_results


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    predictions = "predictions_<split>.npz, as train.py --mode=eval writes it"
    add("predictions", type=expanded_path, help=predictions)
    tables = "folder for metrics_<split>.json, .md and .png; default: only print the table"
    parser.add_output("--output", folder=True, help=tables)
    add("--nms", type=float, help="suppress queries that overlap more (IoU) before the selection")
    fitted = "thresholds.json fitted on validation; default: the one beside the file, if any"
    add("--thresholds", type=expanded_path, help=fitted)
    images = "of the images, for the 95 %% intervals; 0 = none (default: %(default)s)"
    add("--resamples", type=int, default=RESAMPLES, help=images)
    add("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """The command with its arguments parsed. Raises UserError for what cannot be used."""
    if arguments.nms is not None and not 0 <= arguments.nms <= 1:
        raise UserError(f"--nms={arguments.nms} must lie in [0, 1]")
    if arguments.resamples < 0:
        raise UserError(f"--resamples={arguments.resamples} must be 0 or more")
    results = read_results(arguments.predictions)
    beside = arguments.predictions.with_name("thresholds.json")
    path = arguments.thresholds or (beside if beside.is_file() else None)
    calibration = (
        None if path is None else read_calibration(path, class_names=results.about.class_names)
    )
    metrics = evaluate(
        results,
        nms_threshold=arguments.nms,
        calibration=calibration,
        resamples=arguments.resamples,
        seed=arguments.seed,
    )
    print(format_table(metrics))
    if arguments.output is not None:
        suffix = f"_{results.about.split}" if results.about.split else ""
        paths = write_evaluation(metrics, arguments.output, suffix=suffix)
        print("\nwritten: " + "   ".join(map(str, paths)))
