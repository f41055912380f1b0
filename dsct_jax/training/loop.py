"""The training loop: what is done after each step of a run, and what ends it."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsct_jax.batch import Batch
from dsct_jax.errors import UserError
from dsct_jax.parallel import Prefetch
from dsct_jax.runtime import CompilationLog, Preemption
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.config import TrainConfig as TrainConfig
from dsct_jax.training.logbook import Logbook
from dsct_jax.training.optimizer import OptimizerConfig, learning_rates
from dsct_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Schedule:
    """After which steps what is due. Numbers of steps."""

    epoch: int
    total: int
    log: int
    evaluate: int
    checkpoint: int

    @classmethod
    def of(cls, config: TrainConfig, epoch_steps: int) -> "Schedule":
        """The schedule of a run whose epoch has so many steps."""
        total = config.steps or max(1, round(config.epochs * epoch_steps))
        evaluate, checkpoint = (
            max(1, round(every * epoch_steps))
            for every in (config.eval_every, config.checkpoint_every)
        )
        return cls(
            epoch=epoch_steps,
            total=total,
            log=config.log_every,
            evaluate=evaluate,
            checkpoint=checkpoint,
        )

    def evaluates(self, step: int) -> bool:
        """Whether a validation follows."""
        return step % self.evaluate == 0 or step == self.total

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows, whatever the validation says."""
        return step % self.checkpoint == 0 or step == self.total

    def logs(self, step: int) -> bool:
        """Whether a line of the log follows: at every checkpoint too, so that a run that continues
        there writes the lines of an unbroken one.
        """
        return step % self.log == 0 or step % self.checkpoint == 0 or self.evaluates(step)


_LOWER_IS_BETTER = ("total", "loss", "error")  # beginnings of a metric's name


class NonFiniteGuard:
    """Counts the steps that were skipped because the loss or a gradient was not finite, and stops
    the run at more than `limit` of them in a row.

    A step is looked at when the next one is under way, so that the device never waits for the host.

    Args:
        limit: of the configuration, train.max_skipped.
        in_a_row: skipped steps right before the first one, as in the restored state.
        tell: says one line for each skipped step.
    """

    def __init__(self, workdir: Path, *, limit: int, in_a_row: int, log: Callable[[str], None]):
        self._workdir, self._limit, self._in_a_row, self._log = workdir, limit, in_a_row, tell
        self._last: tuple[int, Any, Any] | None = None

    def add(self, step: int, batch: Any, metrics: Mapping[str, jax.Array]) -> None:
        """Looks at the step before, and remembers this one."""
        self.look()
        self._last = (step, batch, metrics["nonfinite"]) if "nonfinite" in metrics else None

    def look(self) -> None:
        """Looks at the last step now. Raises UserError, with the batch written beside the run's
        files, when the limit is reached.
        """
        if self._last is None:
            return
        (step, batch, nonfinite), self._last = self._last, None
        if not float(nonfinite):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        limit = f"config.train.max_skipped={self._limit}"
        if self._in_a_row > self._limit:
            path = save_batch(batch, self._workdir, step)
            raise UserError(
                f"step {step}: the loss or its gradient is not finite, {self._in_a_row} step(s) "
                f"in a row ({limit}); lower "
                "config.optimizer.learning_rate, then run again from the last checkpoint. The "
                f"last batch is in {path}"
            )
        self._log(
            f"step {step}: the loss or its gradient is not finite; skipped, {self._in_a_row} in a "
            f"row ({limit})"
        )


def save_batch(batch: Any, workdir: Path, step: int) -> Path:
    """Writes this process's part of a batch, one array a field, as
    not_finite_step<N>_process<P>.npz; returns its path.
    """
    path = workdir / f"not_finite_step{step}_process{jax.process_index()}.npz"
    leaves = {where[-1].name: leaf for where, leaf in jax.tree_util.tree_leaves_with_path(batch)}
    arrays: dict[str, Any] = {
        name: np.concatenate([np.asarray(shard.data) for shard in leaf.addressable_shards])
        for name, leaf in leaves.items()
    }
    np.savez_compressed(path, **arrays)
    return path


