"""Kills at random moments, SIGTERM, and damaged files, each against a whole run: no saved step is
lost, and the curve is that of an unbroken one.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsct_jax.weights.run_directory import load_weights

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1"}
STEP = re.compile(r"step (\d+)/")
STARTED = re.compile(r"steps (\d+) to \d+$", re.MULTILINE)
STEP_OF_ANY_LINE = re.compile(r"^step \d+/", re.MULTILINE)
STEPS = 40  # of a whole run
TWO_STEPS = 100  # of two processes, which look for a signal once a second
START_SECONDS, SAVE_SECONDS = 8.0, 0.04  # about what a start takes, and the writing of a checkpoint
# Lines, validations and checkpoints at different steps, so that a kill falls between any two of
# them.
SETTINGS = [
    "--config=configs/debug.py",
    "--config.train.log_every=5",
    "--config.train.eval_every=2.0",
    "--config.train.checkpoint_every=1.0",
]


def start(workdir: Path, steps: int, *more: str, devices: int = 1) -> subprocess.Popen[str]:
    """The run as a process group of its own, as schedulers and terminals start it."""
    # of two flags, the last counts
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [
        sys.executable,
        "train.py",
        *SETTINGS,
        f"--config.train.steps={steps}",
        f"--workdir={workdir}",
        *more,
    ]
    environment, pipes = (
        ENVIRONMENT | {"XLA_FLAGS": flags},
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes
    )


def start_two(workdir: Path, steps: int) -> list[subprocess.Popen[str]]:
    """The same as two processes that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            workdir,
            steps,
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
        )
        for i in range(2)
    ]


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == status, stdout + stderr
    return stdout


def read_until(process: subprocess.Popen[str], done: Callable[[str], object]) -> str:
    """What the run says until such a line, or to its end."""
    said = []
    for line in process.stdout:
        said.append(line)
        if done(line):
            break
    return "".join(said)


def read_to(process: subprocess.Popen[str], step: int) -> str:
    """What the run says until it has done this step, or to its end."""
    return read_until(process, lambda line: (found := STEP.match(line)) and int(found[1]) >= step)


def lines_of(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))}
        for line in lines
    ]


def saved_steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        if folder.is_dir()
        else []
    )


