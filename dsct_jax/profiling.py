"""A window of steps recorded with jax's profiler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsct_jax.errors import UserError


def parse_window(text: str | None) -> tuple[int, int] | None:
    """--profile=STEP:NUMBER as (first step, number of steps). Raises UserError."""
    if text is None:
        return None
    step, _, number = text.partition(":")
    if not (step.isdecimal() and number.isdecimal() and int(step) and int(number)):
        raise UserError(f"--profile={text} cannot be used: must be STEP:NUMBER, such as 20:5 for the steps 20 to 24")
    return int(step), int(number)


class Profiler:
    """Records the steps of `window` (first step, number of steps; None = nothing) below `directory`; use as a context manager."""

    def __init__(self, window: tuple[int, int] | None, directory: Path, *, tell: Callable[[str], None]):
        self._first, self._last = (window[0], sum(window) - 1) if window else (0, 0)
        self._directory, self._tell, self._recording = directory, tell, False

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
            self._tell(f"profile of steps {self._first} to {step}: {self._directory}")

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._recording = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._recording:
            self._stop()
