"""Trains and evaluates a model: configuration -> data -> model -> state -> loop.

    python train.py --config=configs/demo.py --workdir=runs/demo [--config.section.field=value ...]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=eval [--split=test]
        [--checkpoint=best]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=plan

The same command again continues from the newest checkpoint. docs/training.md has the rest.
"""

import sys

from data.command import override, train_parser
from dsct_jax.cli import run_command, start_process

if __name__ == "__main__":  # before jax is imported, which takes a second or two
    if {"-h", "--help"} & {*sys.argv}:
        train_parser(__doc__).print_help()
        sys.exit()
    start_process()

import contextlib
import dataclasses
import typing
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from data.config import DataConfig
from data.pipeline import Dataset, make_dataset
from dsct_jax.batch import FlatParams
from dsct_jax.commands.evaluate import write_results
from dsct_jax.config import (
    RESAMPLES,
    dataclass_from_dict,
    read_config,
    require,
    to_builtins,
)
from dsct_jax.crops import CropConfig
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import fit_decoder, stored_decoder
from dsct_jax.evaluation.collect import collect_results
from dsct_jax.evaluation.evaluate import LOWER_IS_BETTER, evaluate
from dsct_jax.evaluation.report import format_table
from dsct_jax.evaluation.results import ResultsInfo
from dsct_jax.inference.finders import make_finder
from dsct_jax.model.build import Network, network_config
from dsct_jax.parallel import Prefetch, make_mesh, replicate, shard_batch
from dsct_jax.postprocess import Decoder
from dsct_jax.runtime import exclusive, full_disk_reported, init_distributed
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig, TrainConfig
from dsct_jax.training.logbook import Logbook, versions
from dsct_jax.training.loop import CONTINUES, Best, Preempted, Schedule, parse_window, train_loop
from dsct_jax.training.memory_plan import format_plan, make_plan
from dsct_jax.training.objective import OBJECTIVES, Objective
from dsct_jax.training.optimizer import learning_rates
from dsct_jax.training.step import TrainState, initial_state, make_eval_step, make_train_step
from dsct_jax.visualization.drawing import contact_sheet, draw_shown
from dsct_jax.weights.modalities import load_modalities
from dsct_jax.weights.pretrained import load_pretrained
from dsct_jax.weights.run_directory import load_weights, newest_step, parse_step, require_match

SHOWN_METRICS = ("mAP", "accuracy", "macro_f1", "mean_iou")  # in the line of a validation
Values = tuple[FlatParams, FlatParams]  # parameters, norm statistics
DRAWN_IMAGES, DRAWN_IN_TRAINING = 24, 6  # by an evaluation, by each validation


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
    def crops(self) -> CropConfig | None:
        """What a two-stage network sees of a person; None for a network that finds its people."""
        return self.model if isinstance(self.model, CropConfig) else None

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the images of a batch."""
        return self.crops.canvases if self.crops else self.data.buckets

    @property
    def decoder(self) -> Decoder:
        """How the outputs are read, before anything is fitted."""
        return Decoder.unfitted(
            self.class_names, multi_label=self.multi_label, class_loss=self.loss.class_loss
        )

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> "RunConfig":
        """Raises UserError at the first field that is unknown, missing, or cannot be used."""
        kinds = typing.get_type_hints(cls)
        parts: dict[str, Any] = {
            name: dataclass_from_dict(kinds[name], name, require(config, name, Mapping))
            for name in ("matcher", "loss", "optimizer", "train")
        }
        names, many = require(config, "class_names", tuple), require(config, "multi_label", bool)
        parts["model"] = network_config(require(config, "model", Mapping), len(names))
        data = require(config, "data", Mapping)
        parts["data"] = dataclass_from_dict(
            DataConfig, "data", data, class_names=names, multi_label=many
        )
        rest = {key: value for key, value in config.items() if key not in parts}
        return dataclass_from_dict(cls, "", rest, **parts)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_mapping`, as JSON can hold it: kept with a run and its weights."""
        return {f.name: to_builtins(getattr(self, f.name)) for f in dataclasses.fields(self)}


