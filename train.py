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
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from data.command import override
from data.config import SPLITS, DataConfig
from data.pipeline import Dataset, make_dataset
from dsct_jax.cli import Parser, run_command
from dsct_jax.config import dataclass_from_dict, read_config, require, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import FILE as FIT_FILE
from dsct_jax.evaluation.calibration import fit_decoder, save_fit, stored_decoder
from dsct_jax.evaluation.collect import collect_results
from dsct_jax.evaluation.evaluate import RESAMPLES, evaluate, write_evaluation
from dsct_jax.evaluation.measures import LOWER_IS_BETTER
from dsct_jax.evaluation.report import format_table
from dsct_jax.evaluation.results import ResultsInfo, Shown, SplitResults
from dsct_jax.model.build import FlatParams, Network, network_config
from dsct_jax.parallel import Prefetch, make_mesh, replicate, shard_batch
from dsct_jax.postprocess import Decoder
from dsct_jax.runtime import AUTO, full_disk_reported, init_distributed, start_process
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig, TrainConfig
from dsct_jax.training.logbook import Logbook, versions, write_settings
from dsct_jax.training.loop import Best, Meter, Preempted, Schedule, parse_window, train_loop
from dsct_jax.training.memory_plan import format_plan, make_plan
from dsct_jax.training.objective import OBJECTIVES
from dsct_jax.training.optimizer import learning_rates
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
    load_weights,
    newest_step,
    parse_step,
    require_same_model,
    require_same_shapes,
)

SHOWN_METRICS = ("mAP", "accuracy", "macro_f1", "mean_iou")  # in the line of a validation
DRAWN_IMAGES = 24  # on the contact sheet of an evaluation
DRAWN_IN_TRAINING = 6  # of each validation


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole configuration as the library takes it: each section a frozen dataclass."""

    name: str
    seed: int
    init_from: str
    class_names: tuple[str, ...]
    multi_label: bool
    model: Any  # the configuration of the network that model.name chooses
    matcher: MatcherConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig

    @property
    def best_metric(self) -> str:
        """What the best checkpoint is best by."""
        return self.train.best_metric or ("mAP" if self.multi_label else "accuracy")

    @property
    def decoder(self) -> Decoder:
        """How the outputs are read, before anything is fitted."""
        return Decoder.unfitted(
            self.class_names, multi_label=self.multi_label, class_loss=self.loss.class_loss
        )

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
        names = require(config, "class_names", tuple)
        parts["model"] = network_config(require(config, "model", Mapping), len(names))
        parts["data"] = dataclass_from_dict(
            DataConfig,
            "data",
            require(config, "data", Mapping),
            class_names=names,
            multi_label=require(config, "multi_label", bool),
        )
        rest = {key: value for key, value in config.items() if key not in parts}
        return dataclass_from_dict(cls, "", rest, **parts)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_mapping`, as JSON can hold it: kept with a run and its weights."""
        return {f.name: to_builtins(getattr(self, f.name)) for f in dataclasses.fields(self)}


