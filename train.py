"""Trains and evaluates a model: configuration -> data -> model -> state -> loop.

    python train.py --config=configs/demo.py --workdir=runs/demo [--config.optimizer.learning_rate=1e-4 ...]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=eval [--split=test] [--checkpoint=best]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=plan

The same command again continues from the newest checkpoint in the workdir. docs/training.md tells
the rest.
"""

import contextlib
import dataclasses
import errno
import sys
from collections.abc import Callable, Mapping
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
from dsct_jax.config import dataclass_from_dict, read_config, require
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import FILE as CALIBRATION_FILE
from dsct_jax.evaluation.calibration import calibration_of_run
from dsct_jax.evaluation.collect import collect_results
from dsct_jax.evaluation.evaluate import RESAMPLES, evaluate, fit_calibration, write_evaluation
from dsct_jax.evaluation.report import format_table
from dsct_jax.evaluation.results import ResultsInfo, Shown, SplitResults
from dsct_jax.inference.load import model_config
from dsct_jax.model.build import FlatParams, Network
from dsct_jax.model.dsct import DSCTConfig
from dsct_jax.parallel import Prefetch, make_mesh, replicate, shard_batch
from dsct_jax.postprocess import has_subject_logit
from dsct_jax.runtime import (
    AUTO,
    CompilationLog,
    Preemption,
    init_distributed,
    set_compilation_cache,
    start_process,
)
from dsct_jax.runtime import FILE as COMPILATIONS_FILE
from dsct_jax.training.checkpoint import (
    Checkpoints,
    best_step,
    load_weights,
    newest_step,
    require_same_model,
    require_same_shapes,
)
from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig
from dsct_jax.training.logbook import Logbook, versions, write_settings
from dsct_jax.training.loop import (
    Best,
    Loop,
    Meter,
    NonFiniteGuard,
    Preempted,
    Profiler,
    Schedule,
    TrainConfig,
    log_config_changes,
    parse_window,
    stopped_early,
)
from dsct_jax.training.memory_plan import format_plan, make_plan
from dsct_jax.training.objective import OBJECTIVES
from dsct_jax.training.step import (
    TrainState,
    TrainStep,
    initial_state,
    make_eval_step,
    make_train_step,
)
from dsct_jax.visualization.drawing import contact_sheet, draw_shown
from dsct_jax.weights.pretrained import load_pretrained

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
        return dataclass_from_dict(
            cls, "", {key: value for key, value in config.items() if key not in parts}, **parts
        )


