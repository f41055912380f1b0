"""What a run writes down: config.json, env.json, metrics.jsonl, TensorBoard events, and its
progress on the terminal.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dsct_jax.config import differences
from dsct_jax.errors import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "pillow")


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides the code."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }


def write_settings(config: Mapping[str, Any], workdir: Path) -> list[str]:
    """Writes config.json and env.json: what ran, and where. Returns the fields that differ from
    those of an earlier config.json.
    """
    changed = differences(_read_mapping(workdir / "config.json"), config)
    _replace(workdir / "config.json", json.dumps(config, indent=1) + "\n")
    devices = {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
    }
    environment = {
        "versions": versions(),
        "devices": devices,
        "host": platform.platform(),
        "commit": _commit(),
        "command": sys.argv,
    }
    _replace(workdir / "env.json", json.dumps(environment, indent=1) + "\n")
    return changed


def _read_mapping(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _commit() -> str | None:
    """The commit of a checkout; None for an installed package, or without git."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return found.stdout.strip() or None


def _replace(path: Path, text: str) -> None:
    """Writes a file whole: a kill leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Logbook:
    """Records scalars by step; on resume, lines beyond the restored step are dropped, so the file
    equals that of an unbroken run.

    Of several processes only process 0 writes and speaks.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        total_steps: int,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """`wandb` names a Weights & Biases project that gets the same numbers; "" = none. Raises
        UserError when its package is missing.
        """
        self._silent = jax.process_index() != 0
        self._wandb: Any = None
        if self._silent:
            return
        if wandb:
            self._wandb = _start_wandb(wandb, workdir, config or {})
        self._workdir = workdir
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            kept = [
                line for line in self._path.read_text().splitlines() if _step_of(line) <= start_step
            ]
            _replace(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._total = total_steps
        self._first: tuple[int, float] | None = None  # step and time of the first line of progress
        self._bar = (
            tqdm(total=total_steps, initial=start_step, unit="step")
            if sys.stderr.isatty()
            else None
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line and the same values as TensorBoard events."""
        if self._silent:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """A picture among the TensorBoard events, and as the newest of its name below `workdir`."""
        if self._silent:
            return
        self._events.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        image.save(self._workdir / f"{name.replace('/', '_')}.png")

    def log(self, text: str) -> None:
        """One line for the user, above the progress bar where there is one."""
        if self._silent:
            return
        tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def exclude_time(self, seconds: float) -> None:
        """Time that will not come again, such as a compilation, is not counted when the remaining
        time is estimated.
        """
        if not self._silent and self._first is not None:
            self._first = self._first[0], self._first[1] + seconds

    def progress(self, step: int, text: str) -> None:
        """Where the run stands: a bar on a terminal, a plain line elsewhere."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
            return
        now = time.monotonic()
        if (
            self._first is None
            # how long the rest takes is known from the second line on: the first steps compile and
            # start workers
        ):
            self._first, eta = (step, now), ""
        else:
            first_step, first_time = self._first
            eta = f"  ETA {_duration((now - first_time) / (step - first_step) * (self._total - step))}"
        print(f"step {step}/{self._total}  {text}{eta}", flush=True)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.close()
        self._events.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # only where it is asked for: it is not among the dependencies
    except ImportError:
        raise UserError(
            f"config.train.wandb={project!r} needs the package wandb: pip install wandb, or leave "
            "the field empty"
        ) from None
    # One identity a work directory, so that a run that continues there continues its curves.
    identity = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=project,
        name=workdir.name,
        id=identity,
        dir=str(workdir),
        config=dict(config),
        resume="allow",
    )


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (
        ValueError,
        KeyError,
        TypeError,
    ):  # the line that was being written when the run was killed
        return sys.maxsize
