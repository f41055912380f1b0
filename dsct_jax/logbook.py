"""What a run writes down: metrics.jsonl, TensorBoard events, and its progress on the terminal."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Logbook:
    """Records scalars by step; on resume, lines beyond the restored step are dropped, so the file equals that of an unbroken run."""

    def __init__(self, workdir: Path, *, start_step: int, total_steps: int):
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= start_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, self._path)
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._total, self._start_step, self._start = total_steps, start_step, time.monotonic()
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step") if sys.stderr.isatty() else None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line and the same values as TensorBoard events."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def tell(self, text: str) -> None:
        """One line for the user, above the progress bar where there is one."""
        tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def progress(self, step: int, text: str) -> None:
        """Where the run stands: a bar on a terminal, a plain line elsewhere."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
            return
        done = step - self._start_step
        remaining = (time.monotonic() - self._start) / max(done, 1) * (self._total - step)
        print(f"step {step}/{self._total}  {text}  ETA {_duration(remaining)}", flush=True)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._bar is not None:
            self._bar.close()
        self._events.close()
        self._file.close()


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the line that was being written when the run was killed
        return sys.maxsize
