"""The process of a run: a full disk, signals, and how several processes find each other. Never
called by the library itself.
"""

import contextlib
import errno
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsct_jax.errors import UserError

AUTO = "auto"


@contextlib.contextmanager
def full_disk_reported(workdir: Path | None) -> Iterator[None]:
    """Around what writes below `workdir`: raises UserError where the disk is full or read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        reason = f"{error.filename or workdir}: {error.strerror}"
        raise UserError(f"{reason}; make room, then run the same command again") from error


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Around a run: `workdir` belongs to it until the end. Raises UserError, in every process of
    the run, where another has it.

    Process 0 holds an flock on workdir/run.lock, which the system releases when it dies; what is
    still written there then tells of a run that ended without cleaning up.
    """
    problem, release = "", contextlib.ExitStack()
    with release:
        if jax.process_index() == 0:
            try:
                release.enter_context(_locked(workdir))
            except UserError as error:
                problem = str(error)
        if jax.process_count() > 1:  # the others wait for the answer
            free = multihost_utils.broadcast_one_to_all(np.array(not problem))
            problem = problem or ("" if free else f"--workdir={workdir}: another run uses it")
        if problem:
            raise UserError(problem)
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path, me = workdir / "run.lock", f"process {os.getpid()} on {platform.node()}"
    while True:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # the owner has just removed it, and the folder that it made
            continue
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"--workdir={workdir}: cannot be used ({error.strerror})") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "it has just started"
                remedy = "wait for its end, stop it, or name another directory"
                reason = f"another run uses it ({owner}); {remedy}"
                raise UserError(f"--workdir={workdir}: {reason}") from None
            except OSError as error:  # a file system without locks
                why = f"cannot be locked ({error.strerror})"
                print(f"{workdir}: {why}; start no second run in it", flush=True)
            if not _lies_at(file, path):
                continue  # its owner has removed it meanwhile
            file.seek(0)
            if before := file.read().strip():
                print(f"{path}: left by {before}, which did not end well; taken over", flush=True)
            file.truncate(0)
            print(f"{me}, started {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file, flush=True)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # a run that left nothing leaves no folder
                    for folder in made:
                        folder.rmdir()
            return


def _lies_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class Preemption:
    """Whether the run was asked to stop (SIGTERM, as schedulers send); use as a context manager.

    Several processes stop after the same step: jax hands the signal of any of them to all. Ctrl-C
    raises KeyboardInterrupt, and where a garbage collector's callback swallows it, `reached` does.
    """

    def __init__(self) -> None:
        self._asked = self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def reached(self, step: int) -> bool:
        """True from the step on after which to save and leave; every process asks at every step."""
        if self._interrupted:
            raise KeyboardInterrupt
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)

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


def detect_launcher(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, by what only a launcher sets; None: nothing.
    Slurm's srun, Open MPI's mpirun, TPU pods (workers or slices), indexed jobs of Kubernetes.
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
    """Makes this process number `process_id` of the run's `num_processes`, if there are several.

    `coordinator`: HOST:PORT that process 0 listens on, the same for all; AUTO: found by jax; None:
    found by jax where `detect_launcher` sees a launcher. Raises UserError for flags that do not fit
    together, or processes that do not find each other.
    """
    if coordinator is None or coordinator == AUTO:
        if not num_processes is process_id is None:
            needed = "--coordinator=HOST:PORT, where process 0 listens"
            raise UserError(f"--num_processes and --process_id need {needed}")
        launcher = detect_launcher(os.environ)
        if coordinator is None and launcher is None:
            return
        where, address = launcher or "this machine", None
    else:
        flag = f"--coordinator={coordinator}"
        if num_processes is None or process_id is None:
            raise UserError(f"{flag} needs --num_processes and --process_id as well")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            wanted = f"0 to {num_processes - 1} (--num_processes={num_processes})"
            raise UserError(f"--process_id={process_id} cannot be used: must be {wanted}")
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal()):
            wanted = f"HOST:PORT, such as 10.0.0.1:8476, or {AUTO}"
            raise UserError(f"{flag} cannot be used: must be {wanted}")
        where = address = coordinator
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except (RuntimeError, ValueError, OSError) as error:
        reason = f"({where}): {' '.join(str(error).split())[:300]}; see docs/training.md"
        raise UserError(f"the processes of the run did not find each other {reason}") from None
