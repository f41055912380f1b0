"""Trains for a long time on simulated devices and watches the process: memory that grows, programs
compiled after the start, speed that falls.

    python -m benchmarks.soak --minutes=60 --workdir=runs/soak --output=benchmarks/soak \
        --config=configs/faces_multi.py --config.data.data_dir=DIR

train.py runs as a process of its own, with validation and checkpoints on; what begins with --config
is handed to it. Its resident memory and that of its data workers is read from /proc every few
seconds; what it compiles is counted from what jax tells (JAX_LOG_COMPILES). After the given time it
gets SIGTERM, upon which it has to save and leave. The warm-up ends with the second validation: by
then every program has run.

Exit status 1 when memory grew by more than --allowed-growth, a program was compiled after the
warm-up, or the run ended by itself.
"""

import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import make_parser, report, table

PAGE = os.sysconf("SC_PAGE_SIZE")
COMPILED = re.compile(r"Finished XLA compilation of (\S+) in ([\d.e+-]+) sec")
WARM_VALIDATIONS = 2
PATIENCE = 180  # seconds to save and leave after SIGTERM


class Watch:
    """Reads what the run says, line by line, and remembers when it compiled and validated;
    `process` has its stderr in its stdout.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path):
        self.start = time.monotonic()
        self.compiled: list[
            tuple[float, str, float]
        ] = []  # seconds since the start, program, seconds it took
        self.validations: list[float] = []
        self.last_lines: list[str] = []
        self._process, self._log = process, log
        self._thread = threading.Thread(target=self._read, name="soak log", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("w") as log:
            for line in self._process.stdout:
                now = time.monotonic() - self.start
                if found := COMPILED.search(line):
                    self.compiled.append((now, found[1], float(found[2])))
                if (
                    "Finished " in line
                    or "Compiling " in line
                    or "Persistent compilation cache" in line
                ):
                    continue
                if line.startswith("validation"):
                    self.validations.append(now)
                self.last_lines = [*self.last_lines[-4:], line.rstrip()]
                log.write(f"{now:9.1f}  {line}")
                log.flush()

    def warm_at(self) -> float | None:
        """Seconds since the start at which the warm-up ended."""
        return (
            self.validations[WARM_VALIDATIONS - 1]
            if len(self.validations) >= WARM_VALIDATIONS
            else None
        )

    def join(self) -> None:
        """Waits for the last line; not for ever, as data workers that outlive a killed run hold its
        output open.
        """
        self._thread.join(10)


def memory_of(pid: int) -> tuple[float, float]:
    """Resident MiB of a process, and of all below it; 0 where it is gone."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 2**20
        tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    return own, sum(sum(memory_of(child)) for child in children)


