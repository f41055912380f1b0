"""The arrows between the rooms (docs/architecture.md), what the wheel holds, and that every dependency has its pinned version."""

import ast
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("dsct_jax", "pallas_kernels", "data", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = {
    path.name: dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", path.read_text(), re.MULTILINE)) for path in sorted((ROOT / "constraints").glob("*.txt"))
}


def imports_of(path: Path) -> set[str]:
    """Every absolute module name that a file imports, at its top or inside a function; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(folder: str) -> dict[str, set[str]]:
    """File (relative to the root) -> its imports, for every Python file of a room."""
    return {str(path.relative_to(ROOT)): imports_of(path) for path in sorted((ROOT / folder).rglob("*.py"))}


def wrong(files: dict[str, set[str]], allowed) -> list[str]:
    """file -> import, for every import of one of our rooms (or of ml_collections) that is not allowed."""
    watched = (*ROOMS, "ml_collections", "train", "tests", "benchmarks")
    return [
        f"{file} -> {name}" for file, names in files.items() for name in sorted(names) if name.split(".")[0] in watched and not allowed(file, name)
    ]


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_configs_hold_numbers_and_strings_only():
    assert wrong(room("configs"), lambda file, name: within(name, "configs", "ml_collections")) == []


def test_kernels_know_jax_and_nothing_of_ours():
    assert wrong(room("pallas_kernels"), lambda file, name: within(name, "pallas_kernels")) == []


def test_only_attention_opens_the_door_to_the_kernels():
    def allowed(file, name):
        return within(name, "dsct_jax") or (file == "dsct_jax/model/attention.py" and within(name, "pallas_kernels.deformable_attention"))

    assert wrong(room("dsct_jax"), allowed) == []


def test_data_uses_only_the_contract_of_the_library():
    contract = [f"dsct_jax.{module}" for module in ("batch", "preprocess", "boxes", "errors", "command")]
    commands = {
        "data/command.py": ["dsct_jax.settings", "ml_collections"],
        "data/bench.py": ["dsct_jax.prefetch"],
        "data/show.py": ["dsct_jax.subjects", "dsct_jax.drawing"],
    }

    def allowed(file, name):
        return within(name, "data", *contract, *commands.get(file, []))

    assert wrong(room("data"), allowed) == []


def test_the_model_knows_neither_losses_nor_optimizer():
    lower = [f"dsct_jax.{module}" for module in ("model", "batch", "boxes", "preprocess", "errors")]
    assert wrong(room("dsct_jax/model"), lambda file, name: within(name, *lower, "pallas_kernels")) == []


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "core", "misc"])
def test_no_module_without_a_subject(word):
    assert [path for folder in ROOMS for path in (ROOT / folder).rglob("*.py") if path.stem == word or word in path.parent.parts] == []


def test_wheel_holds_only_the_library_and_the_kernels():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    included = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name for name in packages if any(fnmatch(name, pattern) for pattern in included)} == {"dsct_jax", "pallas_kernels"}
    assert {"data", "configs"} < packages  # with an __init__.py of their own, so that no installed package of that name wins


@pytest.mark.parametrize("file", PINNED)
def test_every_dependency_is_pinned(file):
    extras = PROJECT["project"]["optional-dependencies"]
    required = [*PROJECT["project"]["dependencies"], *(entry for extra in extras.values() for entry in extra)]
    names = {re.match(r"[A-Za-z0-9_.-]+", entry)[0].lower().replace("_", "-").replace(".", "-") for entry in required}
    assert {"jax", "flax", "numpy", "pytest"} <= names
    assert names - PINNED[file].keys() == set()


@pytest.mark.parametrize("file", PINNED)
def test_constraints_name_no_host(file):
    lines = (ROOT / "constraints" / file).read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[a-z0-9-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert not any("://" in line for line in lines)
