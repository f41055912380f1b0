"""Trains and evaluates a model: configuration -> data -> model -> state -> loop.

    python train.py --config=configs/demo.py --workdir=runs/demo [--config.optimizer.learning_rate=1e-4 ...]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=eval [--split=test]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=plan

The same command again continues from the newest checkpoint in the workdir. docs/training.md tells the rest.
"""

import contextlib
import dataclasses
import errno
import operator
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image

from data.command import Parser, override
from data.config import SPLITS, DataConfig
from data.pipeline import Dataset, make_dataset
from dsct_jax.batch import Batch
from dsct_jax.calibration import FILE as CALIBRATION_FILE
from dsct_jax.calibration import calibration_of_run
from dsct_jax.checkpoint import Checkpoints, load_weights, newest_checkpoint, require_same_model, require_same_shapes
from dsct_jax.compilation import FILE as COMPILATIONS_FILE
from dsct_jax.compilation import CompilationLog, keep_programs_in
from dsct_jax.distributed import AUTO, join_processes
from dsct_jax.drawing import contact_sheet, draw_batch
from dsct_jax.errors import UserError
from dsct_jax.evaluate import RESAMPLES, evaluate, fit_calibration, write_evaluation
from dsct_jax.evaluation_table import format_table
from dsct_jax.guard import Best, NonFiniteGuard
from dsct_jax.load import model_config
from dsct_jax.logbook import Logbook, versions, write_settings
from dsct_jax.losses import LossConfig
from dsct_jax.matcher import MatcherConfig
from dsct_jax.meter import Meter, memory
from dsct_jax.model.dsct import DSCTConfig
from dsct_jax.optimizer import OptimizerConfig, learning_rates
from dsct_jax.plan import format_plan, make_plan
from dsct_jax.prefetch import Prefetch
from dsct_jax.pretrained import initialise
from dsct_jax.results import About, ImageResult, SplitResults, pack
from dsct_jax.settings import entry, from_section, read_config
from dsct_jax.sharding import FSDP, make_mesh, replicate, shard_batch
from dsct_jax.startup import Preemption, start_process
from dsct_jax.state import Flat, ModelFunctions
from dsct_jax.step import StepConfig, TrainStep, initial_state, make_eval_step, make_train_step
from dsct_jax.subjects import has_subject_logit