def soak(
    command: list[str], *, devices: int, minutes: float, every: float, log: Path
) -> tuple[Watch, list[tuple[float, float, float]], int]:
    """Runs the command for so long: what it said, (seconds, MiB of the process, MiB of those below
    it) over time, and how it ended.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_LOG_COMPILES": "1",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch, samples = Watch(process, log), []
    end = time.monotonic() + 60 * minutes
    try:
        while process.poll() is None and time.monotonic() < end:
            samples.append((time.monotonic() - watch.start, *memory_of(process.pid)))
            time.sleep(max(0.0, min(every, end - time.monotonic())))
        early = process.poll() is not None
        if not early:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        watch.join()
    return watch, samples, 1 if early else process.returncode


def summary(
    watch: Watch, samples: list[tuple[float, float, float]], metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """The numbers of a soak; memory is compared between the second and the last quarter of the time
    after the warm-up.
    """
    warm = watch.warm_at()
    found: dict[str, Any] = {
        "seconds": round(samples[-1][0], 1) if samples else 0.0,
        "warm_after_seconds": warm and round(warm, 1),
        "validations": len(watch.validations),
        "steps": metrics[-1]["step"] if metrics else 0,
        "compiled": len(watch.compiled),
        "compile_seconds": round(sum(seconds for *_, seconds in watch.compiled), 1),
        "compiled_after_warm_up": [
            name for at, name, _ in watch.compiled if warm is not None and at > warm
        ],
    }
    speeds = [line["time/images_per_s"] for line in metrics if "time/images_per_s" in line]
    if len(speeds) >= 4:
        quarter = len(speeds) // 4
        found["images_per_s"] = {
            "second_quarter": statistics.median(speeds[quarter : 2 * quarter]),
            "last_quarter": statistics.median(speeds[-quarter:]),
        }
    after = np.array([sample for sample in samples if warm is not None and sample[0] > warm])
    if len(after) >= 8:
        quarter = len(after) // 4
        for place, name in ((1, "process"), (2, "workers")):
            second, last = (
                float(np.median(part))
                for part in (after[quarter : 2 * quarter, place], after[-quarter:, place])
            )
            slope = float(np.polyfit(after[:, 0] / 3600, after[:, place], 1)[0])
            found[f"{name}_mib"] = {
                "second_quarter": round(second, 1),
                "last_quarter": round(last, 1),
                "peak": round(float(after[:, place].max()), 1),
                "slope_mib_per_hour": round(slope, 1),
            }
    return found


def verdict(found: dict[str, Any], status: int, *, allowed_growth: float) -> list[str]:
    """What is wrong, one line each; nothing = the soak is passed."""
    wrong = []
    if status not in (0, 128 + signal.SIGTERM):
        wrong.append(
            "the run ended by itself before its time"
            if status == 1
            else f"the run ended with status {status} after SIGTERM"
        )
    if "process_mib" not in found:
        wrong.append(
            "too short: there are not enough samples after the second validation; give more "
            "--minutes or validate more often"
        )
        return wrong
    memory = found["process_mib"]
    if memory["last_quarter"] > memory["second_quarter"] * (1 + allowed_growth):
        wrong.append(f"memory grew from {memory['second_quarter']} to {memory['last_quarter']} MiB")
    if found["compiled_after_warm_up"]:
        wrong.append(
            f"compiled after the warm-up: {', '.join(sorted(set(found['compiled_after_warm_up'])))}"
        )
    return wrong


def as_markdown(found: dict[str, Any]) -> str:
    """The summary as one table."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key.replace('_', ' ')} {x:.1f}" for key, x in value.items())
        return ("; ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)

    about = f"{found['devices']} simulated devices, {found['machine']}"
    hidden = ("samples", "command", "machine", "devices")
    rows = [(k.replace("_", " "), text(x)) for k, x in found.items() if k not in hidden]
    return f"Soak: {found['seconds'] / 60:.1f} minutes, {about}\n\n{table(('what', 'value'), rows)}"


def main(argv: list[str] | None = None) -> int:
    """The command; 0 = passed, 1 = not, 2 = a mistake on the command line."""
    parser = make_parser("benchmarks.soak", __doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--devices", type=int, default=8, help="simulated devices")
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between two readings of the memory"
    )
    parser.add_argument(
        "--allowed-growth",
        type=float,
        default=0.02,
        help="share by which memory may differ between two quarters of the run",
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/soak"), help="of the run; a fresh one"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="global, training and validation: a multiple of --devices",
    )
    parser.add_argument(
        "--eval-every",
        type=float,
        default=1.0,
        help="epochs from validation to validation, and from checkpoint to checkpoint",
    )
    arguments, passed_on = parser.parse_known_args(argv)
    if (arguments.workdir / "checkpoints").exists():
        parser.error(f"--workdir={arguments.workdir}: holds a run already; name a fresh directory")
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    if not any(argument.startswith("--config=") for argument in passed_on):
        passed_on = ["--config=configs/demo.py", *passed_on]
    every = [
        f"--config.train.{name}={arguments.eval_every}"
        for name in ("eval_every", "checkpoint_every")
    ]
    batch = [
        f"--config.train.{name}={arguments.batch_size}"
        for name in ("batch_size", "eval_batch_size")
    ]
    fixed = [f"--workdir={arguments.workdir}", "--config.train.steps=10000000", *every, *batch]
    command = [
        sys.executable,
        "train.py",
        *(argument for argument in passed_on if argument.startswith("--config=")),
        *fixed,
    ]
    command += [argument for argument in passed_on if not argument.startswith("--config=")]

    log = arguments.workdir / "soak.log"
    watch, samples, status = soak(
        command,
        devices=arguments.devices,
        minutes=arguments.minutes,
        every=arguments.every,
        log=log,
    )
    written = arguments.workdir / "metrics.jsonl"
    metrics = (
        [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
    )
    python = platform.python_version()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {python}",
        "devices": arguments.devices,
        "command": ["python", *command[1:]],
        "status": status,
        **summary(watch, samples, metrics),
    }
    wrong = verdict(found, status, allowed_growth=arguments.allowed_growth)
    found["verdict"] = wrong or ["passed: no growth of memory, nothing compiled after the warm-up"]
    if status not in (0, 128 + signal.SIGTERM):
        print("\n".join(["the last lines of the run:", *watch.last_lines]), file=sys.stderr)
    rounded = [[round(x, 1) for x in sample] for sample in samples]
    report(as_markdown(found), found | {"samples": rounded}, arguments.output, indent=None)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
