"""Kills at random moments, SIGTERM, and damaged files, each against a whole run: no saved step is lost, and the curve is that of an unbroken one."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsct_jax.checkpoint import load_weights

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1"}
STEP = re.compile(r"step (\d+)/")
# Lines, validations and checkpoints at different steps, so that a kill falls between any two of them.
SETTINGS = ["--config=configs/debug.py", "--config.train.log_every=5", "--config.train.eval_every=2.0", "--config.train.checkpoint_every=1.0"]


def start(workdir: Path, steps: int, *more: str, devices: int = 1) -> subprocess.Popen[str]:
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "train.py", *SETTINGS, f"--config.train.steps={steps}", f"--workdir={workdir}", *more]
    environment = ENVIRONMENT | {"XLA_FLAGS": flags}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == status, stdout + stderr
    return stdout


def read_to(process: subprocess.Popen[str], step: int) -> str:
    """What the run says until it has done this step, or to its end."""
    said = []
    for line in process.stdout:
        said.append(line)
        if (found := STEP.match(line)) and int(found[1]) >= step:
            break
    return "".join(said)


def lines_of(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))} for line in lines]


def saved_steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def same(workdir: Path, other: Path) -> None:
    """The same curve and the same weights, bit for bit."""
    assert lines_of(workdir) == lines_of(other)
    for ours, theirs in zip(load_weights(workdir)[0].values(), load_weights(other)[0].values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def killed_again_and_again(workdir: Path, *, kills: int, steps: int, seed: int) -> int:
    """Kills a run `kills` times, each time after a random step and a random part of a second, then lets it end; returns how many steps were saved."""
    draw = random.Random(seed)
    found = 0
    for _ in range(kills):
        before = saved_steps(workdir)
        process = start(workdir, steps)
        begun = max(before, default=0)
        said = read_to(process, begun + draw.randint(1, 3)) if draw.random() < 0.8 else ""  # or while it starts
        time.sleep(draw.random() * (0.05 if said else 6.0))  # a step takes some hundredths of a second
        process.kill()
        process.communicate()
        if (resumed := re.search(r"steps (\d+) to", said)) and before:
            assert int(resumed[1]) == before[-1], "a saved step was lost"
            found += 1
        assert max(saved_steps(workdir), default=0) >= begun
        if begun >= steps - 2:
            break
    newest = max(saved_steps(workdir), default=0)
    assert f"steps {newest} to {steps}" in finish(start(workdir, steps))
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    finish(start(workdir, 12))
    return workdir


def test_kills_at_random_moments(unbroken, tmp_path):
    killed_again_and_again(tmp_path / "run", kills=3, steps=12, seed=0)
    same(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    finish(start(tmp_path / "unbroken", 60))
    assert killed_again_and_again(tmp_path / "run", kills=20, steps=60, seed=1) > 5
    same(tmp_path / "run", tmp_path / "unbroken")


def test_sigterm_saves_and_leaves(unbroken, tmp_path):
    process = start(tmp_path / "run", 12)
    read_to(process, 2)
    process.send_signal(signal.SIGTERM)
    stdout = finish(process)
    (step,) = re.findall(r"^asked to stop: saved at step (\d+); the same command continues from there$", stdout, re.MULTILINE)
    assert saved_steps(tmp_path / "run")[-1] == int(step)
    assert f"steps {step} to 12" in finish(start(tmp_path / "run", 12))
    same(tmp_path / "run", unbroken)


def test_a_cut_checkpoint_costs_the_steps_since_the_one_before(unbroken, tmp_path):
    process = start(tmp_path / "run", 12)
    read_to(process, 6)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    *_, before, newest = saved_steps(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / str(newest) / "training").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    stdout = finish(start(tmp_path / "run", 12))
    told = [line for line in stdout.splitlines() if line.startswith(f"checkpoint {newest} is damaged (")]
    assert len(told) == 1 and told[0].endswith("the one before is taken")
    assert f"steps {before} to 12" in stdout
    same(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_a_kill_of_one_of_two_processes(tmp_path):
    def start_two(workdir: Path) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [start(workdir, 12, f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}") for i in range(2)]

    for process in (both := start_two(tmp_path / "unbroken")):
        finish(process)
    for victim in (1, 0):
        both = start_two(tmp_path / "run")
        read_to(both[0], max(saved_steps(tmp_path / "run"), default=0) + 3)
        before = saved_steps(tmp_path / "run")
        both[victim].kill()
        time.sleep(2)
        for process in both:  # as a launcher does when one of its processes is gone
            process.kill()
            process.communicate()
        assert saved_steps(tmp_path / "run")[-1:] >= before[-1:]
    for process in (both := start_two(tmp_path / "run")):
        finish(process)
    same(tmp_path / "run", tmp_path / "unbroken")
