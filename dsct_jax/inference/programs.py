"""Compiled programs of a model, kept beside jax's compilation cache: what was traced and compiled
once is read in every later process, which then needs neither flax nor the network's code.
"""

import hashlib
import json
import os
import pickle
import platform
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

from dsct_jax.cli import whole_file

# what reading a file that was cut, or is of another jaxlib, raises
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, pickle.UnpicklingError, RuntimeError)


class Programs:
    """The programs of one model: of one network with weights of the same names and shapes, as this
    version of the code compiles it for this machine and its first device. Nothing is kept where
    jax has no compilation cache (`jax_compilation_cache_dir`; the commands set it).
    """

    def __init__(self, model: Any):
        """`model`: all that a program depends on but its inputs, as JSON can hold it."""
        self._in_use: dict[str, Callable[..., Any]] = {}
        settings: Any = jax.config  # whose attributes no type checker knows
        cache = settings.jax_compilation_cache_dir
        self._folder: Path | None = None
        if cache:
            device, flags = jax.devices()[0], os.environ.get("XLA_FLAGS", "")
            machine = platform.node(), device.platform, device.device_kind, flags
            precision = settings.jax_enable_x64, settings.jax_default_matmul_precision
            versions = jax.__version__, jaxlib.__version__, _sources()
            text = json.dumps([model, machine, precision, versions], sort_keys=True)
            self._folder = Path(cache) / "programs" / hashlib.sha256(text.encode()).hexdigest()

    @property
    def known(self) -> bool:
        """Whether this model has been compiled here before."""
        return self._folder is not None and self._folder.is_dir()

    def get(self, name: str, function: Callable[..., Any], arguments: Any) -> Callable[..., Any]:
        """The program `name`: in use already, kept, or compiled of `function` and then kept."""
        if name not in self._in_use:
            path = None if self._folder is None else self._folder / name
            self._in_use[name] = _read(path) or _compile(function, arguments, path)
        return self._in_use[name]


def _sources() -> list[Any]:
    """Of this package's files: what changes when one of them does."""
    package = Path(__file__).parents[1]
    folders = package, package.with_name("pallas_kernels")
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _read(path: Path | None) -> Callable[..., Any] | None:
    if path is None or not path.is_file():
        return None
    try:
        return _load(path.read_bytes())
    except _UNREADABLE:
        return None  # it is made again


def _compile(function: Callable[..., Any], arguments: Any, path: Path | None) -> Callable[..., Any]:
    if path is None:
        return jax.jit(function).lower(*arguments).compile()
    # Around jax's own cache: XLA cannot store again what it has read (functions are missing then),
    # and nobody would read this there. A name of its own is never found, "inf" seconds never kept.
    function.__name__ = f"answer_{secrets.token_hex(8)}"
    seconds = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, seconds)
    jax.config.update(seconds, float("inf"))
    try:
        program = jax.jit(function).lower(*arguments).compile()
    finally:
        jax.config.update(seconds, before)
    try:
        parts = pickle.dumps(serialize_executable.serialize(program))
        jax.block_until_ready(_load(parts)(*arguments))  # what does not run is not kept
        with whole_file(path, "wb") as file:
            file.write(parts)
    except (OSError, ValueError, RuntimeError):
        pass  # a full disk, or a device whose programs cannot be kept
    return program


def _load(parts: bytes) -> Callable[..., Any]:
    program, inputs, outputs = pickle.loads(parts)
    devices = jax.devices()[:1]
    return serialize_executable.deserialize_and_load(
        program, inputs, outputs, execution_devices=devices
    )
