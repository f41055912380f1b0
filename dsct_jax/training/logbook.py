"""What a run writes down: config.json, env.json, metrics.jsonl, compilations.jsonl, TensorBoard
events, and its progress on the terminal.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from dsct_jax.cli import whole_file
from dsct_jax.config import differences
from dsct_jax.errors import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "pillow")
_COMPILED = "/jax/core/compile/backend_compile_duration"


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
    for name, content in (("config.json", config), ("env.json", environment)):
        with whole_file(workdir / name) as file:
            file.write(json.dumps(content, indent=1) + "\n")
    return changed


def _read_mapping(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _commit() -> str | None:
    """The commit of a checkout; None for an installed package, or without git."""
    if shutil.which("git") is None:
        return None
    command, folder = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    found = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return found.stdout.strip() or None


class Logbook(contextlib.ExitStack):
    """Records scalars by step; on resume, lines beyond the restored step are dropped, so the file
    equals that of an unbroken run.

    Of several processes only process 0 writes and prints. A context manager; leaving it closes all.
    """

    def __init__(
        self,
        workdir: Path,
        config: Mapping[str, Any],
        *,
        start_step: int,
        total_steps: int,
        validation_owed: bool = False,
    ):
        """`config` is that of the run: its train.wandb names a Weights & Biases project that gets
        the same numbers. `validation_owed`: that of `start_step` comes once more, and its line with
        it. Raises UserError when the package wandb is missing.
        """
        super().__init__()
        self.workdir, self._start, self._total = workdir, start_step, total_steps
        self._writers: list[Callable[[int, Mapping[str, float]], None]] = []
        self._bar: tqdm | None = None
        self._silent = jax.process_index() != 0
        if self._silent:
            return
        self._changed = write_settings(config, workdir)
        if config["train"]["wandb"]:
            run = _start_wandb(workdir, config)
            self._writers.append(lambda step, scalars: run.log(dict(scalars), step=step))
            self.callback(run.finish)
        _drop_lines(workdir / "metrics.jsonl", after=start_step, validation=validation_owed)
        self._file = self.enter_context((workdir / "metrics.jsonl").open("a", encoding="utf-8"))
        from tensorboardX import SummaryWriter  # of the `train` extra

        events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._events = self.enter_context(contextlib.closing(events))
        self._writers += [self._write_line, self._write_events]
        if sys.stderr.isatty():
            bar = tqdm(total=total_steps, initial=start_step, unit="step")
            self._bar = self.enter_context(contextlib.closing(bar))
        self._programs = self.enter_context(
            (workdir / "compilations.jsonl").open("a", encoding="utf-8")
        )
        self._compiling = start_step, ""
        jax.monitoring.register_event_duration_secs_listener(self._write_program)
        self.callback(jax.monitoring.unregister_event_duration_listener, self._write_program)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same values as TensorBoard events."""
        for writer in self._writers:
            writer(step, scalars)

    def _write_line(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def _write_events(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def log_changes(self, stored: Mapping[str, Any], *, steps_per_epoch: int) -> None:
        """What is different from the start before: settings, and the length of an epoch as its
        checkpoint's metadata (`stored`) have it.
        """
        if jax.process_count() > 1:
            self.log(f"process 0 of {jax.process_count()}, the only one that writes")
        if self._silent or self._start == 0:
            return
        if self._changed:
            fields = "; config.".join(self._changed)
            self.log(f"settings changed since the last start: config.{fields}")
        before = stored.get("steps_per_epoch", steps_per_epoch)
        if before != steps_per_epoch:
            what = f"{before} -> {steps_per_epoch} steps per epoch"
            self.log(f"the training data or the batch size changed: {what}")

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """A picture among the TensorBoard events, and as the newest of its name below `workdir`."""
        if self._silent:
            return
        self._events.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        image.save(self.workdir / f"{name.replace('/', '_')}.png")

    @contextlib.contextmanager
    def compiling(self, step: int, bucket: str) -> Iterator[None]:
        """What jax compiles inside is recorded with this step and bucket."""
        self._compiling = step, bucket
        try:
            yield
        finally:
            self._compiling = step, ""

    def _write_program(self, event: str, duration_secs: float, **about: Any) -> None:
        """A line of compilations.jsonl per program that jax compiles or takes from its cache."""
        if event != _COMPILED:
            return
        step, bucket = self._compiling
        entry = {
            "time": round(time.time(), 1),
            "step": step,
            "bucket": bucket,
            "program": str(about.get("fun_name", "")),
            "seconds": round(duration_secs, 3),
        }
        self._programs.write(json.dumps(entry) + "\n")
        self._programs.flush()

    def log(self, text: str) -> None:
        """One line for the user, above the progress bar where there is one."""
        if not self._silent:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def progress(self, step: int, text: str, remaining: float | None = None) -> None:
        """Where the run stands, `remaining` seconds from its end: a bar on a terminal, a plain line
        elsewhere.
        """
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
            return
        eta = "" if remaining is None else f"  ETA {_duration(remaining)}"
        self.log(f"step {step}/{self._total}  {text}{eta}")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _start_wandb(workdir: Path, config: Mapping[str, Any]) -> Any:
    project = config["train"]["wandb"]
    try:
        import wandb  # only where it is asked for: it is not among the dependencies
    except ImportError:
        raise UserError(
            f"config.train.wandb={project!r} needs the package wandb: pip install wandb, or leave "
            "the field empty"
        ) from None
    # One identity per work directory: a run that continues there continues its curves.
    identity = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    about = {"name": workdir.name, "id": identity, "dir": str(workdir), "resume": "allow"}
    return wandb.init(project=project, config=dict(config), **about)


def _drop_lines(path: Path, *, after: int, validation: bool) -> None:
    """Removes the lines of later steps, and (`validation`) that of the validation of `after`."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    with whole_file(path) as file:
        for line in lines:
            try:
                entry = json.loads(line)
                step = entry["step"]
            except (ValueError, KeyError, TypeError):  # cut by a kill
                continue
            again = validation and step == after and any(key.startswith("val/") for key in entry)
            if step <= after and not again:
                file.write(f"{line}\n")
