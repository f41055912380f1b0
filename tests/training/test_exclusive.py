"""One run, one directory (row 45 of the field test): of runs that start together one trains and the
others end with one line, and what a killed run leaves does not block the next.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsct_jax.errors import UserError
from dsct_jax.runtime import exclusive

ROOT = Path(__file__).parents[2]
OWNER = """
import sys, time
from pathlib import Path
from dsct_jax.cli import run_command
from dsct_jax.runtime import exclusive
def main():
    with exclusive(Path(sys.argv[1])):
        print("mine", flush=True)
        time.sleep(float(sys.argv[2]))
sys.exit(run_command(main))
"""
# 20 times six owners; forked, so that each does not import jax for seconds. Nothing of jax runs in
# the one that forks: it has one process and starts no threads.
STARTS = """
import os, sys, time
from pathlib import Path
import jax
jax.process_index, jax.process_count = (lambda: 0), (lambda: 1)
from dsct_jax.errors import UserError
from dsct_jax.runtime import exclusive
for repetition in range(20):
    workdir, start = Path(sys.argv[1], str(repetition), "run"), time.time() + 0.1
    for one in range(6):
        if os.fork() == 0:
            time.sleep(max(0, start + 0.001 * (one % 3) - time.time()))
            try:
                with exclusive(workdir):
                    os.write(1, b"+")
                    time.sleep(0.15)
            except UserError as error:
                os.write(1, b"-" if "another run uses it" in str(error) else b"?")
            except BaseException as error:
                os.write(1, repr(error).encode())
            os._exit(0)
    for _ in range(6):
        os.wait()
    os.write(1, b" ")
"""


def test_of_runs_that_start_together_one_is_alone(tmp_path):
    arguments = [sys.executable, "-c", STARTS, str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    starts = ["".join(sorted(signs)) for signs in done.stdout.split()]
    assert starts == ["+-----"] * 20, done.stdout + done.stderr
    assert list(tmp_path.rglob("run.lock")) == []


def test_a_killed_owner_is_told_and_its_lock_taken_over(tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = [sys.executable, "-c", OWNER, str(workdir), "60"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "mine\n"
        with (
            pytest.raises(UserError, match=rf"another run uses it \(process {owner.pid} on .*, st"),
            exclusive(workdir),
        ):
            pass
        owner.send_signal(signal.SIGKILL)
    with exclusive(workdir):
        assert f"left by process {owner.pid} on" in capsys.readouterr().out
        (workdir / "kept").touch()
    assert [path.name for path in workdir.iterdir()] == ["kept"]
    with exclusive(workdir):
        assert "left by" not in capsys.readouterr().out


def test_an_error_inside_releases(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_trainings_in_one_directory(tmp_path):
    """Whenever of twenty moments the second one starts, one of them ends with one line, the other
    trains on.
    """
    environment = os.environ | {"XLA_FLAGS": ""}  # one device, as the batch of debug.py needs
    for number in range(20):
        delay = 0.5 * number
        workdir = tmp_path / str(number) / "run"
        command = [sys.executable, "train.py", "--config=configs/debug.py", f"--workdir={workdir}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        first = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        time.sleep(delay)
        second = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        ends = [(*one.communicate(), one.returncode) for one in (first, second)]
        statuses = sorted(status for *_, status in ends)
        assert statuses == [0, 2], ends
        (refused,) = [error for _, error, status in ends if status == 2]
        assert "another run uses it (" in refused and refused.count("\n") == 1
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        assert sum('"train/total"' in line for line in lines) == 6
        assert not (workdir / "run.lock").exists()