def train(run: RunConfig, workdir: Path, *, profile: tuple[int, int] | None = None) -> None:
    """Trains to the end of the schedule, evaluating and saving on the way; jax's profiler records
    the steps `profile` (first, last). Raises Preempted: asked to stop by SIGTERM, it has saved.
    """
    mesh = make_mesh()
    run.train.require_divisible(mesh.size)
    train_data = build_dataset(run, "train", training=True)
    val_data = build_dataset(run, "val", training=False)
    schedule = Schedule.of(run.train, train_data.steps_per_epoch)
    network = Network(run.model)
    eval_step = make_eval_step(network, mesh=mesh)

    # What the run starts from; the first that applies wins:
    # 1. continue: the newest checkpoint in the workdir that can be read, with everything in it;
    # 2. init_from: the weights of config.init_from; what that file does not have, as in 3;
    # 3. random, by config.seed.
    # The networks of config.model.modalities always come from their own files.
    values, modalities = network.init(run.seed), load_modalities(network, seed=run.seed)
    if run.init_from and newest_step(workdir) is None:
        values = pretrained(run, network, values, workdir)
    values = values[0], values[1] | modalities.values
    objective = make_objective(run, network, train_data.class_shares())
    train_step, state = build_step(run, network, values, mesh, objective, schedule.total)
    with contextlib.ExitStack() as stack:
        checkpoints = open_checkpoints(run, workdir, schedule.epoch, modalities.files)
        stack.enter_context(contextlib.closing(checkpoints))
        state, stored = checkpoints.restore_newest(state) or (state, {})
        step, progress = int(state.step), stored.get("progress", {})

        owed = progress.get("validation_owed", False)
        steps = {"start_step": step, "total_steps": schedule.total}
        logbook = Logbook(workdir, run.to_dict(), **steps, validation_owed=owed)
        stack.enter_context(logbook)
        size = sum(value.size for value in state.params.values())
        what = f"{run.name}: {train_data.num_examples} {'people' if run.crops else 'images'}, "
        what += f"{size:,} trained parameters"
        logbook.log(f"{what}, {mesh.size} device(s), steps {step} to {schedule.total}")
        logbook.log_changes(stored, steps_per_epoch=schedule.epoch)
        best = Best(run.best_metric, lower_is_better=run.best_metric in LOWER_IS_BETTER)
        batches = train_data.iterator(step, max(schedule.total - step, 0))
        trained = train_loop(
            train_step,
            state,
            stack.enter_context(Prefetch(batches, partial(shard_batch, mesh=mesh))),
            config=run.train,
            schedule=schedule,
            checkpoints=checkpoints,
            logbook=logbook,
            progress=progress,
            best=best,
            validate=partial(validate, run, val_data, eval_step, mesh, logbook),
            learning_rates=partial(learning_rates, run.optimizer, schedule.total),
            max_programs=len(run.canvases),
            profile=profile,
        )
        if trained:
            report_skipped(train_data, val_data, log=logbook.log)
            best.report(logbook)


def build_dataset(run: RunConfig, split: str, *, training: bool, found: Any = None) -> Dataset:
    """The data of one split for this process; says what was read and what had to be left out.
    `found`: whose boxes a two-stage network sees instead of the annotated ones.
    """
    data = make_dataset(
        run.data,
        split,
        batch_size=run.train.batch_size if training else run.train.eval_batch_size,
        seed=run.seed,
        training=training,
        model=to_builtins(run.model),
        host_index=jax.process_index(),
        host_count=jax.process_count(),
        crops=run.crops,
        found=found,
    )
    if jax.process_index() == 0:
        print(f"{split}: {data.report}", flush=True)
    if data.report.people == 0:
        need = f"{split} data need at least one box inside an image"
        raise UserError(f"{data.report.source}: shows no person; {need}")
    return data


def pretrained(run: RunConfig, network: Network, values: Values, workdir: Path) -> Values:
    """The weights of config.init_from in the place of random ones; what was taken is printed and
    kept in init_from.txt.
    """
    classes: dict[str, Any] = {"class_names": run.class_names, "multi_label": run.multi_label}
    params, norm_stats, lines = load_pretrained(run.init_from, network, *values, **classes)
    if jax.process_index() == 0:
        print("\n".join(lines), flush=True)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "init_from.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return params, norm_stats


def make_objective(run: RunConfig, network: Network, class_shares: tuple[float, ...]) -> Objective:
    """What a step minimizes; `class_shares` where the configuration leaves them to be counted."""
    loss = run.loss
    if loss.logit_adjustment and not loss.class_shares:
        loss = dataclasses.replace(loss, class_shares=class_shares)
    return OBJECTIVES[network.entry.objective](loss, run.matcher, multi_label=run.multi_label)


def build_step(
    run: RunConfig,
    network: Network,
    values: Values,
    mesh: Mesh,
    objective: Objective,
    total_steps: int,
) -> tuple[Any, TrainState]:
    """The training step, and the state before the first one."""
    config = run.train.step_config
    optimizer, state = initial_state(
        *values, run.optimizer, total_steps=total_steps, mesh=mesh, step_config=config
    )
    step = make_train_step(
        network, optimizer, objective=objective, mesh=mesh, seed=run.seed, step_config=config
    )
    return step, state


