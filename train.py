"""Trains and evaluates a model: configuration -> data -> model -> state -> loop.

    python train.py --config=configs/demo.py --workdir=runs/demo [--config.optimizer.learning_rate=1e-4 ...]
    python train.py --config=configs/demo.py --workdir=runs/demo --mode=eval [--split=test]

The same command again continues from the newest checkpoint in the workdir.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from data.config import DataConfig
from data.pipeline import Dataset, make_dataset
from dsct_jax.batch import Batch
from dsct_jax.checkpoint import Checkpoints, load_weights, require_same_shapes
from dsct_jax.errors import UserError
from dsct_jax.evaluate import ImageResult, evaluate, format_table
from dsct_jax.load import model_config
from dsct_jax.logbook import Logbook
from dsct_jax.losses import LossConfig
from dsct_jax.matcher import MatcherConfig
from dsct_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule, multipliers
from dsct_jax.prefetch import Prefetch
from dsct_jax.settings import from_section, plain
from dsct_jax.state import ModelFunctions
from dsct_jax.step import TrainState, make_eval_step, make_mesh, make_train_step, replicate, shard_batch

config_flags.DEFINE_config_file("config", None, "Configuration file, such as configs/demo.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, settings.")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (and evaluate on the way), or evaluate the newest checkpoint.")
flags.DEFINE_enum("split", "test", ["train", "val", "test"], "What --mode=eval evaluates.")
flags.mark_flags_as_required(["config", "workdir"])

# Numbers the command line cannot know in advance; every other one is in the configuration.
SHOWN_METRICS = ("mAP", "accuracy", "macro_f1", "mean_iou")


def train(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains to the end of the schedule, evaluating and saving on the way; returns the last validation metrics."""
    mesh = make_mesh()
    check_batch_sizes(config, mesh.size)
    data_config = from_section(DataConfig, "data", config.data, class_names=plain(config.class_names), multi_label=config.multi_label)
    train_data = open_data(data_config, "train", batch_size=config.train.batch_size, seed=config.seed, training=True)
    val_data = open_data(data_config, "val", batch_size=config.train.eval_batch_size, seed=config.seed, training=False)
    total_steps = config.train.steps or round(config.train.epochs * train_data.steps_per_epoch)

    functions = ModelFunctions(model_config(config))
    optimizer_config = from_section(OptimizerConfig, "optimizer", config.optimizer)
    params, frozen = functions.init(config.seed)
    rates = multipliers(params, optimizer_config.rules)
    trained = {path: value for path, value in params.items() if rates[path] > 0}
    fixed = {path: value for path, value in params.items() if path not in trained}
    optimizer = make_optimizer(optimizer_config, trained, total_steps)
    state = TrainState(step=np.int32(0), params=trained, fixed=fixed, frozen=frozen, opt_state=optimizer.init(trained))
    state = replicate(state, mesh)

    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints, metadata={"config": plain(config), "versions": versions()})
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
    start_step = int(state.step)
    write_settings(config, workdir)
    logbook = Logbook(workdir, start_step=start_step, total_steps=total_steps)
    logbook.tell(
        f"{config.name}: {train_data.num_images} images, {sum(v.size for v in trained.values()):,} trained parameters, {mesh.size} device(s), "
        f"steps {start_step} to {total_steps}"
    )

    train_step = make_train_step(
        functions,
        optimizer,
        loss=from_section(LossConfig, "loss", config.loss),
        matcher=from_section(MatcherConfig, "matcher", config.matcher),
        multi_label=config.multi_label,
        mesh=mesh,
        seed=config.seed,
    )
    eval_step = make_eval_step(functions, mesh=mesh)
    schedule = make_schedule(optimizer_config, total_steps)
    eval_steps = max(1, round(config.train.eval_every * train_data.steps_per_epoch))
    checkpoint_steps = max(1, round(config.train.checkpoint_every * train_data.steps_per_epoch))
    metrics: dict[str, float] = {}
    seen_shapes: set[tuple[int, ...]] = set()
    pending: list[dict[str, jax.Array]] = []
    batches = Prefetch(train_data.iterator(start_step, total_steps - start_step), lambda batch: shard_batch(batch, mesh))
    clock = time.monotonic()
    with batches:
        for step, batch in enumerate(batches, start_step + 1):
            if batch.images.shape not in seen_shapes:
                seen_shapes.add(batch.images.shape)
                logbook.tell(f"compiling for images {batch.images.shape} (program {len(seen_shapes)} of at most {len(config.data.buckets)})")
            state, terms = train_step(state, batch)
            pending.append(terms)
            last = step == total_steps
            if step % config.train.log_every == 0 or last:
                means = mean_of(pending)
                if not np.isfinite(means["total"]):
                    raise UserError(
                        f"step {step}: the loss is {means['total']}; lower optimizer.learning_rate, then run again from the last checkpoint"
                    )
                seconds = time.monotonic() - clock
                speed, waited = len(pending) * config.train.batch_size / seconds, batches.take_wait() / seconds
                scalars = {f"train/{name}": value for name, value in means.items()} | {"train/learning_rate": float(schedule(step - 1))}
                logbook.write(step, scalars | {"time/images_per_s": speed, "time/data_wait": waited})
                logbook.progress(step, f"loss {means['total']:.3f}  {speed:.1f} images/s  data wait {waited:.0%}")
                pending, clock = [], time.monotonic()
            if step % eval_steps == 0 or last:
                metrics = run_evaluation(eval_step, state, val_data, config, mesh)
                logbook.write(step, {f"val/{name}": value for name, value in metrics.items() if isinstance(value, float)})
                logbook.tell("validation: " + "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN_METRICS if name in metrics))
                batches.take_wait()
                clock = time.monotonic()
            if step % checkpoint_steps == 0 or last:
                checkpoints.save(state)
    checkpoints.close()
    logbook.close()
    return metrics


def check_batch_sizes(config: ConfigDict, num_devices: int) -> None:
    """Raises UserError unless the global batch sizes divide by the number of devices."""
    for field in ("batch_size", "eval_batch_size"):
        size = config.train[field]
        if size < 1 or size % num_devices:
            raise UserError(f"config.train.{field}: {size} does not divide by the {num_devices} devices; use a multiple of {num_devices}")


def open_data(data_config: DataConfig, split: str, **arguments) -> Dataset:
    """The data of one split for this process; says what was read and what had to be left out."""
    data = make_dataset(data_config, split, host_index=jax.process_index(), host_count=jax.process_count(), **arguments)
    print(f"{split}: {data.report}", flush=True)
    return data


def run_evaluation(eval_step, state_or_weights, data: Dataset, config: ConfigDict, mesh) -> dict[str, float]:
    """Every image of `data` once -> metrics."""
    params, frozen = (
        (state_or_weights.params | state_or_weights.fixed, state_or_weights.frozen) if isinstance(state_or_weights, TrainState) else state_or_weights
    )
    results: list[ImageResult] = []
    with Prefetch(data.iterator(), lambda batch: (batch, shard_batch(batch, mesh))) as batches:
        for batch, sharded in batches:
            predictions = eval_step(params, frozen, sharded)
            results += image_results(batch, np.asarray(predictions.logits[-1]), np.asarray(predictions.boxes[-1]))
    if len(results) != data.num_images:
        raise RuntimeError(f"evaluated {len(results)} of {data.num_images} images")
    return evaluate(results, class_names=tuple(config.class_names), multi_label=config.multi_label)


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


def evaluate_checkpoint(config: ConfigDict, workdir: Path, split: str) -> None:
    """Evaluates the newest checkpoint on a split; prints the table and writes metrics_<split>.json beside it."""
    mesh = make_mesh()
    check_batch_sizes(config, mesh.size)
    functions = ModelFunctions(model_config(config))
    params, frozen, _ = load_weights(workdir)
    require_same_shapes(functions.param_shapes | functions.frozen_shapes, {**params, **frozen}, str(workdir))
    data_config = from_section(DataConfig, "data", config.data, class_names=plain(config.class_names), multi_label=config.multi_label)
    data = open_data(data_config, split, batch_size=config.train.eval_batch_size, seed=config.seed, training=False)
    metrics = run_evaluation(make_eval_step(functions, mesh=mesh), replicate((params, frozen), mesh), data, config, mesh)
    print(format_table(metrics))
    (workdir / f"metrics_{split}.json").write_text(json.dumps(metrics, indent=1) + "\n")


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides the code."""
    import flax
    import optax
    import orbax.checkpoint

    found = {module.__name__: module.__version__ for module in (jax, flax, optax, orbax.checkpoint, np)}
    return found | {"python": platform.python_version()}


def write_settings(config: ConfigDict, workdir: Path) -> None:
    """config.json and env.json: what ran, and where."""
    (workdir / "config.json").write_text(json.dumps(plain(config), indent=1) + "\n")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout.strip()
    devices = {"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind, "count": jax.device_count()}
    environment = {"versions": versions(), "devices": devices, "host": platform.platform(), "commit": commit or None, "command": sys.argv}
    (workdir / "env.json").write_text(json.dumps(environment, indent=1) + "\n")


def mean_of(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Mean of every metric over the steps since the last line of the log."""
    fetched = jax.device_get(pending)
    return {name: float(np.mean([terms[name] for terms in fetched])) for name in fetched[0]}


def main(_: list[str]) -> None:
    """Runs the chosen mode; a user's mistake ends in one line and exit status 2."""
    config, workdir = flags.FLAGS.config, Path(flags.FLAGS.workdir)
    try:
        if flags.FLAGS.mode == "train":
            train(config, workdir)
        else:
            evaluate_checkpoint(config, workdir, flags.FLAGS.split)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