def same(workdir: Path, other: Path) -> None:
    """The same curve and the same weights, bit for bit."""
    assert lines_of(workdir) == lines_of(other)
    for ours, theirs in zip(
        load_weights(workdir)[0].values(), load_weights(other)[0].values(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def unfinished(workdir: Path) -> list[str]:
    """Checkpoints that are being written, or were when the run was killed: their directories bear
    another name until they are whole.
    """
    folder = workdir / "checkpoints"
    return (
        [path.name for path in folder.iterdir() if not path.name.isdigit()]
        if folder.is_dir()
        else []
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Looks every millisecond, as long as the run goes on."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the run was over before its kill"
        time.sleep(0.001)


def stop_while_saving(workdir: Path, process: subprocess.Popen[str], draw: random.Random) -> None:
    """Returns with the run held still (SIGSTOP) and a half-written checkpoint on disk."""
    while True:
        wait_for(lambda: unfinished(workdir), process)
        time.sleep(draw.random() * SAVE_SECONDS)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)
        if unfinished(workdir):
            return
        process.send_signal(signal.SIGCONT)


def killed(workdir: Path, moment: str, draw: random.Random, *, steps: int) -> str:
    """Starts the run and kills it, "starting", "saving" or "between" two checkpoints; returns where
    the kill really fell.
    """
    before = saved_steps(workdir)
    newest = max(before, default=0)
    process = start(workdir, steps)
    said = ""
    if moment == "starting":
        time.sleep(draw.random() * START_SECONDS)
    else:
        said = read_until(process, STARTED.search)
        wait_for(
            lambda: not unfinished(workdir), process
        )  # what an earlier kill left half-written is removed in the background
        said += read_to(process, newest + 1)
        if moment == "saving":
            stop_while_saving(workdir, process, draw)
        else:
            wait_for(lambda: max(saved_steps(workdir), default=0) > newest, process)
            time.sleep(draw.random() * 4 * SAVE_SECONDS)
    assert process.poll() is None, "the run was over before its kill"
    process.kill()
    said += process.communicate()[0]
    if resumed := STARTED.search(said):
        assert int(resumed[1]) == newest, "a saved step was lost"
    after = saved_steps(workdir)
    assert max(after, default=0) >= newest
    if not STEP_OF_ANY_LINE.search(said):
        return "while starting again" if before else "before the first checkpoint"
    if unfinished(workdir):
        return "in mid-save"
    return "between two checkpoints" if after else "before the first checkpoint"


def killed_again_and_again(
    workdir: Path, moments: list[str], *, steps: int, seed: int
) -> Counter[str]:
    """Kills a run at these moments, then lets it end; returns how many kills fell where."""
    draw = random.Random(seed)
    fell = Counter(killed(workdir, moment, draw, steps=steps) for moment in moments)
    newest = max(saved_steps(workdir), default=0)
    assert newest < steps
    assert f"steps {newest} to {steps}" in finish(start(workdir, steps))
    return fell


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    finish(start(workdir, STEPS))
    return workdir


def test_kills_at_random_moments(unbroken, tmp_path):
    fell = killed_again_and_again(
        tmp_path / "run", ["starting", "saving", "between"], steps=STEPS, seed=0
    )
    assert fell["in mid-save"] == 1, fell
    same(tmp_path / "run", unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_kills_at_random_moments(tmp_path, seed):
    moments = ["starting"] * 4 + ["saving"] * 8 + ["between"] * 7
    random.Random(seed).shuffle(moments)
    moments = ["starting", *moments]  # nothing is saved yet
    finish(start(tmp_path / "unbroken", 200))
    fell = killed_again_and_again(tmp_path / "run", moments, steps=200, seed=seed)
    print(
        f"seed {seed}: {dict(fell)}, checkpoint after the last: "
        f"{max(saved_steps(tmp_path / 'run'))}"
    )
    assert fell.total() == 20
    assert fell["in mid-save"] >= 5 and fell["between two checkpoints"] >= 3, fell
    same(tmp_path / "run", tmp_path / "unbroken")


def test_sigterm_saves_and_leaves(unbroken, tmp_path):
    process = start(tmp_path / "run", STEPS)
    read_to(process, 2)
    process.send_signal(signal.SIGTERM)
    stdout = finish(process)
    (step,) = re.findall(
        r"^asked to stop: saved at step (\d+); the same command continues from there$",
        stdout,
        re.MULTILINE,
    )
    assert saved_steps(tmp_path / "run")[-1] == int(step)
    assert f"steps {step} to {STEPS}" in finish(start(tmp_path / "run", STEPS))
    same(tmp_path / "run", unbroken)


def test_a_cut_checkpoint_costs_the_steps_since_the_one_before(unbroken, tmp_path):
    process = start(tmp_path / "run", STEPS)
    read_to(process, 6)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    *_, before, newest = saved_steps(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / str(newest) / "training").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    stdout = finish(start(tmp_path / "run", STEPS))
    told = [
        line for line in stdout.splitlines() if line.startswith(f"checkpoint {newest} is damaged (")
    ]
    assert len(told) == 1 and told[0].endswith("the one before is taken")
    assert f"steps {before} to {STEPS}" in stdout
    same(tmp_path / "run", unbroken)


@pytest.fixture(scope="module")
def unbroken_two(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken_two") / "run"
    for process in start_two(workdir, TWO_STEPS):
        finish(process)
    return workdir


@pytest.mark.slow
def test_a_kill_of_one_of_two_processes(unbroken_two, tmp_path):
    for victim in (1, 0):
        both = start_two(tmp_path / "run", TWO_STEPS)
        read_to(both[0], max(saved_steps(tmp_path / "run"), default=0) + 3)
        before = saved_steps(tmp_path / "run")
        both[victim].kill()
        time.sleep(2)
        for process in both:  # as a launcher does when one of its processes is gone
            process.kill()
            process.communicate()
        assert saved_steps(tmp_path / "run")[-1:] >= before[-1:]
    for process in start_two(tmp_path / "run", TWO_STEPS):
        finish(process)
    same(tmp_path / "run", unbroken_two)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(unbroken_two, tmp_path):
    for told in (1, 0):
        newest = max(saved_steps(tmp_path / "run"), default=0)
        both = start_two(tmp_path / "run", TWO_STEPS)
        read_to(both[0], newest + 2)
        both[told].send_signal(signal.SIGTERM)
        steps = [
            re.search(r"^asked to stop: saved at step (\d+);", finish(process), re.MULTILINE)[1]
            for process in both
        ]
        assert (
            steps[0] == steps[1]
            and newest < int(steps[0]) == saved_steps(tmp_path / "run")[-1] < TWO_STEPS
        )
    spoken, _ = [finish(process) for process in start_two(tmp_path / "run", TWO_STEPS)]
    assert f"steps {steps[0]} to {TWO_STEPS}" in spoken
    same(tmp_path / "run", unbroken_two)


def group_of(pid: int) -> list[str]:
    """Commands of the processes that are left of a run's group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, after = path.read_text().rpartition(")")
            state, _, group = after.split()[:3]
            if int(group) == pid and state != "Z":
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def all_gone(pid: int) -> None:
    """Nothing is left of a run's group, some seconds later."""
    end = time.monotonic() + 10
    while (left := group_of(pid)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


WORKERS = "--config.data.num_workers=2"


@pytest.mark.slow
@pytest.mark.parametrize(
    "send", [os.killpg, os.kill]
)  # to the whole group, as schedulers do, or to the run alone
def test_sigterm_leaves_no_data_worker_behind(unbroken, tmp_path, send):
    process = start(tmp_path / "run", STEPS, WORKERS)
    read_to(process, 4)
    assert len([command for command in group_of(process.pid) if "spawn_main" in command]) == 2
    send(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, ""), stdout
    assert f"asked to stop: saved at step {saved_steps(tmp_path / 'run')[-1]};" in stdout
    all_gone(process.pid)
    finish(start(tmp_path / "run", STEPS, WORKERS))
    same(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_a_killed_run_leaves_no_data_worker_behind(unbroken, tmp_path):
    process = start(tmp_path / "run", STEPS, WORKERS)
    read_to(process, 4)
    process.kill()
    process.communicate(timeout=60)  # returns when nobody holds the run's output open any more
    all_gone(process.pid)
    finish(start(tmp_path / "run", STEPS, WORKERS))
    same(tmp_path / "run", unbroken)
