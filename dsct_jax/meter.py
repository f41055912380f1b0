"""What is measured between two lines of the log: means of the step's metrics, how long steps took, and memory."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

PERCENTILES = (50, 90, 99)


class Meter:
    """Collects the steps since the last line of the log; seconds that belong to no step are left out with `pause`."""

    def __init__(self) -> None:
        self._pending: list[dict[str, Any]] = []  # scalars, on the device or the host
        self._step_seconds: list[float] = []
        self._start = self._step_start = time.monotonic()

    def add(self, metrics: dict[str, jax.Array], *, left_out: float = 0.0) -> None:
        """One more step has been started; of its time `left_out` seconds were a compilation."""
        now = time.monotonic()
        self._pending.append(metrics)
        self._step_seconds.append(max(now - self._step_start - left_out, 0.0))
        self._start += left_out
        self._step_start = now

    def pending(self) -> list[dict[str, float]]:
        """The metrics of the steps since the last line, as JSON can hold them without loss."""
        return [{name: float(value) for name, value in metrics.items()} for metrics in jax.device_get(self._pending)]

    def put_back(self, pending: Sequence[Mapping[str, float]]) -> None:
        """Takes up what `pending` gave, in another process."""
        self._pending = [{name: np.float32(value) for name, value in metrics.items()} for metrics in pending]

    def resume(self) -> None:
        """Forgets the time since the last step: it went into a validation or a checkpoint."""
        now = time.monotonic()
        self._start += now - self._step_start
        self._step_start = now

    def take(self, *, batch_size: int, waited: float) -> tuple[dict[str, float], dict[str, float]]:
        """(means of the metrics, times) since the last line; `waited` are the seconds spent waiting for data."""
        means = mean_of(self._pending)
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        times = {"images_per_s": len(self._step_seconds) * batch_size / seconds, "data_wait": waited / seconds}
        values = np.percentile(self._step_seconds, PERCENTILES)
        times |= {f"step_seconds_p{percentile}": float(value) for percentile, value in zip(PERCENTILES, values, strict=True)}
        self._pending, self._step_seconds = [], []
        self._start = self._step_start = now
        return means, times


def mean_of(pending: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every metric over the steps; of those that were skipped only their share, `nonfinite`."""
    fetched = jax.device_get(pending)
    sound = [metrics for metrics in fetched if not metrics["nonfinite"]]
    means = {name: float(np.mean([metrics[name] for metrics in sound])) for name in sound[0]} if sound else {}
    return means | {"nonfinite": float(np.mean([metrics["nonfinite"] for metrics in fetched]))}


def memory() -> dict[str, float]:
    """MiB: resident memory of this process where /proc tells, and the peak of its first device where it keeps count (not the CPU)."""
    found: dict[str, float] = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        found["process_mib"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    device: Mapping[str, Any] = jax.local_devices()[0].memory_stats() or {}
    return found | {f"device_{label}_mib": device[name] / 2**20 for label, name in _DEVICE.items() if name in device}


_DEVICE = {"now": "bytes_in_use", "peak": "peak_bytes_in_use"}  # label -> name in jax's statistics
