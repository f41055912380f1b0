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


def keep_programs_in(directory: Path) -> None:
    """Compiled programs are kept in `directory`, unless JAX_COMPILATION_CACHE_DIR names a place; without either every start compiles."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):  # no such place to write
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
            entry = {"time": round(time.time(), 1), "step": self._step, "bucket": self._bucket, "program": name, "seconds": round(duration_secs, 3)}
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

    def take_first(self, bucket: str) -> float | None:
        """Seconds of the first time in `during` for this bucket, most of them compilation, at the first call; None at every later one."""
        if bucket in self._told:
            return None
        self._told.add(bucket)
        return self._first[bucket]

    @property
    def num_taken(self) -> int:
        """How many buckets `take_first` has told."""
        return len(self._told)

    def close(self) -> None:
        """Listens no longer: jax has no way to take a listener back."""
        self._open = False
        if self._file:
            self._file.close()