SHOWN_METRICS = ("mAP", "accuracy", "macro_f1", "mean_iou")  # in the line of a validation
DRAWN_IMAGES = 24  # on the contact sheet of an evaluation
DRAWN_IN_TRAINING = 6  # of each validation


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `train` section of a configuration; configs/base.py explains each field."""

    batch_size: int
    eval_batch_size: int
    epochs: float
    steps: int
    eval_every: float
    checkpoint_every: float
    keep_checkpoints: int
    log_every: int
    accumulate: int = 1
    ema_decay: float = 0.0
    fsdp: bool = False
    max_skipped: int = 20
    best_metric: str = ""
    early_stopping: int = 0
    wandb: str = ""

    def __post_init__(self) -> None:
        for field in ("batch_size", "eval_batch_size", "keep_checkpoints", "log_every", "accumulate"):
            if getattr(self, field) < 1:
                raise UserError(f"config.train.{field}={getattr(self, field)} cannot be used: must be at least 1")
        for field in ("epochs", "eval_every", "checkpoint_every"):
            if not 0 < getattr(self, field) < float("inf"):
                raise UserError(f"config.train.{field}={getattr(self, field)} cannot be used: must be more than 0")
        if self.steps < 0:
            raise UserError(f"config.train.steps={self.steps} cannot be used: must be 0 (as many as config.train.epochs say) or more")
        for field in ("max_skipped", "early_stopping"):
            if getattr(self, field) < 0:
                raise UserError(f"config.train.{field}={getattr(self, field)} cannot be used: must be 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"config.train.ema_decay={self.ema_decay} cannot be used: must be at least 0 (off) and less than 1")

    @property
    def step_config(self) -> StepConfig:
        """The part that a step needs to know."""
        return StepConfig(accumulate=self.accumulate, ema_decay=self.ema_decay, shard_rules=FSDP if self.fsdp else ())


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
        sections = {"matcher": MatcherConfig, "loss": LossConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
        parts: dict[str, Any] = {name: from_section(kind, name, entry(config, name, Mapping)) for name, kind in sections.items()}
        parts["model"] = model_config(config)
        classes = {"class_names": entry(config, "class_names", tuple), "multi_label": entry(config, "multi_label", bool)}
        parts["data"] = from_section(DataConfig, "data", entry(config, "data", Mapping), **classes)
        return from_section(cls, "", {key: value for key, value in config.items() if key not in parts}, **parts)


def train(config: Mapping[str, Any], workdir: Path, *, profile: tuple[int, int] | None = None) -> dict[str, float]:
    """Trains to the end of the schedule, evaluating and saving on the way; returns the last validation metrics.

    Args:
        profile: (first step, number of steps) that jax's profiler records, below `workdir`/profile.

    Raises:
        Preempted: the run was asked to stop by SIGTERM, and has saved.
    """
    run, mesh = RunConfig.from_mapping(config), make_mesh()
    require_divisible(run.train, mesh)
    train_data = open_data(run, "train", training=True)
    val_data = open_data(run, "val", training=False)
    epoch_steps = train_data.steps_per_epoch
    total_steps = run.train.steps or max(1, round(run.train.epochs * epoch_steps))
    functions = ModelFunctions(run.model)
    params, frozen = starting_values(functions, run, config, workdir)
    keep_programs_in(workdir)
    optimizer, state = initial_state(params, frozen, run.optimizer, total_steps=total_steps, mesh=mesh, step_config=run.train.step_config)
    metadata = {"config": config, "class_names": run.class_names, "seed": run.seed, "steps_per_epoch": epoch_steps, "versions": versions()}

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, keep=run.train.keep_checkpoints, metadata=metadata)))
        best, found, meter = Best(run.best_metric), checkpoints.restore_newest(state), Meter()
        stored: dict[str, Any] = {}
        progress: dict[str, Any] = {}
        if found is not None:
            state, stored = found
            progress = stored.get("progress", {})
            meter.put_back(progress.get("pending", []))
            best.take_up(progress)
        start_step = int(state.step)
        changed = write_settings(config, workdir) if jax.process_index() == 0 else []
        logbook = Logbook(workdir, start_step=start_step, total_steps=total_steps, wandb=run.train.wandb, config=config)
        stack.enter_context(contextlib.closing(logbook))
        trained = sum(value.size for value in state.params.values())
        logbook.tell(
            f"{run.name}: {train_data.num_images} images, {trained:,} trained parameters, {mesh.size} device(s), steps {start_step} to {total_steps}"
        )
        if jax.process_count() > 1:
            logbook.tell(f"process 0 of {jax.process_count()}, the only one that writes")
        if start_step > 0:
            tell_changes(logbook, changed, stored.get("steps_per_epoch", epoch_steps), epoch_steps)
        eval_step = make_eval_step(functions, mesh=mesh)

        def validate(step: int, state) -> tuple[dict[str, Any], bool]:
            """Metrics of the weights as they are, averaged if the run keeps an average; and whether they are the best."""
            drawings: list[Image.Image] | None = [] if jax.process_index() == 0 else None
            weights = (state.ema or state.params) | state.fixed
            metrics = run_evaluation(eval_step, weights, state.frozen, val_data, run, mesh, drawings=drawings)
            logbook.write(step, {f"val/{name}": value for name, value in metrics.items() if isinstance(value, float)})
            if drawings:
                logbook.image(step, "val/predictions", contact_sheet(drawings[:DRAWN_IN_TRAINING], 3))
            logbook.tell("validation: " + "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN_METRICS if name in metrics))
            return metrics, best.add(step, metrics)

        if progress.get("validation_owed"):
            validate(start_step, state)
        if start_step >= total_steps:
            logbook.tell(f"nothing left to train: {workdir} stands at step {start_step}; raise config.train.epochs to go on, or use --mode=eval")
            return {}
        if stopped_early(best, run.train, logbook):
            return {}

        step_function = train_step(functions, optimizer, run, mesh)
        eval_steps = max(1, round(run.train.eval_every * epoch_steps))
        checkpoint_steps = max(1, round(run.train.checkpoint_every * epoch_steps))
        metrics: dict[str, float] = {}
        seen_shapes: set[tuple[int, ...]] = set()
        compilations = CompilationLog(workdir / COMPILATIONS_FILE if jax.process_index() == 0 else None)
        stack.enter_context(contextlib.closing(compilations))
        guard = NonFiniteGuard(workdir, limit=run.train.max_skipped, in_a_row=int(state.skipped), tell=logbook.tell)
        preemption = stack.enter_context(Preemption())
        batches = Prefetch(train_data.iterator(start_step, total_steps - start_step), lambda batch: shard_batch(batch, mesh))
        stack.enter_context(batches)
        meter.resume()
        for step, batch in enumerate(batches, start_step + 1):
            if profile and step == profile[0]:
                jax.profiler.start_trace(workdir / "profile")
                stack.callback(stop_profile)
            started = time.monotonic()
            with compilations.during(step, "x".join(map(str, batch.images.shape))):
                state, terms = step_function(state, batch)
            seconds = 0.0
            if batch.images.shape not in seen_shapes:
                seen_shapes.add(batch.images.shape)
                seconds = time.monotonic() - started
                programs = f"program {len(seen_shapes)} of at most {len(run.data.buckets)}"
                logbook.tell(f"compiled for images {batch.images.shape} in {seconds:.1f} s ({programs})")
                logbook.leave_out(seconds)
            meter.add(terms, left_out=seconds)
            guard.add(step, batch, terms)
            if profile and step == profile[0] + profile[1] - 1:
                jax.block_until_ready(state)
                stop_profile()
                logbook.tell(f"profile of steps {profile[0]} to {step}: {workdir / 'profile'}")
            last, stopping = step == total_steps, preemption.reached(step)
            evaluating, saving = step % eval_steps == 0 or last, step % checkpoint_steps == 0 or last or stopping
            # A line at every checkpoint too: a run that continues there then writes the same lines as one that never stopped.
            if saving or evaluating or step % run.train.log_every == 0:
                guard.look()
                checkpoints.check()
            if step % run.train.log_every == 0 or evaluating or step % checkpoint_steps == 0:
                rates = learning_rates(run.optimizer, total_steps, step - 1)
                write_line(logbook, step, meter, waited=batches.take_wait(), rates=rates, batch_size=run.train.batch_size)
            if evaluating and not stopping:
                with compilations.during(step, "validation"):
                    metrics, better = validate(step, state)
                saving |= better
                batches.take_wait()
            ends = not stopping and evaluating and stopped_early(best, run.train, logbook)
            if saving or ends:
                where = {"step": step, "epoch": step // epoch_steps, "batch_in_epoch": step % epoch_steps}
                # Told to stop between two lines, or before a validation: what these would have held is kept for the run that continues.
                owed = {"pending": meter.pending(), "validation_owed": evaluating and stopping}
                checkpoints.save(state, progress=where | owed | best.as_progress())
            if evaluating or saving:
                meter.resume()
            if stopping:
                checkpoints.wait()
                raise Preempted(f"asked to stop: saved at step {step}; the same command continues from there")
            if ends:
                break
        tell_skipped(train_data, val_data, tell=logbook.tell)
        if best.value is not None:
            logbook.tell(f"best validation: {best.metric} {best.value:.3f} at step {best.step}, kept in {workdir / 'checkpoints' / str(best.step)}")
    return metrics


def write_line(logbook: Logbook, step: int, meter: Meter, *, waited: float, rates: Mapping[str, float], batch_size: int) -> None:
    """What was measured since the last line of the log."""
    means, times = meter.take(batch_size=batch_size, waited=waited)
    parts = {"train": means | dict(rates), "time": times, "memory": memory()}
    logbook.write(step, {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()})
    speed = f"{times['images_per_s']:.1f} images/s  data wait {times['data_wait']:.0%}"
    logbook.progress(step, f"loss {means.get('total', np.nan):.3f}  {speed}")


def tell_changes(logbook: Logbook, changed: list[str], steps_before: int, steps_now: int) -> None:
    """What is different from the start before."""
    if changed:
        logbook.tell(f"settings changed since the last start: config.{'; config.'.join(changed)}")
    if steps_before != steps_now:
        logbook.tell(f"the training data or the batch size changed: {steps_before} -> {steps_now} steps an epoch")


def stop_profile() -> None:
    """Ends the profiler's recording, if one is going on."""
    with contextlib.suppress(RuntimeError):
        jax.profiler.stop_trace()


