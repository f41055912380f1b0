"""What starts before a command: what it may import, and one place for compiled programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
from dsct_jax.cli import start_process
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


# `run` is to print which packages it has imported, beside Python's own.
IMPORTED = """
import json, sys
before = set(sys.modules)
{run}
packages = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(packages - sys.stdlib_module_names)))
"""
HELP = """
import contextlib, io, runpy
from data.__main__ import main as data
from data.tools.parsers import COMMANDS as of_data
from dsct_jax.__main__ import main as dsct
from dsct_jax.commands.parsers import COMMANDS as of_dsct

sys.argv = ["train.py", "--help"]
calls = [lambda: runpy.run_path("train.py", run_name="__main__")]
for main, names in ((dsct, of_dsct), (data, of_data)):
    calls += [lambda main=main, name=name: main([name, "--help"]) for name in names]
for call in calls:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        call()
    assert "usage:" in said.getvalue()
"""
HOST = {"PIL", "pillow_heif", "jaxtyping", "numpy", "scipy"}
DEVICE = HOST | {"etils", "flatbuffers", "jax", "jaxlib", "ml_dtypes", "opt_einsum", "safetensors"}
# of packages of ours, or that those above bring along
OTHERS = {
    *("cloudpickle", "charset_normalizer", "pygments", "threadpoolctl", "typing_extensions"),
    *("data", "dsct_jax", "pallas_kernels", "filelock"),  # jax's cache, where it is installed
}


@pytest.mark.parametrize(
    "run, allowed",
    [
        (HELP, set()),
        ("import data.tools.check", HOST),
        ("import data.tools.show", HOST),
        ("import dsct_jax.commands.evaluate", HOST),
        ("import dsct_jax.commands.predict", DEVICE),
    ],
    ids=["help", "check", "show", "evaluate", "predict"],
)
def test_a_command_imports_only_what_it_uses(run, allowed):
    command = [sys.executable, "-c", IMPORTED.format(run=run)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = {name for name in json.loads(found.stdout) if not name.startswith(("_", "cython"))}
    assert names - OTHERS <= allowed
