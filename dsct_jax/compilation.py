"""Compiled programs of a run: where they are kept, and a line for each with the batch it was made for and the seconds it took."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

FILE = "compilations.jsonl"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def keep_programs_in(workdir: Path) -> None:
    """Compiled programs are kept in `workdir`/compiled, unless JAX_COMPILATION_CACHE_DIR names a place: a run that continues does not compile."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = workdir / "compiled"
        with contextlib.suppress(OSError):  # no such place to write: every start compiles
            directory.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(directory))


class CompilationLog:
    """Every program that jax compiles, or takes from its cache, while this is open; `path` gets a JSON line for each, None = nothing is written.

    Attributes:
        programs: (name of the program, bucket, seconds) of each.
    """

    def __init__(self, path: Path | None):
        self.programs: list[tuple[str, str, float]] = []
        self._bucket, self._step = "", 0
        self._file = path.open("a") if path else None
        self._open = True
        monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **about: Any) -> None:
        if not self._open or event != _COMPILED:
            return
        name = str(about.get("fun_name", ""))
        self.programs.append((name, self._bucket, duration_secs))
        if self._file:
            entry = {"time": round(time.time(), 1), "step": self._step, "bucket": self._bucket, "program": name, "seconds": round(duration_secs, 3)}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def during(self, step: int, bucket: str) -> Iterator[None]:
        """What is compiled inside belongs to this step and batch."""
        self._step, self._bucket = step, bucket
        try:
            yield
        finally:
            self._bucket = ""

    def close(self) -> None:
        """Listens no longer: jax has no way to take a listener back."""
        self._open = False
        if self._file:
            self._file.close()
