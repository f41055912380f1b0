"""The training loop: what is done after each step of a run, and what ends it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsct_jax.batch import Batch
from dsct_jax.checkpoint import Checkpoints
from dsct_jax.compilation import CompilationLog
from dsct_jax.errors import UserError
from dsct_jax.guard import Best, NonFiniteGuard
from dsct_jax.logbook import Logbook
from dsct_jax.meter import Meter, memory
from dsct_jax.optimizer import OptimizerConfig, learning_rates
from dsct_jax.prefetch import Prefetch
from dsct_jax.profiling import Profiler
from dsct_jax.sharding import FSDP
from dsct_jax.startup import Preemption
from dsct_jax.step import StepConfig, TrainState


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

    def require_divisible(self, devices: int) -> None:
        """Raises UserError unless the global batch sizes divide by the number of devices."""
        if self.batch_size % (devices * self.accumulate) and self.accumulate > 1:
            parts = f"{devices} devices x config.train.accumulate={self.accumulate}"
            raise UserError(f"config.train.batch_size={self.batch_size} cannot be shared by {parts}: set it to a multiple of their product")
        for field in ("batch_size", "eval_batch_size"):
            if getattr(self, field) % devices:
                raise UserError(
                    f"config.train.{field}={getattr(self, field)} cannot be shared by {devices} devices: set it to a multiple of {devices}"
                )


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
        evaluate, checkpoint = (max(1, round(every * epoch_steps)) for every in (config.eval_every, config.checkpoint_every))
        return cls(epoch=epoch_steps, total=total, log=config.log_every, evaluate=evaluate, checkpoint=checkpoint)

    def evaluates(self, step: int) -> bool:
        """Whether a validation follows."""
        return step % self.evaluate == 0 or step == self.total

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows, whatever the validation says."""
        return step % self.checkpoint == 0 or step == self.total

    def logs(self, step: int) -> bool:
        """Whether a line of the log follows: at every checkpoint too, so that a run that continues there writes the lines of an unbroken one."""
        return step % self.log == 0 or step % self.checkpoint == 0 or self.evaluates(step)


StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]  # (state, batch) -> (state, scalars by name)


class Preempted(Exception):
    """The run was asked to stop, and has saved."""


@dataclasses.dataclass
class Loop:
    """What a run has at hand between its steps.

    Attributes:
        validate: (step, state) -> (metrics, whether they are the best so far, which `best` then knows).
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

    def run(self, step_function: StepFunction, state: TrainState, batches: Prefetch) -> dict[str, Any]:
        """Trains from `state` to the end of the schedule, one batch a step; returns the last validation's metrics.

        Raises:
            Preempted: the run was asked to stop, and has saved.
            UserError: too many steps in a row were not finite, or a checkpoint could not be written.
        """
        metrics: dict[str, Any] = {}
        self.meter.resume()
        for step, batch in enumerate(batches, int(state.step) + 1):
            state = self._train_on(step, batch, step_function, state)
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
                raise Preempted(f"asked to stop: saved at step {step}; the same command continues from there")
            if ends:
                break
        return metrics

    def _train_on(self, step: int, batch: Batch, step_function: StepFunction, state: TrainState) -> TrainState:
        """One step; the device may still be at work on it when this returns."""
        bucket = "x".join(map(str, batch.images.shape))
        self.profiler.before(step)
        with self.compilations.during(step, bucket):
            state, terms = step_function(state, batch)
        seconds = self.compilations.take_first(bucket)
        if seconds is not None:
            programs = f"program {self.compilations.num_taken} of at most {self.max_programs}"
            self.logbook.tell(f"compiled for images {batch.images.shape} in {seconds:.1f} s ({programs})")
            self.logbook.leave_out(seconds)
        self.meter.add(terms, left_out=seconds or 0.0)
        self.guard.add(step, batch, terms)
        self.profiler.after(step, state)
        return state

    def _write_line(self, step: int, *, waited: float) -> None:
        """What was measured since the last line of the log."""
        means, times = self.meter.take(batch_size=self.config.batch_size, waited=waited)
        rates = learning_rates(self.optimizer, self.schedule.total, step - 1)
        parts = {"train": means | rates, "time": times, "memory": memory()}
        self.logbook.write(step, {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()})
        speed = f"{times['images_per_s']:.1f} images/s  data wait {times['data_wait']:.0%}"
        self.logbook.progress(step, f"loss {means.get('total', np.nan):.3f}  {speed}")

    def _save(self, step: int, state: TrainState, *, validation_owed: bool) -> None:
        """Starts writing a checkpoint. What a line or a validation that is still to come would hold is kept for the run that continues."""
        where = {"step": step, "epoch": step // self.schedule.epoch, "batch_in_epoch": step % self.schedule.epoch}
        owed = {"pending": self.meter.pending(), "validation_owed": validation_owed}
        self.checkpoints.save(state, progress=where | owed | self.best.as_progress())


def stopped_early(best: Best, config: TrainConfig, logbook: Logbook) -> bool:
    """Whether the validations no longer improve; says so."""
    over = 0 < config.early_stopping <= best.waited
    if over:
        logbook.tell(
            f"stopped early: {best.metric} has not improved in {best.waited} validations since step {best.step} "
            f"(config.train.early_stopping={config.early_stopping})"
        )
    return over


def tell_changes(logbook: Logbook, changed: list[str], stored: Mapping[str, Any], steps_now: int) -> None:
    """What is different from the start before: settings, and the length of an epoch as its checkpoint's metadata have it."""
    if changed:
        logbook.tell(f"settings changed since the last start: config.{'; config.'.join(changed)}")
    steps_before = stored.get("steps_per_epoch", steps_now)
    if steps_before != steps_now:
        logbook.tell(f"the training data or the batch size changed: {steps_before} -> {steps_now} steps an epoch")