def open_checkpoints(
    run: RunConfig, workdir: Path, steps_per_epoch: int, modalities: Mapping[str, Any]
) -> Checkpoints:
    """The checkpoints of a run, each of which says how it came about."""
    metadata = {
        "config": run.to_dict(),
        "class_names": run.class_names,
        "seed": run.seed,
        "steps_per_epoch": steps_per_epoch,
        "versions": versions(),
        "modalities": modalities,
    }
    return Checkpoints(workdir, keep=run.train.keep_checkpoints, metadata=metadata)


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
    whose = "given" if run.crops else ""
    about = ResultsInfo(run.decoder, data.report.protocol, "val", f"step {step}", whose)
    predict = partial(eval_step, weights, state.norm_stats)
    keep = DRAWN_IN_TRAINING if jax.process_index() == 0 else 0
    results, shown = collect_results(predict, data, about, mesh=mesh, keep=keep)
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
        opened = f"{unreadable} image(s) that could not be opened"
        log(f"left out: {opened} and {len(damaged)} with damaged pixels")


def print_plan(run: RunConfig) -> None:
    """Prints what a training run would take. Compiles every program; reads no data."""
    mesh, buckets = make_mesh(), run.canvases
    run.train.require_divisible(mesh.size)
    network = Network(run.model)
    objective = make_objective(run, network, (1.0,) * len(run.class_names))
    step, state = build_step(run, network, network.init(run.seed), mesh, objective, 1)
    devices = f"{mesh.size} {jax.devices()[0].device_kind} device(s)"
    print(f"{run.name}: {devices}; compiling {len(buckets)} size(s) of images ...", flush=True)
    sizes: dict[str, Any] = {"batch_size": run.train.batch_size, "crops": run.crops}
    sizes["max_targets"] = run.data.max_targets
    print(format_plan(make_plan(step, state, buckets, num_classes=len(run.class_names), **sizes)))


def evaluate_checkpoint(
    run: RunConfig, workdir: Path, split: str, *, step: int | None = None, boxes: str | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint (None: the newest that can be read) on a split under every protocol of
    docs/evaluation.md. A two-stage network sees the annotated people, or those of `boxes`.

    Prints the table; writes metrics_<split>.json, .md and .png, predictions_<split>.npz (what
    `python -m dsct_jax evaluate` reads) and predictions_<split>.png into `workdir`, and, on the
    validation split, thresholds.json, which wins over what the checkpoint's own validation fitted.
    """
    mesh = make_mesh()
    run.train.require_divisible(mesh.size)
    weights, network, decoder = load_weights(workdir, step), Network(run.model), run.decoder
    shapes = network.param_shapes | network.norm_stats_shapes
    require_match(weights, run.to_dict(), shapes, str(workdir))
    if split != "val":
        decoder = stored_decoder(decoder, weights.metadata, workdir, weights.step)
    data = build_dataset(run, split, training=False, found=found_boxes(run, boxes))
    values = replicate((weights.params, weights.norm_stats), mesh)
    whose = f"found by {boxes}" if boxes else "given" if run.crops else ""
    about = ResultsInfo(decoder, data.report.protocol, split, f"step {weights.step}", whose)
    predict = partial(make_eval_step(network, mesh=mesh), *values)
    results, shown = collect_results(predict, data, about, mesh=mesh, keep=DRAWN_IMAGES)
    metrics = evaluate(results, resamples=RESAMPLES, seed=run.seed)
    if jax.process_index() == 0:
        print(format_table(metrics))
        report_skipped(data, log=print)
        write_results(results, metrics, shown, workdir)
    return metrics


def found_boxes(run: RunConfig, source: str | None) -> Any:
    """What --boxes names, as `build_dataset` takes it."""
    if source is None:
        return None
    if run.crops is None:
        raise UserError(f"--boxes={source}: config.model.name={run.model.name} finds its people")
    finder = make_finder(source)
    return lambda records: [finder(record.load(), record.name) for record in records]


def run_mode(argv: list[str] | None) -> None:
    """Reads the command line and runs the chosen mode."""
    arguments, overrides = train_parser(__doc__).parse_known_args(argv)
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
            evaluate_checkpoint(run, workdir, arguments.split, step=step, boxes=arguments.boxes)
        else:
            try:
                with exclusive(workdir):
                    train(run, workdir, profile=window)
            except Preempted as request:
                print(request, flush=True)
            except KeyboardInterrupt:
                again = f"interrupted; {CONTINUES} from the last checkpoint"
                raise KeyboardInterrupt(again) from None


def main(argv: list[str] | None = None) -> int:
    """The command; a user's mistake is one line on stderr and exit status 2."""
    return run_command(lambda: run_mode(argv))


if __name__ == "__main__":
    sys.exit(main())