def train(
    config: Mapping[str, Any], workdir: Path, *, profile: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Trains to the end of the schedule, evaluating and saving on the way; returns the last
    validation metrics.

    Args:
        profile: (first step, number of steps) that jax's profiler records, below `workdir`/profile.

    Raises:
        Preempted: the run was asked to stop by SIGTERM, and has saved.
    """
    run, mesh = RunConfig.from_mapping(config), make_mesh()
    run.train.require_divisible(mesh.size)
    train_data = build_dataset(run, "train", training=True)
    val_data = build_dataset(run, "val", training=False)
    schedule = Schedule.of(run.train, train_data.steps_per_epoch)
    functions = Network(run.model)
    params, norm_stats = initial_params(functions, run, config, workdir)
    set_compilation_cache(workdir / "compiled")
    optimizer, state = initial_state(
        params,
        norm_stats,
        run.optimizer,
        total_steps=schedule.total,
        mesh=mesh,
        step_config=run.train.step_config,
    )
    metadata = {
        "config": config,
        "class_names": run.class_names,
        "seed": run.seed,
        "steps_per_epoch": schedule.epoch,
        "versions": versions(),
    }

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(workdir, keep=run.train.keep_checkpoints, metadata=metadata)
            )
        )
        state, stored = checkpoints.restore_newest(state) or (state, {})
        best, meter, progress = Best(run.best_metric), Meter(), stored.get("progress", {})
        best.load_state(progress)
        meter.load_state(progress.get("pending", []))
        start_step, first = int(state.step), jax.process_index() == 0
        changed = write_settings(config, workdir) if first else []
        logbook = Logbook(
            workdir,
            start_step=start_step,
            total_steps=schedule.total,
            wandb=run.train.wandb,
            config=config,
        )
        stack.enter_context(contextlib.closing(logbook))
        trained = sum(value.size for value in state.params.values())
        what = f"{run.name}: {train_data.num_images} images, {trained:,} trained parameters, {mesh.size} device(s)"
        logbook.log(f"{what}, steps {start_step} to {schedule.total}")
        if jax.process_count() > 1:
            logbook.log(f"process 0 of {jax.process_count()}, the only one that writes")
        if start_step > 0:
            log_config_changes(logbook, changed, stored, schedule.epoch)
        validation = partial(
            validate,
            run=run,
            data=val_data,
            eval_step=make_eval_step(functions, mesh=mesh),
            mesh=mesh,
            logbook=logbook,
            best=best,
        )
        if progress.get("validation_owed"):
            validation(start_step, state)
        if start_step >= schedule.total:
            logbook.log(
                f"nothing left to train: {workdir} stands at step {start_step}; raise "
                "config.train.epochs to go on, or use --mode=eval"
            )
            return {}
        if stopped_early(best, run.train, logbook):
            return {}

        compilations = CompilationLog(workdir / COMPILATIONS_FILE if first else None)
        stack.enter_context(contextlib.closing(compilations))
        loop = Loop(
            config=run.train,
            optimizer=run.optimizer,
            schedule=schedule,
            workdir=workdir,
            checkpoints=checkpoints,
            logbook=logbook,
            compilations=compilations,
            guard=NonFiniteGuard(
                workdir, limit=run.train.max_skipped, in_a_row=int(state.skipped), log=logbook.log
            ),
            preemption=stack.enter_context(Preemption()),
            profiler=stack.enter_context(Profiler(profile, workdir / "profile", log=logbook.log)),
            meter=meter,
            best=best,
            validate=validation,
            max_programs=len(run.data.buckets),
        )
        batches = Prefetch(
            train_data.iterator(start_step, schedule.total - start_step),
            lambda batch: shard_batch(batch, mesh),
        )
        stack.enter_context(batches)
        metrics = loop.run(train_step(functions, optimizer, run, mesh), state, batches)
        report_skipped(train_data, val_data, log=logbook.log)
        if best.value is not None:
            logbook.log(
                f"best validation: {best.metric} {best.value:.3f} at step {best.step}, kept in "
                f"{workdir / 'checkpoints' / str(best.step)}"
            )
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


def initial_params(
    functions: Network, run: RunConfig, config: Mapping[str, Any], workdir: Path
) -> tuple[FlatParams, FlatParams]:
    """Random values, and those of config.init_from in their place; what was taken is printed and
    kept in init_from.txt.
    """
    params, norm_stats = functions.init(run.seed)
    if not run.init_from or newest_step(workdir) is not None:  # a run that continues has its own
        return params, norm_stats
    params, norm_stats, lines = load_pretrained(
        run.init_from, functions, params, norm_stats, config
    )
    if jax.process_index() == 0:
        print("\n".join(lines), flush=True)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "init_from.txt").write_text("\n".join(lines) + "\n")
    return params, norm_stats


def train_step(
    functions: Network, optimizer: optax.GradientTransformation, run: RunConfig, mesh: Mesh
) -> TrainStep:
    """The step of a run."""
    make_objective = OBJECTIVES[functions.entry.objective]
    return make_train_step(
        functions,
        optimizer,
        objective=make_objective(run.loss, run.matcher, multi_label=run.multi_label),
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
    eval_step,
    mesh: Mesh,
    logbook: Logbook,
    best: Best,
) -> tuple[dict[str, Any], bool]:
    """Metrics of the weights as they are, averaged if the run keeps an average; and whether they
    are the best, which `best` then knows.
    """
    weights = (state.ema or state.params) | state.frozen_params
    keep = DRAWN_IN_TRAINING if jax.process_index() == 0 else 0
    results, shown = collect(
        partial(eval_step, weights, state.norm_stats), data, "val", run=run, mesh=mesh, keep=keep
    )
    metrics = evaluate(results)
    logbook.write(
        step, {f"val/{name}": value for name, value in metrics.items() if isinstance(value, float)}
    )
    if shown:
        logbook.image(
            step,
            "val/predictions",
            contact_sheet(draw_shown(shown, results.about, fit_calibration(results)), 3),
        )
    logbook.log(
        "validation: "
        + "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN_METRICS if name in metrics)
    )
    return metrics, best.add(step, metrics)


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


def print_plan(config: Mapping[str, Any]) -> None:
    """What a training run would take: parameters, memory, compile time and arithmetic. Compiles
    every program; reads no data.
    """
    run, mesh = RunConfig.from_mapping(config), make_mesh()
    run.train.require_divisible(mesh.size)
    functions = Network(run.model)
    optimizer, state = initial_state(
        *functions.init(run.seed),
        run.optimizer,
        total_steps=1,
        mesh=mesh,
        step_config=run.train.step_config,
    )
    sizes = {
        "batch_size": run.train.batch_size,
        "max_targets": run.data.max_targets,
        "num_classes": len(run.class_names),
    }
    print(
        f"{run.name}: {mesh.size} {jax.devices()[0].device_kind} device(s); compiling "
        f"{len(run.data.buckets)} size(s) of images ...",
        flush=True,
    )
    print(
        format_plan(
            make_plan(train_step(functions, optimizer, run, mesh), state, run.data.buckets, **sizes)
        )
    )


def evaluate_checkpoint(
    config: Mapping[str, Any], workdir: Path, split: str, *, step: int | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint (None: the newest) on a split under every protocol of
    docs/evaluation.md.

    Prints the table; writes metrics_<split>.json, .md and .png, predictions_<split>.npz (what
    `python -m dsct_jax evaluate` reads) and predictions_<split>.png into `workdir`, and, on the
    validation split, thresholds.json, which prediction and the other splits' evaluation use.
    """
    run, mesh = RunConfig.from_mapping(config), make_mesh()
    run.train.require_divisible(mesh.size)
    params, norm_stats, metadata = load_weights(workdir, step)
    require_same_model(metadata["config"], config, str(workdir))
    functions = Network(run.model)
    require_same_shapes(
        functions.param_shapes | functions.norm_stats_shapes, {**params, **norm_stats}, str(workdir)
    )
    step = newest_step(workdir) if step is None else step
    calibration = (
        calibration_of_run(workdir, class_names=run.class_names, step=step)
        if split != "val"
        else None
    )
    data = build_dataset(run, split, training=False)
    predict = partial(make_eval_step(functions, mesh=mesh), *replicate((params, norm_stats), mesh))
    results, shown = collect(
        predict, data, split, run=run, mesh=mesh, keep=DRAWN_IMAGES, checkpoint=f"step {step}"
    )
    metrics = evaluate(results, calibration=calibration, resamples=RESAMPLES, seed=run.seed)
    if jax.process_index() == 0:
        print(format_table(metrics))
        report_skipped(data, log=print)
        predictions, sheet = (
            workdir / f"predictions_{split}.npz",
            workdir / f"predictions_{split}.png",
        )
        results.save(predictions)
        fitted = fit_calibration(results) if split == "val" else None
        contact_sheet(draw_shown(shown, results.about, fitted or calibration), 6).save(sheet)
        numbers = write_evaluation(metrics, workdir, suffix=f"_{split}")
        print(
            f"numbers: {'   '.join(map(str, numbers))}   predictions: {predictions}   drawings "
            f"(dashed: annotated): {sheet}"
        )
        if fitted is not None:
            fitted.save(workdir / CALIBRATION_FILE)
            print(
                "temperature and thresholds fitted for prediction and for the other splits: "
                f"{workdir / CALIBRATION_FILE}"
            )
        elif calibration is None:
            print("no thresholds fitted on validation: --mode=eval --split=val makes them")
    return metrics


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


def run_mode(argv: list[str] | None) -> None:
    """Reads the command line and runs the chosen mode."""
    arguments, overrides = make_parser().parse_known_args(argv)
    for name in ("config",) if arguments.mode == "plan" else ("config", "workdir"):
        if getattr(arguments, name) is None:
            raise UserError(
                f"--{name} is missing"
                + (f", but there is {overrides[0]}" if overrides else "")
                + "; see train.py --help"
            )
    window, workdir = parse_window(arguments.profile), arguments.workdir
    if workdir and workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file; name a directory")
    config = override(read_config(arguments.config), overrides)
    init_distributed(arguments.coordinator, arguments.num_processes, arguments.process_id)
    try:
        if arguments.mode == "train":
            train(config, workdir, profile=window)
        elif arguments.mode == "plan":
            print_plan(config)
        else:
            evaluate_checkpoint(
                config, workdir, arguments.split, step=resolve_step(arguments.checkpoint, workdir)
            )
    except Preempted as request:
        print(request, flush=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        raise UserError(
            f"{error.filename or workdir}: {error.strerror}; make room, then the same command "
            "continues"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """The command; a user's mistake is one line on stderr and exit status 2."""
    return run_command(
        lambda: run_mode(argv),
        interrupted="interrupted; the same command continues from the last checkpoint",
    )


if __name__ == "__main__":
    start_process()
    sys.exit(main())
