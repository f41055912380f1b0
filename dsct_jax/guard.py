"""What may end a run before its schedule does: numbers that are not finite, validations that no longer improve."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsct_jax.errors import UserError

_LOWER_IS_BETTER = ("total", "loss", "error")  # beginnings of a metric's name


class NonFiniteGuard:
    """Counts the steps that were skipped because the loss or a gradient was not finite, and stops the run at more than `limit` of them in a row.

    A step is looked at when the next one is under way, so that the device never waits for the host.

    Args:
        limit: of the configuration, train.max_skipped.
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
        limit = f"config.train.max_skipped={self._limit}"
        if self._in_a_row > self._limit:
            path = save_batch(batch, self._workdir, step)
            raise UserError(
                f"step {step}: the loss or its gradient is not finite, {self._in_a_row} step(s) in a row ({limit}); lower "
                f"config.optimizer.learning_rate, then run again from the last checkpoint. The last batch is in {path}"
            )
        self._tell(f"step {step}: the loss or its gradient is not finite; skipped, {self._in_a_row} in a row ({limit})")


def save_batch(batch: Any, workdir: Path, step: int) -> Path:
    """Writes this process's part of a batch, one array a field, as not_finite_step<N>_process<P>.npz; returns its path."""
    path = workdir / f"not_finite_step{step}_process{jax.process_index()}.npz"
    leaves = {where[-1].name: leaf for where, leaf in jax.tree_util.tree_leaves_with_path(batch)}
    arrays: dict[str, Any] = {name: np.concatenate([np.asarray(shard.data) for shard in leaf.addressable_shards]) for name, leaf in leaves.items()}
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

    def as_progress(self) -> dict[str, Any]:
        """For a checkpoint's metadata; `take_up` reads it."""
        return {
            "best_metric": self.metric,
            "best_value": self.value,
            "best_step": self.step if self.value is not None else None,
            "waited": self.waited,
        }

    def take_up(self, progress: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint tells; with another metric than it was written with, anew."""
        if progress.get("best_metric") == self.metric and progress.get("best_value") is not None:
            self.value, self.step, self.waited = progress["best_value"], progress["best_step"], progress["waited"]
