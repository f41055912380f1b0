"""The training loop: what is done after each step of a run, and what ends it."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsct_jax.batch import Batch
from dsct_jax.errors import UserError
from dsct_jax.parallel import Prefetch
from dsct_jax.runtime import Preemption
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.config import TrainConfig
from dsct_jax.training.logbook import Logbook
from dsct_jax.training.meter import Meter, memory
from dsct_jax.training.step import TrainState
from dsct_jax.weights.run_directory import DIRECTORY


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

        def steps(epochs: float) -> int:
            return max(1, round(epochs * epoch_steps))

        return cls(
            epoch=epoch_steps,
            total=config.steps or steps(config.epochs),
            log=config.log_every,
            evaluate=steps(config.eval_every),
            checkpoint=steps(config.checkpoint_every),
        )

    def position(self, step: int) -> dict[str, int]:
        """Where in the data a run stands after `step`."""
        return {"step": step, "epoch": step // self.epoch, "batch_in_epoch": step % self.epoch}

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


@dataclasses.dataclass
class Best:
    """The best validation so far, by one metric; goes into every checkpoint, so that a continued
    run remembers.

    `value` is None before the first validation; `since_best` counts the validations since `step`.
    """

    metric: str
    lower_is_better: bool = False
    value: float | None = None
    step: int = 0
    since_best: int = 0

    def add(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether this validation is the best. One that is not a number is not. Raises UserError
        when a validation does not measure the metric.
        """
        value = metrics.get(self.metric)
        if not isinstance(value, float):
            known = sorted(name for name, found in metrics.items() if isinstance(found, float))
            raise UserError(
                f"config.train.best_metric={self.metric!r} cannot be used: a validation gives "
                f"{', '.join(known)}"
            )
        sign = -1 if self.lower_is_better else 1
        better = not math.isnan(value) and (self.value is None or sign * value > sign * self.value)
        if better:
            self.value, self.step, self.since_best = value, step, 0
        else:
            self.since_best += 1
        return better

    def stops(self, config: TrainConfig, logbook: Logbook) -> bool:
        """Whether the validations no longer improve, so that the run ends early; says so."""
        over = 0 < config.early_stopping <= self.since_best
        if over:
            logbook.log(
                f"stopped early: {self.metric} has not improved in {self.since_best} validations "
                f"since step {self.step} (config.train.early_stopping={config.early_stopping})"
            )
        return over

    def report(self, logbook: Logbook) -> None:
        """Says which checkpoint is the best, where there was a validation."""
        if self.value is not None:
            logbook.log(
                f"best validation: {self.metric} {self.value:.3f} at step {self.step}, kept in "
                f"{logbook.workdir / DIRECTORY / str(self.step)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's metadata; `load_state` reads it."""
        return {
            "best_metric": self.metric,
            "best_value": self.value,
            "best_step": self.step if self.value is not None else None,
            "waited": self.since_best,
        }

    def load_state(self, progress: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint has; from the start where that is of another metric."""
        if progress.get("best_metric") == self.metric and progress.get("best_value") is not None:
            self.value, self.step = progress["best_value"], progress["best_step"]
            self.since_best = progress["waited"]


class NonFiniteGuard:
    """Counts the steps that were skipped because the loss or a gradient was not finite, and stops
    the run at more than `limit` (config.train.max_skipped) of them in a row.

    A step is looked at when the next one is under way, so that the device never waits for the host.

    Args:
        in_a_row: skipped steps right before the first one, as in the restored state.
    """

    def __init__(self, logbook: Logbook, *, limit: int, in_a_row: int):
        self._logbook, self._limit, self._in_a_row = logbook, limit, in_a_row
        self._last: tuple[int, Batch, Any] | None = None

    def add(self, step: int, batch: Batch, nonfinite: jax.Array) -> None:
        """Looks at the step before, and remembers this one."""
        self.look()
        self._last = step, batch, nonfinite

    def look(self) -> None:
        """Looks at the last step now. Raises UserError, with the batch written beside the run's
        files, when the limit is exceeded.
        """
        if self._last is None:
            return
        (step, batch, nonfinite), self._last = self._last, None
        self._in_a_row = self._in_a_row + 1 if float(nonfinite) else 0
        what = f"step {step}: the loss or its gradient is not finite"
        limit = f"config.train.max_skipped={self._limit}"
        if self._in_a_row > self._limit:
            raise UserError(
                f"{what}, {self._in_a_row} step(s) in a row ({limit}); lower "
                "config.optimizer.learning_rate, then run again from the last checkpoint. The "
                f"last batch is in {save_batch(batch, self._logbook.workdir, step)}"
            )
        if self._in_a_row:
            self._logbook.log(f"{what}; skipped, {self._in_a_row} in a row ({limit})")


def save_batch(batch: Batch, workdir: Path, step: int) -> Path:
    """Writes this process's part of a batch, one array per field, as
    not_finite_step<N>_process<P>.npz; returns its path.
    """
    path = workdir / f"not_finite_step{step}_process{jax.process_index()}.npz"
    arrays: dict[str, Any] = {
        where[-1].name: np.concatenate(
            [np.asarray(shard.data) for shard in leaf.addressable_shards]
        )
        for where, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    np.savez_compressed(path, **arrays)
    return path


def parse_window(text: str | None) -> tuple[int, int] | None:
    """--profile=STEP:NUMBER as (first step, last step). Raises UserError."""
    if text is None:
        return None
    step, _, number = text.partition(":")
    if not (step.isdecimal() and number.isdecimal() and int(step) and int(number)):
        raise UserError(
            f"--profile={text} cannot be used: must be STEP:NUMBER, such as 20:5 for the steps 20 "
            "to 24"
        )
    return int(step), int(step) + int(number) - 1


class Profiler(contextlib.ExitStack):
    """Records the steps of a window (first, last; None = nothing) with jax's profiler."""

    def __init__(self, window: tuple[int, int] | None, logbook: Logbook):
        super().__init__()
        self._first, self._last = window or (0, 0)
        self._logbook, self._directory = logbook, logbook.workdir / "profile"
        self._recording = False

    def before(self, step: int) -> None:
        """To be called before each step."""
        if step == self._first:
            self.enter_context(jax.profiler.trace(self._directory))
            self._recording = True

    def after(self, step: int, state: TrainState) -> None:
        """To be called after each step; waits for `state` at the last one that is recorded."""
        if self._recording and step == self._last:
            jax.block_until_ready(state)
            self.close()
            self._logbook.log(f"profile of steps {self._first} to {step}: {self._directory}")


# (state, batch) -> (state, scalars by name)
StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
CONTINUES = "the same command continues"


class Preempted(Exception):
    """The run was asked to stop, and has saved."""


def train_loop(
    step_function: StepFunction,
    state: TrainState,
    batches: Prefetch,
    *,
    config: TrainConfig,
    schedule: Schedule,
    checkpoints: Checkpoints,
    logbook: Logbook,
    progress: Mapping[str, Any],
    best: Best,
    validate: Callable[[int, TrainState], tuple[dict[str, Any], dict[str, Any]]],
    learning_rates: Callable[[int], dict[str, float]],
    max_programs: int,
    profile: tuple[int, int] | None = None,
) -> bool:
    """Trains from `state` to the end of the schedule, one batch per step; returns whether anything
    was left to train. Raises Preempted, after saving, and UserError: too many steps in a row were
    not finite, or a checkpoint could not be written.

    Args:
        progress: of the checkpoint that the run continues from; {} for a new run.
        validate: (step, state) -> (metrics, what it fitted for prediction, as JSON can hold it).
        max_programs: how many shapes of images there can be, each of which is compiled once.
    """
    if _is_over(state, progress, config, schedule, logbook, best, validate):
        return False
    meter = Meter(config.batch_size, schedule.total, progress.get("pending", ()))
    guard = NonFiniteGuard(logbook, limit=config.max_skipped, in_a_row=int(state.skipped))
    with Preemption() as preemption, Profiler(profile, logbook) as profiler:
        run_step = _measured(step_function, logbook, meter, guard, profiler, max_programs)
        for step, batch in enumerate(batches, int(state.step) + 1):
            state = run_step(step, state, batch)
            stopping, evaluating = preemption.reached(step), schedule.evaluates(step)
            saving, ends, decoder = schedule.saves(step) or stopping, False, None
            if saving or schedule.logs(step):
                guard.look()
                checkpoints.check()
            if schedule.logs(step):
                means, times = meter.pop(waited=batches.pop_wait())
                rates = learning_rates(step - 1)
                _write_line(logbook, step, means | rates, times, meter.remaining(step))
            if evaluating and not stopping:
                with logbook.compiling(step, "validation"):
                    metrics, decoder = validate(step, state)
                saving |= best.add(step, metrics)
                ends = best.stops(config, logbook)
                batches.pop_wait()
            if saving or ends:
                owed = {"pending": meter.state(), "validation_owed": evaluating and stopping}
                where = schedule.position(step) | owed | best.state_dict()
                checkpoints.save(state, progress=where, decoder=decoder)
            if evaluating or saving:
                meter.resume()
            if stopping:
                checkpoints.wait()
                raise Preempted(f"asked to stop: saved at step {step}; {CONTINUES} from there")
            if ends:
                break
    return True


def _is_over(
    state: TrainState,
    progress: Mapping[str, Any],
    config: TrainConfig,
    schedule: Schedule,
    logbook: Logbook,
    best: Best,
    validate: Callable[[int, TrainState], tuple[dict[str, Any], dict[str, Any]]],
) -> bool:
    """Whether nothing is left to train; says so. A validation that was due when the run was stopped
    is made up for.
    """
    step = int(state.step)
    best.load_state(progress)
    if progress.get("validation_owed"):
        best.add(step, validate(step, state)[0])
    if step >= schedule.total:
        logbook.log(
            f"nothing left to train: {logbook.workdir} is already at step {step}; raise "
            "config.train.epochs to go on, or use --mode=eval"
        )
    return step >= schedule.total or best.stops(config, logbook)


def _measured(
    step_function: StepFunction,
    logbook: Logbook,
    meter: Meter,
    guard: NonFiniteGuard,
    profiler: Profiler,
    max_programs: int,
) -> Callable[[int, TrainState, Batch], TrainState]:
    """The step with everything that watches it; the first of each size of images says how long it
    took, mostly to compile. The device may still be at work when it returns.
    """
    seen: set[tuple[int, ...]] = set()

    def run_step(step: int, state: TrainState, batch: Batch) -> TrainState:
        shape, start, seconds = batch.images.shape, time.monotonic(), 0.0
        profiler.before(step)
        with logbook.compiling(step, "x".join(map(str, shape))):
            state, terms = step_function(state, batch)
        if shape not in seen:
            seen.add(shape)
            seconds = time.monotonic() - start
            programs = f"program {len(seen)} of at most {max_programs}"
            logbook.log(f"compiled for images {shape} in {seconds:.1f} s ({programs})")
        meter.add(terms, excluded=seconds)
        guard.add(step, batch, terms["nonfinite"])
        profiler.after(step, state)
        return state

    return run_step


def _write_line(
    logbook: Logbook,
    step: int,
    train: Mapping[str, float],
    times: Mapping[str, float],
    remaining: float | None,
) -> None:
    """What was measured since the last line of the log."""
    parts = {"train": train, "time": times, "memory": memory()}
    logbook.write(
        step, {f"{part}/{name}": value for part in parts for name, value in parts[part].items()}
    )
    speed = f"{times['images_per_s']:.1f} images/s  data wait {times['data_wait']:.0%}"
    logbook.progress(step, f"loss {train.get('total', math.nan):.3f}  {speed}", remaining)
