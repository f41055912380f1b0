"""Trains and evaluates a model: configuration -> data -> model -> state -> loop.

    python train.py --config=configs/demo.py --workdir=runs/demo [--config.optimizer.learning_rate=1e-4 ...]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=eval [--split=test]
    python train.py --config=configs/emotic_r50.py --mode=plan

The same command again continues from the newest checkpoint in the workdir. SIGTERM saves one and leaves. --mode=plan says what a run would take.
"""

import contextlib
import dataclasses
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
from dsct_jax.distributed import AUTO, join_processes
from dsct_jax.drawing import contact_sheet, draw_batch
from dsct_jax.errors import UserError
from dsct_jax.evaluate import RESAMPLES, evaluate, fit_calibration, write_evaluation
from dsct_jax.evaluation_table import format_table
from dsct_jax.load import model_config
from dsct_jax.logbook import Logbook, versions, write_settings
from dsct_jax.losses import LossConfig
from dsct_jax.matcher import MatcherConfig
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
from dsct_jax.step import StepConfig, TrainState, TrainStep, initial_state, make_eval_step, make_train_step
from dsct_jax.subjects import has_subject_logit

SHOWN_METRICS = ("mAP", "accuracy", "macro_f1", "mean_iou")  # in the line of a validation
DRAWN_IMAGES = 24  # on the contact sheet of an evaluation


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
    accumulate: int
    ema_decay: float
    fsdp: bool
    max_skipped: int

    def __post_init__(self) -> None:
        for field in ("batch_size", "eval_batch_size", "keep_checkpoints", "log_every", "accumulate"):
            if getattr(self, field) < 1:
                raise UserError(f"config.train.{field}={getattr(self, field)} cannot be used: must be at least 1")
        for field in ("epochs", "eval_every", "checkpoint_every"):
            if not 0 < getattr(self, field) < float("inf"):
                raise UserError(f"config.train.{field}={getattr(self, field)} cannot be used: must be more than 0")
        if self.steps < 0:
            raise UserError(f"config.train.steps={self.steps} cannot be used: must be 0 (as many as config.train.epochs say) or more")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"config.train.ema_decay={self.ema_decay} cannot be used: must be at least 0 (off) and less than 1")
        if self.max_skipped < 0:
            raise UserError(f"config.train.max_skipped={self.max_skipped} cannot be used: must be 0 or more")

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

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> "RunConfig":
        """Raises UserError at the first field that is unknown, missing, or cannot be used."""
        sections = {"matcher": MatcherConfig, "loss": LossConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
        parts: dict[str, Any] = {name: from_section(kind, name, entry(config, name, Mapping)) for name, kind in sections.items()}
        parts["model"] = model_config(config)
        classes = {"class_names": entry(config, "class_names", tuple), "multi_label": entry(config, "multi_label", bool)}
        parts["data"] = from_section(DataConfig, "data", entry(config, "data", Mapping), **classes)
        return from_section(cls, "", {key: value for key, value in config.items() if key not in parts}, **parts)


def train(config: Mapping[str, Any], workdir: Path) -> dict[str, float]:
    """Trains to the end of the schedule, evaluating and saving on the way; returns the last validation metrics."""
    run, mesh = RunConfig.from_mapping(config), make_mesh()
    require_divisible(run.train, mesh)
    train_data = open_data(run, "train", training=True)
    val_data = open_data(run, "val", training=False)
    epoch_steps = train_data.steps_per_epoch
    total_steps = run.train.steps or max(1, round(run.train.epochs * epoch_steps))
    functions = ModelFunctions(run.model)
    params, frozen = starting_values(functions, run, config, workdir)
    optimizer, state = initial_state(params, frozen, run.optimizer, total_steps=total_steps, mesh=mesh, step_config=run.train.step_config)
    metadata = {"config": config, "versions": versions()}

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, keep=run.train.keep_checkpoints, metadata=metadata)))
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        start_step = int(state.step)
        changed = write_settings(config, workdir) if jax.process_index() == 0 else []
        logbook = stack.enter_context(contextlib.closing(Logbook(workdir, start_step=start_step, total_steps=total_steps)))
        trained = sum(value.size for value in state.params.values())
        logbook.tell(
            f"{run.name}: {train_data.num_images} images, {trained:,} trained parameters, {mesh.size} device(s), steps {start_step} to {total_steps}"
        )
        if jax.process_count() > 1:
            logbook.tell(f"process 0 of {jax.process_count()}, the only one that writes")
        if start_step > 0 and changed:
            logbook.tell(f"settings changed since the last start: config.{'; config.'.join(changed)}")
        if start_step >= total_steps:
            logbook.tell(f"nothing left to train: {workdir} stands at step {start_step}; raise config.train.epochs to go on, or use --mode=eval")
            return {}

        step_function = train_step(functions, optimizer, run, mesh)
        eval_step = make_eval_step(functions, mesh=mesh)
        eval_steps = max(1, round(run.train.eval_every * epoch_steps))
        checkpoint_steps = max(1, round(run.train.checkpoint_every * epoch_steps))
        metrics: dict[str, float] = {}
        seen_shapes: set[tuple[int, ...]] = set()
        pending: list[dict[str, jax.Array]] = []
        batches = Prefetch(train_data.iterator(start_step, total_steps - start_step), lambda batch: shard_batch(batch, mesh))
        stack.enter_context(batches)
        preemption = stack.enter_context(Preemption())
        clock = time.monotonic()
        for step, batch in enumerate(batches, start_step + 1):
            started = time.monotonic()
            state, terms = step_function(state, batch)
            pending.append(terms)
            if batch.images.shape not in seen_shapes:
                seen_shapes.add(batch.images.shape)
                seconds = time.monotonic() - started
                programs = f"program {len(seen_shapes)} of at most {len(run.data.buckets)}"
                logbook.tell(f"compiled for images {batch.images.shape} in {seconds:.1f} s ({programs})")
                logbook.leave_out(seconds)
                clock += seconds
            last = step == total_steps
            stopping = preemption.reached(step)
            saving = step % checkpoint_steps == 0 or last or stopping
            # A line at every checkpoint too: a run that continues there then writes the same lines as one that never stopped.
            if step % run.train.log_every == 0 or saving:
                means = mean_of(pending)
                require_finite(state, batch, step, run.train.max_skipped, workdir)
                seconds = time.monotonic() - clock
                speed, waited = len(pending) * run.train.batch_size / seconds, batches.take_wait() / seconds
                scalars = {f"train/{name}": value for name, value in means.items()} | {
                    f"train/{name}": value for name, value in learning_rates(run.optimizer, total_steps, step - 1).items()
                }
                logbook.write(step, scalars | {"time/images_per_s": speed, "time/data_wait": waited})
                logbook.progress(step, f"loss {means.get('total', np.nan):.3f}  {speed:.1f} images/s  data wait {waited:.0%}")
                pending, clock = [], time.monotonic()
            if (step % eval_steps == 0 and not stopping) or last:
                metrics = run_evaluation(eval_step, (state.ema or state.params) | state.fixed, state.frozen, val_data, run, mesh)
                logbook.write(step, {f"val/{name}": value for name, value in metrics.items() if isinstance(value, float)})
                logbook.tell("validation: " + "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN_METRICS if name in metrics))
                batches.take_wait()
                clock = time.monotonic()
            if saving:
                checkpoints.save(state)
            if stopping and not last:
                checkpoints.wait()
                raise Preempted(f"asked to stop: saved at step {step}; the same command continues from there")
        tell_skipped(train_data, val_data, tell=logbook.tell)
    return metrics


def require_divisible(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless the global batch sizes divide by the number of devices."""
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


def require_finite(state: TrainState, batch: Batch, step: int, limit: int, workdir: Path) -> None:
    """Ends the run when more than `limit` steps in a row were skipped because something in them was not finite; the batch is kept for inspection.

    The parameters are those of the last good step, as in the checkpoints.
    """
    skipped = int(state.skipped)
    if skipped <= limit:
        return
    path = workdir / f"not_finite_step{step}_process{jax.process_index()}.npz"
    parts = {field.name: getattr(part, field.name) for part in (batch, batch.targets) for field in dataclasses.fields(part)}
    del parts["targets"]
    arrays: dict[str, Any] = {name: np.concatenate([shard.data for shard in array.addressable_shards]) for name, array in parts.items()}
    np.savez_compressed(path, **arrays)
    raise UserError(
        f"step {step}: the loss or its gradient is not finite, {skipped} step(s) in a row (config.train.max_skipped={limit}); lower "
        f"config.optimizer.learning_rate, then run again from the last checkpoint. The last batch is in {path}"
    )


def mean_of(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Mean of every metric over the steps since the last line of the log; of those that were skipped only their share, `nonfinite`."""
    fetched = jax.device_get(pending)
    sound = [terms for terms in fetched if not terms["nonfinite"]]
    means = {name: float(np.mean([terms[name] for terms in sound])) for name in fetched[0]} if sound else {}
    return means | {"nonfinite": float(np.mean([terms["nonfinite"] for terms in fetched]))}


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


def run_evaluation(eval_step, params: Flat, frozen: Flat, data: Dataset, run: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """Every image of `data` once -> metrics."""
    return evaluate(collect_results(eval_step, params, frozen, data, run, mesh))


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
            if drawings is not None and len(drawings) < DRAWN_IMAGES:
                first = jax.process_index() * len(batch.real)
                here = slice(first, first + len(batch.real))
                names: dict[str, Any] = {"class_names": run.class_names, "multi_label": run.multi_label, "subject_logit": subject_logit}
                drawings += draw_batch(batch, logits[here], boxes[here], **names)
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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen mode; a user's mistake is one line on stderr and exit status 2."""
    try:
        arguments, overrides = make_parser().parse_known_args(argv)
        for name in ("config", "workdir") if arguments.mode != "plan" else ("config",):
            if getattr(arguments, name) is None:
                raise UserError(f"--{name} is missing" + (f", but there is {overrides[0]}" if overrides else "") + "; see train.py --help")
        if arguments.workdir is not None and arguments.workdir.exists() and not arguments.workdir.is_dir():
            raise UserError(f"--workdir={arguments.workdir}: is a file; name a directory")
        config = override(read_config(arguments.config), overrides)
        join_processes(arguments.coordinator, arguments.num_processes, arguments.process_id)
        if arguments.mode == "train":
            train(config, arguments.workdir)
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
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    start_process()
    sys.exit(main())
