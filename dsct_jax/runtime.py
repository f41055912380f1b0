"""How the process of a command starts: what it says on the terminal, and programs compiled by
earlier runs. Never called by the library itself.
"""

import contextlib
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental import multihost_utils

from dsct_jax.errors import UserError


def _report_unraisable(unraisable: Any) -> None:
    """Python's own report, but for what tensorstore says of reads still under way when orbax gave
    up on a damaged checkpoint.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def start_process() -> None:
    """Call once, before anything is compiled.

    The terminal shows this project's own lines (stdout) and warnings of others (stderr). Compiled
    programs are kept in a directory of the user, $XDG_CACHE_HOME/dsct_jax or ~/.cache/dsct_jax,
    unless JAX_COMPILATION_CACHE_DIR says where, so that the second start of a run does not compile.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(
        logging.CRITICAL
    )  # orbax tells every leaf, and twice what it raises
    ours = logging.StreamHandler(sys.stdout)
    for room in ("dsct_jax", "pallas_kernels", "data"):
        logger = logging.getLogger(room)
        logger.addHandler(ours)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # Batches that workers had ready when a run was stopped: Python's tracker gives their memory
    # back, and need not tell.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    sys.unraisablehook = _report_unraisable
    sys.modules["__main__"].__dict__.pop(
        "__file__", None
    )  # or every data worker would run the command's file, and load all that it imports
    # One directory a machine: programs for a CPU use its instructions, and home directories are
    # shared.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    set_compilation_cache(caches / "dsct_jax" / (platform.node() or "local"))


class Preemption:
    """Whether the run was asked to stop (SIGTERM, as schedulers send before they take a machine
    away); use as a context manager.

    Several processes stop after the same step: jax hands the signal of any of them to all. Ctrl-C
        raises KeyboardInterrupt as always; where a
    callback of the garbage collector swallows that, `reached` raises it again.
    """

    def __init__(self) -> None:
        self._asked = self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def reached(self, step: int) -> bool:
        """True from the step on after which to save and leave; every process has to ask at every
        step.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        return (
            self._asked
            if jax.process_count() == 1
            else multihost_utils.reached_preemption_sync_point(step)
        )

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


AUTO = "auto"


def detect_launcher(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, as far as environment variables tell: all of
    them are set by the launcher, not by the user.

    Slurm's srun, Open MPI's mpirun, TPU pods (several workers or slices) and indexed jobs of
    Kubernetes; None for a process of its own.
    """

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 0

    if "SLURM_STEP_NODELIST" in environment and count("SLURM_NTASKS") > 1:
        return "Slurm"
    if count("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or count("MEGASCALE_NUM_SLICES") > 1:
        return "TPU pod"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def init_distributed(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Makes this process one of a run's several, if it is; on its own it does nothing.

    Args:
        coordinator: HOST:PORT that process 0 listens on, the same for all; AUTO: as jax finds out
            by itself; None: by itself where `detect_launcher` sees a launcher.
        num_processes: how many there are.
        process_id: which of them this is, from 0.

    Raises:
        UserError: flags that do not fit together, or processes that do not find each other.
    """
    if coordinator is None or coordinator == AUTO:
        if not num_processes is process_id is None:
            raise UserError(
                "--num_processes and --process_id need --coordinator=HOST:PORT, where process 0 "
                "listens"
            )
        launcher = detect_launcher(os.environ)
        if coordinator is None and launcher is None:
            return
        where, address = launcher or "this machine", None
    else:
        if num_processes is None or process_id is None:
            raise UserError(
                f"--coordinator={coordinator} needs --num_processes and --process_id as well"
            )
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id} cannot be used: must be 0 to {num_processes - 1} "
                f"(--num_processes={num_processes})"
            )
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal()):
            raise UserError(
                f"--coordinator={coordinator} cannot be used: must be HOST:PORT, such as "
                f"10.0.0.1:8476, or {AUTO}"
            )
        where = address = coordinator
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the processes of the run did not find each other ({where}): {reason}; see "
            "docs/training.md"
        ) from None


FILE = "compilations.jsonl"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def set_compilation_cache(directory: Path) -> None:
    """Compiled programs are kept in `directory`, unless JAX_COMPILATION_CACHE_DIR names a place;
    without either every start compiles.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):  # no such place to write
            directory.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(directory))


class CompilationLog:
    """Every program that jax compiles, or takes from its cache, while this is open; `path` gets a
    JSON line for each, None = nothing is written.

    Attributes:
        programs: (name of the program, bucket, seconds) of each.
    """

    def __init__(self, path: Path | None):
        self.programs: list[tuple[str, str, float]] = []
        self._bucket, self._step = "", 0
        self._first: dict[str, float] = {}  # bucket -> seconds of the first time
        self._told: set[str] = set()
        self._file = path.open("a") if path else None
        self._open = True
        monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **about: Any) -> None:
        if not self._open or event != _COMPILED:
            return
        name = str(about.get("fun_name", ""))
        self.programs.append((name, self._bucket, duration_secs))
        if self._file:
            entry = {
                "time": round(time.time(), 1),
                "step": self._step,
                "bucket": self._bucket,
                "program": name,
                "seconds": round(duration_secs, 3),
            }
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def during(self, step: int, bucket: str) -> Iterator[None]:
        """What is compiled inside belongs to this step and batch."""
        self._step, self._bucket = step, bucket
        start = time.monotonic()
        try:
            yield
        finally:
            self._bucket = ""
            self._first.setdefault(bucket, time.monotonic() - start)

    def pop_first_seconds(self, bucket: str) -> float | None:
        """Seconds of the first time in `during` for this bucket, most of them compilation, at the
        first call; None at every later one.
        """
        if bucket in self._told:
            return None
        self._told.add(bucket)
        return self._first[bucket]

    @property
    def num_reported(self) -> int:
        """How many buckets `pop_first_seconds` has told."""
        return len(self._told)

    def close(self) -> None:
        """Listens no longer: jax has no way to take a listener back."""
        self._open = False
        if self._file:
            self._file.close()
