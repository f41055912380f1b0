"""The arrows between the rooms, their size, what the wheel holds and needs, and that every
dependency has its pinned version.
"""

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dsct_jax.errors import EXTRAS

ROOT = Path(__file__).parent.parent
ROOMS = ("dsct_jax", "pallas_kernels", "data", "configs")
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_MODULES = 400, 60, 14
PRODUCT = [
    ROOT / "train.py",
    *(path for room in (*ROOMS, "examples") for path in sorted((ROOT / room).rglob("*.py"))),
]
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


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PRODUCT}
    assert {file: n for file, n in lengths.items() if n > MOST_LINES} == {}


def test_no_function_is_long():
    functions = [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1)
        for path in PRODUCT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [found for found in functions if found[1] > MOST_LINES_OF_A_FUNCTION] == []


def test_few_modules_lie_outside_the_rooms_of_the_library():
    modules = sorted(path.name for path in (ROOT / "dsct_jax").glob("*.py"))
    assert len(modules) <= MOST_MODULES, modules


BASE_ONLY = """
import importlib, sys
blocked = set()
class Extras:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Extras())
from dsct_jax import errors
blocked = {*errors.EXTRAS, "cv2", "flatbuffers", "onnx", "torch", "data", "configs"}
import dsct_jax
dsct_jax.load, dsct_jax.predict
from dsct_jax.__main__ import main
from dsct_jax.commands.parsers import COMMANDS
for name in sorted({*COMMANDS} - {"report", "visualize", "serve", "predict_many"}):
    importlib.import_module(f"dsct_jax.commands.{name}")
sys.exit(main(["report", "."]))
"""


def test_the_base_install_suffices_and_a_missing_extra_is_one_line():
    command = [sys.executable, "-c", BASE_ONLY]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    line = "error: matplotlib is not installed: pip install 'dsct-jax[plots]'\n"
    assert (found.returncode, found.stderr) == (2, line)


def test_every_extra_that_an_error_names_brings_the_package():
    extras = PROJECT["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        names = [re.split(r"[><=; \[]", entry)[0].replace("-", "_") for entry in extras[extra]]
        assert package in names, (package, extra)


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


def _text_file_calls(tree):
    """Calls that read or write a text file without saying in which encoding."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        modes = [one.value for one in call.args if isinstance(one, ast.Constant)]
        is_text = name in ("read_text", "write_text") or (
            name == "open" and any(re.fullmatch("[rwxa][+]?", str(mode)) for mode in modes)
        )
        if is_text and not {"encoding", None} & {one.arg for one in call.keywords}:
            yield call.lineno


def test_text_files_are_utf_8_on_every_machine():
    files = [ROOT / "train.py", *ROOT.glob("dsct_jax/**/*.py"), *ROOT.glob("data/**/*.py")]
    found = {file: list(_text_file_calls(ast.parse(file.read_text()))) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}