def train(run: RunConfig, workdir: Path, *, profile: tuple[int, int] | None = None) -> None:
    """Trains to the end of the schedule, evaluating and saving on the way.

    Args:
        profile: (first step, last step) that jax's profiler records.

    Raises:
        Preempted: the run was asked to stop by SIGTERM, and has saved.
    """
    mesh = make_mesh()
    run.train.require_divisible(mesh.size)
    train_data = build_dataset(run, "train", training=True)
    val_data = build_dataset(run, "val", training=False)
    schedule = Schedule.of(run.train, train_data.steps_per_epoch)
    network = Network(run.model)

    # What the run starts from; the first that applies wins:
    # 1. continue: the newest checkpoint in the workdir that can be read, with everything in it;
    # 2. init_from: the weights of config.init_from; what that file does not have, as in 3;
    # 3. random, by config.seed.
    values = network.init(run.seed)
    if run.init_from and newest_step(workdir) is None:
        values = pretrained(network, *values, run, workdir)
    optimizer, state = state_before(run, *values, mesh=mesh, total_steps=schedule.total)
    with contextlib.ExitStack() as stack:
        checkpoints = open_checkpoints(run, workdir, steps_per_epoch=schedule.epoch)
        stack.enter_context(contextlib.closing(checkpoints))
        state, stored = checkpoints.restore_newest(state) or (state, {})
        step, progress = int(state.step), stored.get("progress", {})

        changed = write_settings(run.to_dict(), workdir) if jax.process_index() == 0 else []
        logbook = stack.enter_context(open_logbook(run, workdir, step, schedule.total, progress))
        size = sum(value.size for value in state.params.values())
        what = f"{run.name}: {train_data.num_images} images, {size:,} trained parameters"
        logbook.log(f"{what}, {mesh.size} device(s), steps {step} to {schedule.total}")
        if jax.process_count() > 1:
            logbook.log(f"process 0 of {jax.process_count()}, the only one that writes")
        if step > 0:
            logbook.log_changes(changed, stored, steps_per_epoch=schedule.epoch)
        best = Best(run.best_metric, lower_is_better=run.best_metric in LOWER_IS_BETTER)
        best.load_state(progress)
        validation = partial(
            validate, run, val_data, make_eval_step(network, mesh=mesh), mesh, logbook
        )
        if progress.get("validation_owed"):
            best.add(step, validation(step, state)[0])
        if step >= schedule.total:
            logbook.log(
                f"nothing left to train: {workdir} is already at step {step}; raise "
                "config.train.epochs to go on, or use --mode=eval"
            )
        if step >= schedule.total or best.stops(run.train, logbook):
            return

        source = train_data.iterator(step, schedule.total - step)
        batches = stack.enter_context(Prefetch(source, partial(shard_batch, mesh=mesh)))
        train_loop(
            train_step(network, optimizer, run, mesh),
            state,
            batches,
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


def build_dataset(run: RunConfig, split: str, *, training: bool) -> Dataset:
    """The data of one split for this process; says what was read and what had to be left out."""
    data = make_dataset(
        run.data,
        split,
        batch_size=run.train.batch_size if training else run.train.eval_batch_size,
        seed=run.seed,
        training=training,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
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
    classes = {"class_names": run.class_names, "multi_label": run.multi_label}
    *values, lines = load_pretrained(run.init_from, network, params, norm_stats, **classes)
    if jax.process_index() == 0:
        print("\n".join(lines), flush=True)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "init_from.txt").write_text("\n".join(lines) + "\n")
    return tuple(values)


def state_before(
    run: RunConfig, params: FlatParams, norm_stats: FlatParams, *, mesh: Mesh, total_steps: int
) -> tuple[optax.GradientTransformationExtraArgs, TrainState]:
    """The optimizer, and the state before the first step."""
    how = {"total_steps": total_steps, "mesh": mesh, "step_config": run.train.step_config}
    return initial_state(params, norm_stats, run.optimizer, **how)


def train_step(
    network: Network, optimizer: optax.GradientTransformation, run: RunConfig, mesh: Mesh
) -> TrainStep:
    """The step of a run."""
    make_objective = OBJECTIVES[network.entry.objective]
    return make_train_step(
        network,
        optimizer,
        objective=make_objective(run.loss, run.matcher, multi_label=run.multi_label),
        mesh=mesh,
        seed=run.seed,
        step_config=run.train.step_config,
    )


def open_checkpoints(run: RunConfig, workdir: Path, *, steps_per_epoch: int) -> Checkpoints:
    """The checkpoints of a run, each of which says how it came about."""
    metadata = {
        "config": run.to_dict(),
        "class_names": run.class_names,
        "seed": run.seed,
        "steps_per_epoch": steps_per_epoch,
        "versions": versions(),
    }
    return Checkpoints(workdir, keep=run.train.keep_checkpoints, metadata=metadata)


def open_logbook(
    run: RunConfig, workdir: Path, step: int, total_steps: int, progress: Mapping[str, Any]
) -> Logbook:
    """The log of a run that starts at `step`."""
    return Logbook(
        workdir,
        start_step=step,
        total_steps=total_steps,
        validation_owed=progress.get("validation_owed", False),
        wandb=run.train.wandb,
        config=run.to_dict(),
    )


def validate(
    run: RunConfig,
    data: Dataset,
    eval_step: Any,
    mesh: Mesh,
    logbook: Logbook,
    step: int,
    state: TrainState,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of the weights as they are, averaged if the run keeps an average; and the decoder
    fitted to them, to be stored beside them.
    """
    weights = (state.ema or state.params) | state.frozen_params
    results, shown = collect_results(
        partial(eval_step, weights, state.norm_stats),
        data.iterator(),
        ResultsInfo(run.decoder, data.report.protocol, "val", f"step {step}"),
        num_images=data.num_images,
        source=data.report.source,
        mesh=mesh,
        keep=DRAWN_IN_TRAINING if jax.process_index() == 0 else 0,
    )
    metrics, decoder = evaluate(results), fit_decoder(results)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    logbook.write(step, {f"val/{name}": value for name, value in numbers.items()})
    if pictures := draw_shown(shown, decoder):  # none where all of them are damaged
        logbook.image(step, "val/predictions", contact_sheet(pictures, 3))
    shortly = [f"{name} {metrics[name]:.3f}" for name in SHOWN_METRICS if name in metrics]
    logbook.log(f"validation: {'  '.join(shortly)}")
    return metrics, decoder.to_dict()


def report_skipped(*datasets: Dataset, log: Any) -> None:
    """At the end: how many images could not be read (only with config.data.skip_corrupt)."""
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
    mesh, buckets = make_mesh(), run.data.buckets
    run.train.require_divisible(mesh.size)
    network = Network(run.model)
    optimizer, state = state_before(run, *network.init(run.seed), mesh=mesh, total_steps=1)
    devices = f"{mesh.size} {jax.devices()[0].device_kind} device(s)"
    print(f"{run.name}: {devices}; compiling {len(buckets)} size(s) of images ...", flush=True)
    sizes = {
        "batch_size": run.train.batch_size,
        "max_targets": run.data.max_targets,
        "num_classes": len(run.class_names),
    }
    step = train_step(network, optimizer, run, mesh)
    print(format_plan(make_plan(step, state, buckets, **sizes)))


def evaluate_checkpoint(
    run: RunConfig, workdir: Path, split: str, *, step: int | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint (None: the newest that can be read) on a split under every protocol of
    docs/evaluation.md.

    Prints the table; writes metrics_<split>.json, .md and .png, predictions_<split>.npz (what
    `python -m dsct_jax evaluate` reads) and predictions_<split>.png into `workdir`, and, on the
    validation split, thresholds.json, for a checkpoint without a validation of its own.
    """
    mesh = make_mesh()
    run.train.require_divisible(mesh.size)
    params, norm_stats, metadata, step = load_weights(workdir, step)
    require_same_model(metadata["config"], run.to_dict(), str(workdir))
    network, decoder = Network(run.model), run.decoder
    shapes = network.param_shapes | network.norm_stats_shapes
    require_same_shapes(shapes, params | norm_stats, str(workdir))
    if split != "val":
        decoder = stored_decoder(decoder, metadata, workdir, step)
    data = build_dataset(run, split, training=False)
    results, shown = collect_results(
        partial(make_eval_step(network, mesh=mesh), *replicate((params, norm_stats), mesh)),
        data.iterator(),
        ResultsInfo(decoder, data.report.protocol, split, f"step {step}"),
        num_images=data.num_images,
        source=data.report.source,
        mesh=mesh,
        keep=DRAWN_IMAGES,
    )
    metrics = evaluate(results, resamples=RESAMPLES, seed=run.seed)
    if jax.process_index() == 0:
        print(format_table(metrics))
        report_skipped(data, log=print)
        write_results(results, metrics, shown, workdir)
    return metrics


def write_results(
    results: SplitResults, metrics: dict[str, Any], shown: list[Shown], workdir: Path
) -> None:
    """Writes what `evaluate_checkpoint` has found, and says where it is."""
    split, decoder = results.about.split, results.about.decoder
    predictions, sheet = (workdir / f"predictions_{split}{end}" for end in (".npz", ".png"))
    results.save(predictions)
    numbers = write_evaluation(metrics, workdir, suffix=f"_{split}")
    line = f"numbers: {'   '.join(map(str, numbers))}   predictions: {predictions}"
    if split == "val":
        decoder = fit_decoder(results)
        save_fit(decoder, workdir / FIT_FILE, checkpoint=results.about.checkpoint)
    if pictures := draw_shown(shown, decoder):  # none where all of them are damaged
        contact_sheet(pictures, 6).save(sheet)
        line += f"   drawings (dashed: annotated): {sheet}"
    print(line)
    if split == "val":
        print(
            "temperature and thresholds fitted for prediction and for the other splits: "
            f"{workdir / FIT_FILE}"
        )
    elif not decoder.fitted_on:
        print("no thresholds fitted on validation: --mode=eval --split=val makes them")


def make_parser() -> Parser:
    """The command's own flags; what begins with --config. is left to `override`."""
    parser = Parser(description=__doc__)

    def flag(name: str, text: str, **options: Any) -> None:
        parser.add_argument(f"--{name}", help=text, **options)

    flag("config", "configuration, such as configs/demo.py, or a run's config.json", type=Path)
    flag("workdir", "directory of the run: checkpoints, metrics, settings", type=Path)
    modes = ["train", "eval", "plan"]
    does = "train, evaluating on the way; evaluate a checkpoint; or say what a run takes"
    flag("mode", does, choices=modes, default="train")
    flag("split", "what --mode=eval evaluates", choices=SPLITS, default="test")
    newest = "which one --mode=eval evaluates: newest, best (by the validations), or a step"
    flag("checkpoint", newest, default="newest")
    where = f"several processes: HOST:PORT of process 0, the same for all; {AUTO}: found by JAX"
    flag("coordinator", where)
    flag("num_processes", "several processes: how many", type=int)
    flag("process_id", "several processes: which of them this is, from 0", type=int)
    steps = "records so many steps with jax's profiler, from this one on, below the workdir"
    flag("profile", steps, metavar="STEP:NUMBER")
    return parser


def run_mode(argv: list[str] | None) -> int:
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
    with full_disk_reported(workdir):
        if arguments.mode == "plan":
            print_plan(run)
        elif arguments.mode == "eval":
            step = parse_step(arguments.checkpoint, workdir)
            evaluate_checkpoint(run, workdir, arguments.split, step=step)
        else:
            try:
                train(run, workdir, profile=window)
            except Preempted as request:
                print(request, flush=True)
            except KeyboardInterrupt:
                again = "the same command continues from the last checkpoint"
                print(f"interrupted; {again}", file=sys.stderr)
                return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; a user's mistake is one line on stderr and exit status 2."""
    return run_command(lambda: run_mode(argv))


if __name__ == "__main__":
    start_process()
    sys.exit(main())