def stopped_early(best: Best, config: TrainConfig, logbook: Logbook) -> bool:
    """Whether the validations no longer improve; says so."""
    over = 0 < config.early_stopping <= best.waited
    if over:
        logbook.tell(
            f"stopped early: {best.metric} has not improved in {best.waited} validations since step {best.step} "
            f"(config.train.early_stopping={config.early_stopping})"
        )
    return over


def require_divisible(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless the global batch sizes divide by the number of devices."""
    if config.batch_size % (mesh.size * config.accumulate) and config.accumulate > 1:
        parts = f"{mesh.size} devices x config.train.accumulate={config.accumulate}"
        raise UserError(f"config.train.batch_size={config.batch_size} cannot be shared by {parts}: set it to a multiple of their product")
    for field in ("batch_size", "eval_batch_size"):
        if getattr(config, field) % mesh.size:
            raise UserError(
                f"config.train.{field}={getattr(config, field)} cannot be shared by {mesh.size} devices: set it to a multiple of {mesh.size}"
            )


class Preempted(Exception):
    """The run was asked to stop, and has saved."""


def starting_values(functions: ModelFunctions, run: RunConfig, config: Mapping[str, Any], workdir: Path) -> tuple[Flat, Flat]:
    """Random values, and those of config.init_from in their place; what was taken is printed and kept in init_from.txt."""
    params, frozen = functions.init(run.seed)
    if not run.init_from or newest_checkpoint(workdir):  # a run that continues has its own
        return params, frozen
    params, frozen, lines = initialise(run.init_from, functions, params, frozen, config)
    if jax.process_index() == 0:
        print("\n".join(lines), flush=True)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "init_from.txt").write_text("\n".join(lines) + "\n")
    return params, frozen


def train_step(functions: ModelFunctions, optimizer: optax.GradientTransformation, run: RunConfig, mesh: Mesh) -> TrainStep:
    """The step of a run."""
    return make_train_step(
        functions,
        optimizer,
        loss=run.loss,
        matcher=run.matcher,
        multi_label=run.multi_label,
        mesh=mesh,
        seed=run.seed,
        step_config=run.train.step_config,
    )


def print_plan(config: Mapping[str, Any]) -> None:
    """What a training run would take: parameters, memory, compile time and arithmetic. Compiles every program; reads no data."""
    run, mesh = RunConfig.from_mapping(config), make_mesh()
    require_divisible(run.train, mesh)
    functions = ModelFunctions(run.model)
    optimizer, state = initial_state(*functions.init(run.seed), run.optimizer, total_steps=1, mesh=mesh, step_config=run.train.step_config)
    sizes = {"batch_size": run.train.batch_size, "max_targets": run.data.max_targets, "num_classes": len(run.class_names)}
    print(f"{run.name}: {mesh.size} {jax.devices()[0].device_kind} device(s); compiling {len(run.data.buckets)} size(s) of images ...", flush=True)
    print(format_plan(make_plan(train_step(functions, optimizer, run, mesh), state, run.data.buckets, **sizes)))


def open_data(run: RunConfig, split: str, *, training: bool) -> Dataset:
    """The data of one split for this process; says what was read and what had to be left out."""
    batch_size = run.train.batch_size if training else run.train.eval_batch_size
    hosts = {"host_index": jax.process_index(), "host_count": jax.process_count()}
    data = make_dataset(run.data, split, batch_size=batch_size, seed=run.seed, training=training, **hosts)
    if jax.process_index() == 0:
        print(f"{split}: {data.report}", flush=True)
    if data.report.people == 0:
        raise UserError(f"{data.report.source}: shows no person; {split} data need at least one box inside an image")
    return data


def tell_skipped(*datasets: Dataset, tell) -> None:
    """At the end of a run: how many images could not be read (only with config.data.skip_corrupt)."""
    damaged = {name for data in datasets for name in data.skipped}
    unreadable = sum(data.report.unreadable for data in datasets)
    if damaged or unreadable:
        tell(f"left out: {unreadable} image(s) that could not be opened and {len(damaged)} with damaged pixels")


def run_evaluation(
    eval_step, params: Flat, frozen: Flat, data: Dataset, run: RunConfig, mesh: Mesh, *, drawings: list[Image.Image] | None = None
) -> dict[str, Any]:
    """Every image of `data` once -> metrics; some are drawn into `drawings` if given."""
    return evaluate(collect_results(eval_step, params, frozen, data, run, mesh, drawings=drawings, drawn=DRAWN_IN_TRAINING))


def collect_results(
    eval_step,
    params: Flat,
    frozen: Flat,
    data: Dataset,
    run: RunConfig,
    mesh: Mesh,
    *,
    split: str = "val",
    checkpoint: str = "",
    drawings: list[Image.Image] | None = None,
    drawn: int = DRAWN_IMAGES,
) -> SplitResults:
    """What the model says of every image of `data`, each once, on every process; some of this process's are drawn into `drawings` if given."""
    subject_logit = has_subject_logit(multi_label=run.multi_label, class_loss=run.loss.class_loss)
    results: list[ImageResult] = []
    seen = 0
    with Prefetch(data.iterator(), lambda batch: (batch, shard_batch(batch, mesh))) as batches:
        for batch, sharded in batches:
            predictions, whole = on_host(eval_step(params, frozen, sharded)), on_host(dataclasses.replace(sharded, images=None))
            logits, boxes = predictions.logits[-1], predictions.boxes[-1]
            results += image_results(whole, logits, boxes)
            seen += int((whole.image_ids >= 0).sum())  # images that were skipped as damaged keep their number
            if drawings is not None and len(drawings) < drawn:
                first = jax.process_index() * len(batch.real)
                here = slice(first, first + len(batch.real))
                names: dict[str, Any] = {"class_names": run.class_names, "multi_label": run.multi_label, "subject_logit": subject_logit}
                shown = jax.tree.map(operator.itemgetter(slice(drawn - len(drawings))), batch)
                drawings += draw_batch(shown, logits[here][: len(shown.real)], boxes[here][: len(shown.real)], **names)
    if seen != data.num_images:
        raise RuntimeError(f"evaluated {seen} of {data.num_images} images")
    if not results:
        raise UserError(f"{data.report.source}: none of its {data.num_images} images could be read")
    return pack(results, About(run.class_names, run.multi_label, subject_logit, data.report.protocol, split, checkpoint))


def on_host(tree: Any) -> Any:
    """Global arrays -> whole numpy arrays, on every process."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def image_results(batch: Batch, logits: np.ndarray, boxes: np.ndarray) -> Iterator[ImageResult]:
    """The real images of a batch with their predictions and people, as the evaluation takes them."""
    for i in np.flatnonzero(batch.real):
        valid = batch.targets.valid[i]
        height, width = (int(side) for side in batch.original_sizes[i])
        cx, cy, w, h = (batch.targets.boxes[i][valid] * np.array([width, height, width, height], np.float32)).T
        yield ImageResult(
            image_id=int(batch.image_ids[i]),
            logits=logits[i],
            boxes=boxes[i],
            size=(height, width),
            gt_boxes=np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1),
            gt_labels=batch.targets.labels[i][valid],
        )


def evaluate_checkpoint(config: Mapping[str, Any], workdir: Path, split: str) -> dict[str, Any]:
    """Evaluates the newest checkpoint on a split under every protocol of docs/evaluation.md.

    Prints the table; writes metrics_<split>.json, .md and .png, predictions_<split>.npz (what `python -m dsct_jax.evaluate` reads) and
    predictions_<split>.png into `workdir`, and, on the validation split, thresholds.json, which prediction and the other splits' evaluation use.
    """
    run, mesh = RunConfig.from_mapping(config), make_mesh()
    require_divisible(run.train, mesh)
    params, frozen, metadata = load_weights(workdir)
    require_same_model(metadata["config"], config, str(workdir))
    functions = ModelFunctions(run.model)
    require_same_shapes(functions.param_shapes | functions.frozen_shapes, {**params, **frozen}, str(workdir))
    checkpoint = newest_checkpoint(workdir)
    calibration = calibration_of_run(workdir, class_names=run.class_names, checkpoint=checkpoint) if split != "val" else None
    data = open_data(run, split, training=False)
    params, frozen = replicate((params, frozen), mesh)
    drawings: list[Image.Image] = []
    eval_step = make_eval_step(functions, mesh=mesh)
    results = collect_results(eval_step, params, frozen, data, run, mesh, split=split, checkpoint=checkpoint, drawings=drawings)
    metrics = evaluate(results, calibration=calibration, resamples=RESAMPLES, seed=run.seed)
    if jax.process_index() == 0:
        print(format_table(metrics))
        tell_skipped(data, tell=print)
        predictions, sheet = workdir / f"predictions_{split}.npz", workdir / f"predictions_{split}.png"
        results.save(predictions)
        contact_sheet(drawings[:DRAWN_IMAGES], 6).save(sheet)
        numbers = write_evaluation(metrics, workdir, suffix=f"_{split}")
        print(f"numbers: {'   '.join(map(str, numbers))}   predictions: {predictions}   drawings (dashed: annotated): {sheet}")
        if split == "val":
            fit_calibration(results).save(workdir / CALIBRATION_FILE)
            print(f"temperature and thresholds fitted for prediction and for the other splits: {workdir / CALIBRATION_FILE}")
        elif calibration is None:
            print("no thresholds fitted on validation: --mode=eval --split=val makes them")
    return metrics


def make_parser() -> Parser:
    """The command's own flags; what begins with --config. is left to `override`."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", type=Path, help="configuration file, such as configs/demo.py, or a run's config.json")
    parser.add_argument("--workdir", type=Path, help="directory of the run: checkpoints, metrics, settings")
    parser.add_argument(
        "--mode",
        choices=["train", "eval", "plan"],
        default="train",
        help="train, evaluating on the way; evaluate the newest checkpoint; or say what a run takes",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="what --mode=eval evaluates")
    parser.add_argument("--coordinator", help=f"several processes: HOST:PORT of process 0, the same for all; {AUTO}: as jax finds out by itself")
    parser.add_argument("--num_processes", type=int, help="several processes: how many")
    parser.add_argument("--process_id", type=int, help="several processes: which of them this is, from 0")
    parser.add_argument("--profile", metavar="STEP:NUMBER", help="records so many steps with jax's profiler, from this one on, below the workdir")
    return parser


def profile_window(text: str | None) -> tuple[int, int] | None:
    """--profile=STEP:NUMBER as two numbers. Raises UserError."""
    if text is None:
        return None
    step, _, number = text.partition(":")
    if not (step.isdecimal() and number.isdecimal() and int(step) and int(number)):
        raise UserError(f"--profile={text} cannot be used: must be STEP:NUMBER, such as 20:5 for the steps 20 to 24")
    return int(step), int(number)


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen mode; a user's mistake is one line on stderr and exit status 2."""
    try:
        arguments, overrides = make_parser().parse_known_args(argv)
        for name in ("config",) if arguments.mode == "plan" else ("config", "workdir"):
            if getattr(arguments, name) is None:
                raise UserError(f"--{name} is missing" + (f", but there is {overrides[0]}" if overrides else "") + "; see train.py --help")
        window = profile_window(arguments.profile)
        if arguments.workdir and arguments.workdir.exists() and not arguments.workdir.is_dir():
            raise UserError(f"--workdir={arguments.workdir}: is a file; name a directory")
        config = override(read_config(arguments.config), overrides)
        join_processes(arguments.coordinator, arguments.num_processes, arguments.process_id)
        if arguments.mode == "train":
            train(config, arguments.workdir, profile=window)
        elif arguments.mode == "plan":
            print_plan(config)
        else:
            evaluate_checkpoint(config, arguments.workdir, arguments.split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Preempted as request:
        print(request, flush=True)
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        print(f"error: {error.filename or arguments.workdir}: {error.strerror}; make room, then the same command continues", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    start_process()
    sys.exit(main())
