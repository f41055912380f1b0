"""What is measured of a run between two lines of its log: metrics, time and memory."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

PERCENTILES = (50, 90, 99)


class Meter:
    """The clock of a run, and the metrics of its steps since the last line of the log. Seconds that
    belong to no step, such as a compilation, a validation or a checkpoint, are excluded.

    `pending` are the metrics that `state` gave in the process before.
    """

    def __init__(
        self, batch_size: int, total_steps: int, pending: Iterable[Mapping[str, float]] = ()
    ):
        self._batch_size, self._total = batch_size, total_steps
        self._metrics: list[dict[str, Any]] = [
            {name: np.float32(value) for name, value in metrics.items()} for metrics in pending
        ]
        self._seconds: list[float] = []  # of each step
        self._last = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time of the first line

    def state(self) -> list[dict[str, float]]:
        """The metrics of the steps since the last line, as JSON can hold them without loss."""
        return [
            {name: float(value) for name, value in metrics.items()}
            for metrics in jax.device_get(self._metrics)
        ]

    def add(self, metrics: dict[str, jax.Array], *, excluded: float = 0.0) -> None:
        """One more step has been started; of its time `excluded` seconds were a compilation."""
        now = time.monotonic()
        self._metrics.append(metrics)
        self._seconds.append(max(now - self._last - excluded, 0.0))
        self._last = now
        if self._first is not None:
            self._first = self._first[0], self._first[1] + excluded

    def resume(self) -> None:
        """Excludes the time since the last step: it went into a validation or a checkpoint."""
        self._last = time.monotonic()

    def pop(self, *, waited: float) -> tuple[dict[str, float], dict[str, float]]:
        """(means of the metrics, times) since the last line; `waited` are the seconds spent waiting
        for data.
        """
        means, now = mean_of(self._metrics), time.monotonic()
        seconds = max(sum(self._seconds) + now - self._last, 1e-9)
        times = {
            "images_per_s": len(self._seconds) * self._batch_size / seconds,
            "data_wait": waited / seconds,
        }
        for percentile in PERCENTILES:
            times[f"step_seconds_p{percentile}"] = float(np.percentile(self._seconds, percentile))
        self._metrics, self._seconds, self._last = [], [], now
        return means, times

    def remaining(self, step: int) -> float | None:
        """Seconds to the end of the run, validations and checkpoints included; known from the
        second line on: the first steps compile and start workers.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
            return None
        first_step, first_time = self._first
        return (now - first_time) / (step - first_step) * (self._total - step)


def mean_of(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of every metric over the steps; of those that were skipped only their share,
    `nonfinite`.
    """
    fetched = jax.device_get(steps)
    sound = [metrics for metrics in fetched if not metrics["nonfinite"]]
    names = sound[0] if sound else ()
    means = {name: float(np.mean([metrics[name] for metrics in sound])) for name in names}
    return means | {"nonfinite": float(np.mean([metrics["nonfinite"] for metrics in fetched]))}


def memory() -> dict[str, float]:
    """MiB: resident memory of this process where there is a /proc, and the peak of its first device
    where it keeps count (not the CPU).
    """
    found, statm = {}, Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text(encoding="utf-8").split()[1])
        found["process_mib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    device: Mapping[str, Any] = jax.local_devices()[0].memory_stats() or {}
    for label, name in (("now", "bytes_in_use"), ("peak", "peak_bytes_in_use")):
        if name in device:
            found[f"device_{label}_mib"] = device[name] / 2**20
    return found
