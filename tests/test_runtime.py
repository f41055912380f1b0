"""What starts before a command: one place for compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
from dsct_jax.runtime import start_process
start_process()
import jax
jax.jit(lambda x: x + 1)(1.0)
"""


def test_everything_that_is_compiled_lands_in_the_users_cache(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {
        "XDG_CACHE_HOME": str(tmp_path / "user"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = [sys.executable, "-c", PROGRAM]
    subprocess.run(run, cwd=ROOT, env=environment, check=True)
    (machine,) = (tmp_path / "user" / "dsct_jax").iterdir()
    assert list(machine.iterdir())
    named = environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "named")}
    subprocess.run(
        run, cwd=ROOT, env=named | {"XDG_CACHE_HOME": str(tmp_path / "other")}, check=True
    )
    assert list((tmp_path / "named").iterdir()) and not (tmp_path / "other").exists()
