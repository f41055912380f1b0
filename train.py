"""Trains and evaluates a model: configuration -> data -> model -> state -> loop.

    python train.py --config=configs/demo.py --workdir=runs/demo [--config.section.field=value ...]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=eval [--split=test]
        [--checkpoint=best]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=plan

The same command again continues from the newest checkpoint in the workdir. docs/training.md has the
rest.
"""

import contextlib
import dataclasses
import errno
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from data.command import override
from data.config import SPLITS, DataConfig
from data.pipeline import Dataset, make_dataset
from dsct_jax.batch import Batch, Predictions
from dsct_jax.cli import Parser, run_command
from dsct_jax.config import dataclass_from_dict, read_config, require, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import FILE as CALIBRATION_FILE
from dsct_jax.evaluation.calibration import Calibration, calibration_of_run, parse_calibration
from dsct_jax.evaluation.collect import collect_results
from dsct_jax.evaluation.evaluate import RESAMPLES, evaluate, fit_calibration, write_evaluation
from dsct_jax.evaluation.measures import LOWER_IS_BETTER
from dsct_jax.evaluation.report import format_table
from dsct_jax.evaluation.results import ResultsInfo, Shown, SplitResults
from dsct_jax.inference.load import model_config
from dsct_jax.model.build import FlatParams, Network
from dsct_jax.model.dsct import DSCTConfig
from dsct_jax.parallel import Prefetch, make_mesh, replicate, shard_batch
from dsct_jax.postprocess import has_subject_logit
from dsct_jax.runtime import AUTO, init_distributed, start_process
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.logbook import Logbook, versions, write_settings
from dsct_jax.training.loop import (
    Best,
    Meter,
    Preempted,
    Schedule,
    TrainConfig,
    log_config_changes,
    parse_window,
    train_loop,
)
from dsct_jax.training.losses import LossConfig
from dsct_jax.training.matching import MatcherConfig
from dsct_jax.training.memory_plan import format_plan, make_plan
from dsct_jax.training.optimizer import OptimizerConfig, learning_rates
from dsct_jax.training.step import (
    TrainState,
    TrainStep,
    initial_state,
    make_eval_step,
    make_train_step,
)
from dsct_jax.visualization.drawing import contact_sheet, draw_shown
from dsct_jax.weights.pretrained import load_pretrained
from dsct_jax.weights.run_directory import (
    Weights,
    best_step,
    load_weights,
    newest_step,
    require_same_model,
    require_same_shapes,
)

SHOWN_METRICS = ("mAP", "accuracy", "macro_f1", "mean_iou")  # in the line of a validation
DRAWN_IMAGES = 24  # on the contact sheet of an evaluation
DRAWN_IN_TRAINING = 6  # of each validation


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole configuration as the library takes it."""

    name: str
    seed: int
    init_from: str
    class_names: tuple[str, ...]
    multi_label: bool
    model: DSCTConfig
    matcher: MatcherConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig

    @property
    def best_metric(self) -> str:
        """What the best checkpoint is best by."""
        return self.train.best_metric or ("mAP" if self.multi_label else "accuracy")

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> "RunConfig":
        """Raises UserError at the first field that is unknown, missing, or cannot be used."""
        sections = {
            "matcher": MatcherConfig,
            "loss": LossConfig,
            "optimizer": OptimizerConfig,
            "train": TrainConfig,
        }
        parts: dict[str, Any] = {
            name: dataclass_from_dict(kind, name, require(config, name, Mapping))
            for name, kind in sections.items()
        }
        parts["model"] = model_config(config)
        classes = {
            "class_names": require(config, "class_names", tuple),
            "multi_label": require(config, "multi_label", bool),
        }
        parts["data"] = dataclass_from_dict(
            DataConfig, "data", require(config, "data", Mapping), **classes
        )
        rest = {key: value for key, value in config.items() if key not in parts}
        return dataclass_from_dict(cls, "", rest, **parts)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_mapping`, as JSON can hold it: stored with a run and its weights."""
        config = to_builtins(dataclasses.asdict(self))
        for section, field in (
            ("model", "num_classes"),
            ("data", "class_names"),
            ("data", "multi_label"),
        ):
            del config[section][field]  # stands at the top level
        return config