@dataclasses.dataclass
class Best:
    """The best validation so far, by one metric; goes into every checkpoint, so that a continued
    run remembers.

    `value` is None before the first validation; `since_best` counts the validations since `step`.
    """

    metric: str
    value: float | None = None
    step: int = 0
    since_best: int = 0

    def add(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether this validation is the best. One that is not a number is not. Raises UserError
        when the metric is none of the validation's.
        """
        if not isinstance(metrics.get(self.metric), float):
            known = ", ".join(
                sorted(name for name, value in metrics.items() if isinstance(value, float))
            )
            raise UserError(
                f"config.train.best_metric={self.metric!r} cannot be used: a validation gives "
                f"{known}"
            )
        value, sign = metrics[self.metric], -1 if self.metric.startswith(_LOWER_IS_BETTER) else 1
        better = not math.isnan(value) and (self.value is None or sign * value > sign * self.value)
        self.value, self.step, self.since_best = (
            (value, step, 0) if better else (self.value, self.step, self.since_best + 1)
        )
        return better

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's metadata; `load_state` reads it."""
        return {
            "best_metric": self.metric,
            "best_value": self.value,
            "best_step": self.step if self.value is not None else None,
            "waited": self.since_best,
        }

    def load_state(self, progress: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint tells; with another metric than it was written with, anew."""
        if progress.get("best_metric") == self.metric and progress.get("best_value") is not None:
            self.value, self.step, self.since_best = (
                progress["best_value"],
                progress["best_step"],
                progress["waited"],
            )


PERCENTILES = (50, 90, 99)


class Meter:
    """Collects the steps since the last line of the log; seconds that belong to no step are left
    out with `pause`.
    """

    def __init__(self) -> None:
        self._pending: list[dict[str, Any]] = []  # scalars, on the device or the host
        self._step_seconds: list[float] = []
        self._start = self._step_start = time.monotonic()

    def add(self, metrics: dict[str, jax.Array], *, excluded: float = 0.0) -> None:
        """One more step has been started; of its time `excluded` seconds were a compilation."""
        now = time.monotonic()
        self._pending.append(metrics)
        self._step_seconds.append(max(now - self._step_start - excluded, 0.0))
        self._start += excluded
        self._step_start = now

    def state(self) -> list[dict[str, float]]:
        """The metrics of the steps since the last line, as JSON can hold them without loss."""
        return [
            {name: float(value) for name, value in metrics.items()}
            for metrics in jax.device_get(self._pending)
        ]

    def load_state(self, pending: Sequence[Mapping[str, float]]) -> None:
        """Takes up what `state` gave, in another process."""
        self._pending = [
            {name: np.float32(value) for name, value in metrics.items()} for metrics in pending
        ]

    def resume(self) -> None:
        """Forgets the time since the last step: it went into a validation or a checkpoint."""
        now = time.monotonic()
        self._start += now - self._step_start
        self._step_start = now

    def pop(self, *, batch_size: int, waited: float) -> tuple[dict[str, float], dict[str, float]]:
        """(means of the metrics, times) since the last line; `waited` are the seconds spent waiting
        for data.
        """
        means = mean_of(self._pending)
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        times = {
            "images_per_s": len(self._step_seconds) * batch_size / seconds,
            "data_wait": waited / seconds,
        }
        values = np.percentile(self._step_seconds, PERCENTILES)
        times |= {
            f"step_seconds_p{percentile}": float(value)
            for percentile, value in zip(PERCENTILES, values, strict=True)
        }
        self._pending, self._step_seconds = [], []
        self._start = self._step_start = now
        return means, times


def mean_of(pending: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every metric over the steps; of those that were skipped only their share,
    `nonfinite`.
    """
    fetched = jax.device_get(pending)
    sound = [metrics for metrics in fetched if not metrics["nonfinite"]]
    means = (
        {name: float(np.mean([metrics[name] for metrics in sound])) for name in sound[0]}
        if sound
        else {}
    )
    return means | {"nonfinite": float(np.mean([metrics["nonfinite"] for metrics in fetched]))}


def memory() -> dict[str, float]:
    """MiB: resident memory of this process where /proc tells, and the peak of its first device
    where it keeps count (not the CPU).
    """
    found: dict[str, float] = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        found["process_mib"] = (
            int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        )
    device: Mapping[str, Any] = jax.local_devices()[0].memory_stats() or {}
    return found | {
        f"device_{label}_mib": device[name] / 2**20
        for label, name in _DEVICE.items()
        if name in device
    }


_DEVICE = {"now": "bytes_in_use", "peak": "peak_bytes_in_use"}  # label -> name in jax's statistics


def parse_window(text: str | None) -> tuple[int, int] | None:
    """--profile=STEP:NUMBER as (first step, number of steps). Raises UserError."""
    if text is None:
        return None
    step, _, number = text.partition(":")
    if not (step.isdecimal() and number.isdecimal() and int(step) and int(number)):
        raise UserError(
            f"--profile={text} cannot be used: must be STEP:NUMBER, such as 20:5 for the steps 20 "
            "to 24"
        )
    return int(step), int(number)


class Profiler:
    """Records the steps of `window` (first step, number of steps; None = nothing) below
    `directory`; use as a context manager.
    """

    def __init__(
        self, window: tuple[int, int] | None, directory: Path, *, log: Callable[[str], None]
    ):
        self._first, self._last = (window[0], sum(window) - 1) if window else (0, 0)
        self._directory, self._log, self._recording = directory, log, False

    def before(self, step: int) -> None:
        """To be called before each step."""
        if step == self._first:
            jax.profiler.start_trace(self._directory)
            self._recording = True

    def after(self, step: int, state: Any) -> None:
        """To be called after each step; waits for `state` at the last one that is recorded."""
        if self._recording and step == self._last:
            jax.block_until_ready(state)
            self._stop()
            self._log(f"profile of steps {self._first} to {step}: {self._directory}")

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._recording = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._recording:
            self._stop()


StepFunction = Callable[
    [TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]
]  # (state, batch) -> (state, scalars by name)


class Preempted(Exception):
    """The run was asked to stop, and has saved."""


@dataclasses.dataclass
class Loop:
    """What a run has at hand between its steps.

    Attributes:
        validate: (step, state) -> (metrics, whether they are the best so far, which `best` then
            knows).
        max_programs: how many shapes of images there can be, each of which is compiled once.
    """

    config: TrainConfig
    optimizer: OptimizerConfig
    schedule: Schedule
    workdir: Path
    checkpoints: Checkpoints
    logbook: Logbook
    compilations: CompilationLog
    guard: NonFiniteGuard
    preemption: Preemption
    profiler: Profiler
    meter: Meter
    best: Best
    validate: Callable[[int, TrainState], tuple[dict[str, Any], bool]]
    max_programs: int

    def run(
        self, step_function: StepFunction, state: TrainState, batches: Prefetch
    ) -> dict[str, Any]:
        """Trains from `state` to the end of the schedule, one batch a step; returns the last
        validation's metrics.

        Raises:
            Preempted: the run was asked to stop, and has saved.
            UserError: too many steps in a row were not finite, or a checkpoint could not be
                written.
        """
        metrics: dict[str, Any] = {}
        self.meter.resume()
        for step, batch in enumerate(batches, int(state.step) + 1):
            state = self._run_step(step, batch, step_function, state)
            stopping, evaluating = self.preemption.reached(step), self.schedule.evaluates(step)
            saving = self.schedule.saves(step) or stopping
            if saving or self.schedule.logs(step):
                self.guard.look()
                self.checkpoints.check()
            if self.schedule.logs(step):
                self._write_line(step, waited=batches.take_wait())
            if evaluating and not stopping:
                with self.compilations.during(step, "validation"):
                    metrics, better = self.validate(step, state)
                ends = stopped_early(self.best, self.config, self.logbook)
                saving |= better or ends
                batches.take_wait()
            else:
                ends = False
            if saving:
                self._save(step, state, validation_owed=evaluating and stopping)
            if evaluating or saving:
                self.meter.resume()
            if stopping:
                self.checkpoints.wait()
                raise Preempted(
                    f"asked to stop: saved at step {step}; the same command continues from there"
                )
            if ends:
                break
        return metrics

    def _run_step(
        self, step: int, batch: Batch, step_function: StepFunction, state: TrainState
    ) -> TrainState:
        """One step; the device may still be at work on it when this returns."""
        bucket = "x".join(map(str, batch.images.shape))
        self.profiler.before(step)
        with self.compilations.during(step, bucket):
            state, terms = step_function(state, batch)
        seconds = self.compilations.pop_first_seconds(bucket)
        if seconds is not None:
            programs = f"program {self.compilations.num_reported} of at most {self.max_programs}"
            self.logbook.log(
                f"compiled for images {batch.images.shape} in {seconds:.1f} s ({programs})"
            )
            self.logbook.exclude_time(seconds)
        self.meter.add(terms, excluded=seconds or 0.0)
        self.guard.add(step, batch, terms)
        self.profiler.after(step, state)
        return state

    def _write_line(self, step: int, *, waited: float) -> None:
        """What was measured since the last line of the log."""
        means, times = self.meter.pop(batch_size=self.config.batch_size, waited=waited)
        rates = learning_rates(self.optimizer, self.schedule.total, step - 1)
        parts = {"train": means | rates, "time": times, "memory": memory()}
        self.logbook.write(
            step,
            {
                f"{part}/{name}": value
                for part, values in parts.items()
                for name, value in values.items()
            },
        )
        speed = f"{times['images_per_s']:.1f} images/s  data wait {times['data_wait']:.0%}"
        self.logbook.progress(step, f"loss {means.get('total', np.nan):.3f}  {speed}")

    def _save(self, step: int, state: TrainState, *, validation_owed: bool) -> None:
        """Starts writing a checkpoint. What a line or a validation that is still to come would hold
        is kept for the run that continues.
        """
        where = {
            "step": step,
            "epoch": step // self.schedule.epoch,
            "batch_in_epoch": step % self.schedule.epoch,
        }
        owed = {"pending": self.meter.state(), "validation_owed": validation_owed}
        self.checkpoints.save(state, progress=where | owed | self.best.state_dict())


def stopped_early(best: Best, config: TrainConfig, logbook: Logbook) -> bool:
    """Whether the validations no longer improve; says so."""
    over = 0 < config.early_stopping <= best.since_best
    if over:
        logbook.log(
            f"stopped early: {best.metric} has not improved in {best.since_best} validations "
            f"since step {best.step} "
            f"(config.train.early_stopping={config.early_stopping})"
        )
    return over


def log_config_changes(
    logbook: Logbook, changed: list[str], stored: Mapping[str, Any], steps_now: int
) -> None:
    """What is different from the start before: settings, and the length of an epoch as its
    checkpoint's metadata have it.
    """
    if changed:
        logbook.log(f"settings changed since the last start: config.{'; config.'.join(changed)}")
    steps_before = stored.get("steps_per_epoch", steps_now)
    if steps_before != steps_now:
        logbook.log(
            f"the training data or the batch size changed: {steps_before} -> {steps_now} steps an "
            "epoch"
        )
