"""What may end a run before its schedule does: a signal, numbers that are not finite, a validation that no longer improves."""

import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsct_jax.errors import UserError

_LOWER_IS_BETTER = ("total", "loss", "error")  # beginnings of a metric's name


class Stopped(Exception):
    """The run was told to stop by SIGTERM, and has saved."""


class StopRequest:
    """SIGTERM, as schedulers send it before they take a machine away: noted, and acted upon after the step. Use as a context manager.

    Of several processes each may be told at another time; jax's coordination service lets all of them stop after the same step.
    """

    def __init__(self) -> None:
        self._noted = False
        self._previous: Any = None
        self._several = jax.process_count() > 1
        self._here = not self._several and threading.current_thread() is threading.main_thread()  # the service has a handler of its own

    def __enter__(self) -> "StopRequest":
        if self._here:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self._noted = True

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; the same answer on every process."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._noted

    def __exit__(self, *_: Any) -> None:
        if self._here:
            signal.signal(signal.SIGTERM, self._previous)


class NonFiniteGuard:
    """Counts the steps that were skipped because the loss or a gradient was not finite, and stops the run at `limit` of them in a row.

    A step is looked at when the next one is under way, so that the device never waits for the host.

    Args:
        limit: 0 = the first one stops the run, as 1.
        in_a_row: skipped steps right before the first one, as in the restored state.
        tell: says one line for each skipped step.
    """

    def __init__(self, workdir: Path, *, limit: int, in_a_row: int, tell: Callable[[str], None]):
        self._workdir, self._limit, self._in_a_row, self._tell = workdir, limit, in_a_row, tell
        self._last: tuple[int, Any, Any] | None = None

    def add(self, step: int, batch: Any, metrics: Mapping[str, jax.Array]) -> None:
        """Looks at the step before, and remembers this one."""
        self.look()
        self._last = (step, batch, metrics["nonfinite"]) if "nonfinite" in metrics else None

    def look(self) -> None:
        """Looks at the last step now. Raises UserError, with the batch written beside the run's files, when the limit is reached."""
        if self._last is None:
            return
        (step, batch, nonfinite), self._last = self._last, None
        if not float(nonfinite):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._tell(
            f"step {step}: the loss or a gradient is not finite; skipped, {self._in_a_row} in a row (config.train.nonfinite_limit={self._limit})"
        )
        if self._in_a_row >= max(self._limit, 1):
            path = save_batch(batch, self._workdir, step)
            raise UserError(
                f"step {step}: the loss or a gradient was not finite in {self._in_a_row} steps in a row; the batch of this step is in {path}; "
                "lower config.optimizer.learning_rate or look at these images, then run again from the last checkpoint"
            )


def save_batch(batch: Any, workdir: Path, step: int) -> Path:
    """Writes this process's part of a batch, one array a field, as nonfinite_step<N>.npz; returns its path."""
    several = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
    path = workdir / f"nonfinite_step{step}{several}.npz"
    leaves = {jax.tree_util.keystr(where, simple=True, separator="."): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(batch)}
    arrays = {name: np.concatenate([np.asarray(shard.data) for shard in leaf.addressable_shards]) for name, leaf in leaves.items()}
    workdir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


@dataclasses.dataclass
class Best:
    """The best validation so far, by one metric; goes into every checkpoint, so that a continued run remembers.

    `value` is None before the first validation; `waited` counts the validations since `step`.
    """

    metric: str
    value: float | None = None
    step: int = 0
    waited: int = 0

    def add(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether this validation is the best. One that is not a number is not. Raises UserError when the metric is none of the validation's."""
        if not isinstance(metrics.get(self.metric), float):
            known = ", ".join(sorted(name for name, value in metrics.items() if isinstance(value, float)))
            raise UserError(f"config.train.best_metric={self.metric!r} cannot be used: a validation gives {known}")
        value, sign = metrics[self.metric], -1 if self.metric.startswith(_LOWER_IS_BETTER) else 1
        better = not math.isnan(value) and (self.value is None or sign * value > sign * self.value)
        self.value, self.step, self.waited = (value, step, 0) if better else (self.value, self.step, self.waited + 1)
        return better