def train(
    run: RunConfig, workdir: Path, *, profile: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Trains to the end of the schedule, evaluating and saving on the way; returns the last
    validation metrics.

    Args:
        profile: (first step, last step) that jax's profiler records, below `workdir`/profile.

    Raises:
        Preempted: the run was asked to stop by SIGTERM, and has saved.
    """
    mesh = make_mesh()
    run.train.require_divisible(mesh.size)

    # Data
    train_data = build_dataset(run, "train", training=True)
    val_data = build_dataset(run, "val", training=False)
    schedule = Schedule.of(run.train, train_data.steps_per_epoch)

    # Model and state. What the run starts from, the first that applies:
    # 1. continue: the newest checkpoint in the workdir that can be read, with everything in it;
    # 2. init_from: the weights of config.init_from; what that file does not have, as in 3;
    # 3. random: initial weights by config.seed.
    network = Network(run.model)
    params, norm_stats = network.init(run.seed)
    if run.init_from and newest_step(workdir) is None:
        params, norm_stats = pretrained(network, params, norm_stats, run, workdir)
    optimizer, state = build_state(run, params, norm_stats, schedule.total, mesh)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(open_checkpoints(run, workdir, schedule))
        state, stored = checkpoints.restore_newest(state) or (state, {})

        # Loop
        start_step, progress = int(state.step), stored.get("progress", {})
        logbook = stack.enter_context(open_logbook(run, workdir, state, stored, schedule))
        best = Best(run.best_metric, lower_is_better=run.best_metric in LOWER_IS_BETTER)
        best.load_state(progress)
        validation = partial(
            validate,
            run=run,
            data=val_data,
            eval_step=make_eval_step(network, mesh=mesh),
            mesh=mesh,
            logbook=logbook,
        )
        if progress.get("validation_owed"):
            best.add(start_step, validation(start_step, state)[0])
        if start_step >= schedule.total:
            logbook.log(
                f"nothing left to train: {workdir} is already at step {start_step}; raise "
                "config.train.epochs to go on, or use --mode=eval"
            )
        if start_step >= schedule.total or best.stops(run.train, logbook):
            return {}
        batches = Prefetch(
            train_data.iterator(start_step, schedule.total - start_step),
            lambda batch: shard_batch(batch, mesh),
        )
        metrics = train_loop(
            train_step(network, optimizer, run, mesh),
            state,
            stack.enter_context(batches),
            config=run.train,
            schedule=schedule,
            checkpoints=checkpoints,
            logbook=logbook,
            meter=Meter(progress.get("pending", ())),
            best=best,
            validate=validation,
            learning_rates=partial(learning_rates, run.optimizer, schedule.total),
            max_programs=len(run.data.buckets),
            profile=profile,
        )
        report_skipped(train_data, val_data, log=logbook.log)
        best.report(logbook)
    return metrics


def build_dataset(run: RunConfig, split: str, *, training: bool) -> Dataset:
    """The data of one split for this process; says what was read and what had to be left out."""
    batch_size = run.train.batch_size if training else run.train.eval_batch_size
    hosts = {"host_index": jax.process_index(), "host_count": jax.process_count()}
    data = make_dataset(
        run.data, split, batch_size=batch_size, seed=run.seed, training=training, **hosts
    )
    if jax.process_index() == 0:
        print(f"{split}: {data.report}", flush=True)
    if data.report.people == 0:
        raise UserError(
            f"{data.report.source}: shows no person; {split} data need at least one box inside an "
            "image"
        )
    return data


def pretrained(
    network: Network, params: FlatParams, norm_stats: FlatParams, run: RunConfig, workdir: Path
) -> tuple[FlatParams, FlatParams]:
    """The weights of config.init_from in the place of random ones; what was taken is printed and
    kept in init_from.txt.
    """
    params, norm_stats, lines = load_pretrained(
        run.init_from, network, params, norm_stats, run.to_dict()
    )
    if jax.process_index() == 0:
        print("\n".join(lines), flush=True)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "init_from.txt").write_text("\n".join(lines) + "\n")
    return params, norm_stats


def build_state(
    run: RunConfig, params: FlatParams, norm_stats: FlatParams, total_steps: int, mesh: Mesh
) -> tuple[optax.GradientTransformationExtraArgs, TrainState]:
    """The optimizer, and the state before step 0."""
    step_config = run.train.step_config
    return initial_state(
        params,
        norm_stats,
        run.optimizer,
        total_steps=total_steps,
        mesh=mesh,
        step_config=step_config,
    )


def open_checkpoints(
    run: RunConfig, workdir: Path, schedule: Schedule
) -> contextlib.closing[Checkpoints]:
    """The checkpoints of a run, each of which says how it came about."""
    metadata = {
        "config": run.to_dict(),
        "class_names": run.class_names,
        "seed": run.seed,
        "steps_per_epoch": schedule.epoch,
        "versions": versions(),
    }
    return contextlib.closing(
        Checkpoints(workdir, keep=run.train.keep_checkpoints, metadata=metadata)
    )


def open_logbook(
    run: RunConfig, workdir: Path, state: TrainState, stored: Mapping[str, Any], schedule: Schedule
) -> contextlib.closing[Logbook]:
    """The log of a run, which says what has changed since the start before."""
    config, start_step = run.to_dict(), int(state.step)
    changed = write_settings(config, workdir) if jax.process_index() == 0 else []
    logbook = Logbook(
        workdir,
        start_step=start_step,
        total_steps=schedule.total,
        validation_owed=stored.get("progress", {}).get("validation_owed", False),
        wandb=run.train.wandb,
        config=config,
    )
    trained = sum(value.size for value in state.params.values())
    logbook.log(
        f"{run.name}: {trained:,} trained parameters, {jax.device_count()} device(s), "
        f"steps {start_step} to {schedule.total}"
    )
    if jax.process_count() > 1:
        logbook.log(f"process 0 of {jax.process_count()}, the only one that writes")
    if start_step > 0:
        log_config_changes(logbook, changed, stored, schedule.epoch)
    return contextlib.closing(logbook)


def train_step(
    network: Network, optimizer: optax.GradientTransformation, run: RunConfig, mesh: Mesh
) -> TrainStep:
    """The step of a run."""
    return make_train_step(
        network,
        optimizer,
        loss=run.loss,
        matcher=run.matcher,
        multi_label=run.multi_label,
        mesh=mesh,
        seed=run.seed,
        step_config=run.train.step_config,
    )


def validate(
    step: int,
    state: TrainState,
    *,
    run: RunConfig,
    data: Dataset,
    eval_step: Callable[[FlatParams, FlatParams, Batch], Predictions],
    mesh: Mesh,
    logbook: Logbook,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of the weights as they are, averaged if the run keeps an average; and what was fitted
    for prediction with them, to be stored beside them.
    """
    weights = (state.ema or state.params) | state.frozen_params
    results, shown = collect(
        partial(eval_step, weights, state.norm_stats),
        data,
        "val",
        run=run,
        mesh=mesh,
        keep=DRAWN_IN_TRAINING if jax.process_index() == 0 else 0,
        checkpoint=f"step {step}",
    )
    metrics, fitted = evaluate(results), fit_calibration(results)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    logbook.write(step, {f"val/{name}": value for name, value in numbers.items()})
    if pictures := draw_shown(shown, results.about, fitted):  # none where all are damaged
        logbook.image(step, "val/predictions", contact_sheet(pictures, 3))
    shortly = [f"{name} {metrics[name]:.3f}" for name in SHOWN_METRICS if name in metrics]
    logbook.log(f"validation: {'  '.join(shortly)}")
    return metrics, dataclasses.asdict(fitted)


def collect(
    predict: Callable[[Batch], Predictions],
    data: Dataset,
    split: str,
    *,
    run: RunConfig,
    mesh: Mesh,
    keep: int,
    checkpoint: str = "",
) -> tuple[SplitResults, list[Shown]]:
    """(what `predict` says of every image of `data`, the first `keep` images with it); `checkpoint`
    is kept with the results, for people.
    """
    subject_logit = has_subject_logit(multi_label=run.multi_label, class_loss=run.loss.class_loss)
    about = ResultsInfo(
        run.class_names, run.multi_label, subject_logit, data.report.protocol, split, checkpoint
    )
    return collect_results(
        predict,
        data.iterator(),
        about,
        num_images=data.num_images,
        source=data.report.source,
        mesh=mesh,
        keep=keep,
    )


def report_skipped(*datasets: Dataset, log) -> None:
    """At the end of a run: how many images could not be read (only with config.data.skip_corrupt)."""
    damaged = {name for data in datasets for name in data.skipped}
    unreadable = sum(data.report.unreadable for data in datasets)
    if damaged or unreadable:
        log(
            f"left out: {unreadable} image(s) that could not be opened and {len(damaged)} with "
            "damaged pixels"
        )


def print_plan(run: RunConfig) -> None:
    """What a training run would take: parameters, memory, compile time and arithmetic. Compiles
    every program; reads no data.
    """
    mesh = make_mesh()
    run.train.require_divisible(mesh.size)
    network = Network(run.model)
    optimizer, state = build_state(run, *network.init(run.seed), 1, mesh)
    print(
        f"{run.name}: {mesh.size} {jax.devices()[0].device_kind} device(s); compiling "
        f"{len(run.data.buckets)} size(s) of images ...",
        flush=True,
    )
    plan = make_plan(
        train_step(network, optimizer, run, mesh),
        state,
        run.data.buckets,
        batch_size=run.train.batch_size,
        max_targets=run.data.max_targets,
        num_classes=len(run.class_names),
    )
    print(format_plan(plan))


def evaluate_checkpoint(
    run: RunConfig, workdir: Path, split: str, *, step: int | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint (None: the newest that can be read) on a split under every protocol of
    docs/evaluation.md.

    Prints the table; writes metrics_<split>.json, .md and .png, predictions_<split>.npz (what
    `python -m dsct_jax evaluate` reads) and predictions_<split>.png into `workdir`, and, on the
    validation split, thresholds.json, for checkpoints without a validation of their own.
    """
    mesh = make_mesh()
    run.train.require_divisible(mesh.size)
    weights = load_weights(workdir, step)
    require_same_model(weights.metadata["config"], run.to_dict(), str(workdir))
    network, values = Network(run.model), (weights.params, weights.norm_stats)
    shapes = network.param_shapes | network.norm_stats_shapes
    require_same_shapes(shapes, weights.params | weights.norm_stats, str(workdir))
    calibration = stored_calibration(weights, workdir, run) if split != "val" else None
    data = build_dataset(run, split, training=False)
    results, shown = collect(
        partial(make_eval_step(network, mesh=mesh), *replicate(values, mesh)),
        data,
        split,
        run=run,
        mesh=mesh,
        keep=DRAWN_IMAGES,
        checkpoint=f"step {weights.step}",
    )
    metrics = evaluate(results, calibration=calibration, resamples=RESAMPLES, seed=run.seed)
    if jax.process_index() == 0:
        print(format_table(metrics))
        report_skipped(data, log=print)
        write_results(results, metrics, shown, calibration, workdir)
    return metrics


def stored_calibration(weights: Weights, workdir: Path, run: RunConfig) -> Calibration | None:
    """What a validation fitted for exactly these weights: stored with them, or in thresholds.json."""
    if "decoder" not in weights.metadata:
        return calibration_of_run(workdir, class_names=run.class_names, step=weights.step)
    text, where = json.dumps(weights.metadata["decoder"]), f"{workdir}, step {weights.step}"
    return parse_calibration(text, class_names=run.class_names, where=where)


def write_results(
    results: SplitResults,
    metrics: dict[str, Any],
    shown: list[Shown],
    calibration: Calibration | None,
    workdir: Path,
) -> None:
    """Writes what `evaluate_checkpoint` has found, and says where it is."""
    split = results.about.split
    fitted = fit_calibration(results) if split == "val" else None
    predictions, sheet = (workdir / f"predictions_{split}.{end}" for end in ("npz", "png"))
    results.save(predictions)
    numbers = write_evaluation(metrics, workdir, suffix=f"_{split}")
    line = f"numbers: {'   '.join(map(str, numbers))}   predictions: {predictions}"
    if pictures := draw_shown(shown, results.about, fitted or calibration):
        contact_sheet(pictures, 6).save(sheet)
        line += f"   drawings (dashed: annotated): {sheet}"
    print(line)
    if fitted is not None:
        fitted.save(workdir / CALIBRATION_FILE)
        print(
            "temperature and thresholds fitted for prediction and for the other splits: "
            f"{workdir / CALIBRATION_FILE}"
        )
    elif calibration is None:
        print("no thresholds fitted on validation: --mode=eval --split=val makes them")


def make_parser() -> Parser:
    """The command's own flags; what begins with --config. is left to `override`."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        help="configuration file, such as configs/demo.py, or a run's config.json",
    )
    parser.add_argument(
        "--workdir", type=Path, help="directory of the run: checkpoints, metrics, settings"
    )
    modes = "train, evaluating on the way; evaluate a checkpoint; or say what a run takes"
    parser.add_argument("--mode", choices=["train", "eval", "plan"], default="train", help=modes)
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="what --mode=eval evaluates"
    )
    parser.add_argument(
        "--checkpoint",
        default="newest",
        help="which one --mode=eval evaluates: newest, best (by the validations), or a step",
    )
    parser.add_argument(
        "--coordinator",
        help=f"several processes: HOST:PORT of process 0, the same for all; {AUTO}: as jax finds "
        "out by itself",
    )
    parser.add_argument("--num_processes", type=int, help="several processes: how many")
    parser.add_argument(
        "--process_id", type=int, help="several processes: which of them this is, from 0"
    )
    parser.add_argument(
        "--profile",
        metavar="STEP:NUMBER",
        help="records so many steps with jax's profiler, from this one on, below the workdir",
    )
    return parser


