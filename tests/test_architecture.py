"""The arrows between the rooms, what the wheel holds, and that every dependency has its pinned
version.
"""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("dsct_jax", "pallas_kernels", "data", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = {
    path.name: dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", path.read_text(), re.MULTILINE))
    for path in sorted((ROOT / "constraints").glob("*.txt"))
}


def test_import_contract():
    """The contract of pyproject.toml, kept by import-linter."""
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "core", "misc"])
def test_no_module_without_a_subject(word):
    assert [
        path
        for folder in ROOMS
        for path in (ROOT / folder).rglob("*.py")
        if path.stem == word or word in path.parent.parts
    ] == []


def test_wheel_holds_only_the_library_and_the_kernels():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    included = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name for name in packages if any(fnmatch(name, pattern) for pattern in included)} == {
        "dsct_jax",
        "pallas_kernels",
    }
    assert {
        "data",
        "configs",
    } < packages  # with an __init__.py of their own, so that no installed package of that name wins


@pytest.mark.parametrize("file", PINNED)
def test_every_dependency_is_pinned(file):
    extras = PROJECT["project"]["optional-dependencies"]
    required = [
        *PROJECT["project"]["dependencies"],
        *(entry for extra in extras.values() for entry in extra),
    ]
    names = {
        re.match(r"[A-Za-z0-9_.-]+", entry)[0].lower().replace("_", "-").replace(".", "-")
        for entry in required
    }
    assert {"jax", "flax", "numpy", "pytest"} <= names
    assert names - PINNED[file].keys() == {"dsct-jax"}  # extras made of other extras


@pytest.mark.parametrize("file", PINNED)
def test_constraints_name_no_host(file):
    lines = (ROOT / "constraints" / file).read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[a-z0-9-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert not any("://" in line for line in lines)
