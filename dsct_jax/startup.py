"""How the process of a command starts: what it says on the terminal, and programs compiled by earlier runs. Never called by the library itself."""

import logging
import os
import platform
import signal
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from dsct_jax.compilation import keep_programs_in


def _report_unraisable(unraisable: Any) -> None:
    """Python's own report, but for what tensorstore says of reads still under way when orbax gave up on a damaged checkpoint."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def start_process() -> None:
    """Call once, before anything is compiled.

    The terminal shows this project's own lines (stdout) and warnings of others (stderr). Compiled programs are kept in a directory of the user,
    $XDG_CACHE_HOME/dsct_jax or ~/.cache/dsct_jax, unless JAX_COMPILATION_CACHE_DIR says where, so that the second start of a run does not compile.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells every leaf, and twice what it raises
    ours = logging.StreamHandler(sys.stdout)
    for room in ("dsct_jax", "pallas_kernels", "data"):
        logger = logging.getLogger(room)
        logger.addHandler(ours)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # Batches that workers had ready when a run was stopped: Python's tracker gives their memory back, and need not tell.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    sys.unraisablehook = _report_unraisable
    sys.modules["__main__"].__dict__.pop("__file__", None)  # or every data worker would run the command's file, and load all that it imports
    # One directory a machine: programs for a CPU use its instructions, and home directories are shared.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    keep_programs_in(caches / "dsct_jax" / (platform.node() or "local"))


class Preemption:
    """Whether the run was asked to stop (SIGTERM, as schedulers send before they take a machine away); use as a context manager.

    Several processes stop after the same step: jax hands the signal of any of them to all. Ctrl-C raises KeyboardInterrupt as always; where a
    callback of the garbage collector swallows that, `reached` raises it again.
    """

    def __init__(self) -> None:
        self._asked = self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def reached(self, step: int) -> bool:
        """True from the step on after which to save and leave; every process has to ask at every step."""
        if self._interrupted:
            raise KeyboardInterrupt
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def __enter__(self) -> "Preemption":
        def stop(*_: Any) -> None:
            self._asked = True

        def interrupt(*_: Any) -> None:
            self._interrupted = True
            raise KeyboardInterrupt

        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
        if jax.process_count() == 1:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, stop)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