def resolve_step(text: str, workdir: Path) -> int | None:
    """--checkpoint as the step of a checkpoint, None = the newest. Raises UserError."""
    if text in ("newest", "best"):
        return None if text == "newest" else best_step(workdir)
    if not text.isdecimal():
        raise UserError(
            f"--checkpoint={text} cannot be used: must be newest, best or the step of a checkpoint"
        )
    return int(text)


def run_mode(argv: list[str] | None) -> int | None:
    """Reads the command line and runs the chosen mode; returns the exit status."""
    arguments, overrides = make_parser().parse_known_args(argv)
    for name in ("config",) if arguments.mode == "plan" else ("config", "workdir"):
        if getattr(arguments, name) is None:
            instead = f", but there is {overrides[0]}" if overrides else ""
            raise UserError(f"--{name} is missing{instead}; see train.py --help")
    window, workdir = parse_window(arguments.profile), arguments.workdir
    if workdir and workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file; name a directory")
    run = RunConfig.from_mapping(override(read_config(arguments.config), overrides))
    init_distributed(arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.mode == "train":
        return run_command(
            lambda: train_or_stop(run, workdir, window),
            interrupted="interrupted; the same command continues from the last checkpoint",
        )
    with full_disk_reported(workdir):
        if arguments.mode == "plan":
            print_plan(run)
        else:
            step = resolve_step(arguments.checkpoint, workdir)
            evaluate_checkpoint(run, workdir, arguments.split, step=step)
    return None


def train_or_stop(run: RunConfig, workdir: Path, profile: tuple[int, int] | None) -> None:
    """`train`, which may end early by a request that it obeys."""
    with full_disk_reported(workdir):
        try:
            train(run, workdir, profile=profile)
        except Preempted as request:
            print(request, flush=True)


@contextlib.contextmanager
def full_disk_reported(workdir: Path | None) -> Iterator[None]:
    """Around what writes below `workdir`: a disk that is full or read-only is the user's matter."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        raise UserError(
            f"{error.filename or workdir}: {error.strerror}; make room, then run the same command "
            "again"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """The command; a user's mistake is one line on stderr and exit status 2."""
    return run_command(lambda: run_mode(argv))


if __name__ == "__main__":
    start_process()
    sys.exit(main())
