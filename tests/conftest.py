"""What every test runs under: the CPU with 8 simulated devices (a GPU with JAX_PLATFORMS=cuda,cpu),
float32, checked shapes, golden numbers.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

# Read when jax is imported, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_X64"] = "0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("MPLBACKEND", "agg")
# Eight devices, and code that is compiled in half the time because it need not be fast (what users
# run is compiled in full).
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}"


def _missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


# Every annotated shape of the library is checked at each call; only a bare accelerator image may
# lack beartype.
SHAPES_CHECKED = not _missing("beartype")
if SHAPES_CHECKED:
    from jaxtyping import install_import_hook

    install_import_hook(["dsct_jax", "pallas_kernels"], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--golden-detr=DIR`, `--golden-two-stage=DIR`: other golden numbers of these networks than
    those of the repository.
    """
    for folder in ("detr", "two_stage"):
        flag = f"--golden-{folder.replace('_', '-')}"
        parser.addoption(flag, type=Path, default=GOLDEN / folder, metavar="DIR")


def pytest_report_header() -> str:
    """Says when the shapes go unchecked."""
    checked = "checked" if SHAPES_CHECKED else "NOT checked, beartype is not installed"
    return f"shape annotations: {checked}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, with the reason. The longest files first: workers take
    whole files, and should end together.
    """
    items.sort(key=lambda item: "tests/training/" not in item.nodeid)
    if any(item.get_closest_marker("gpu") for item in items):
        import jax

        if not any(device.platform == "gpu" for device in jax.devices()):
            _skip(items, "gpu", "no GPU in use (JAX_PLATFORMS=cuda,cpu)")
    if _missing("torch"):
        _skip(items, "torch", "PyTorch is not installed (the torch extra)")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """`golden("matcher")`: the arrays of tests/golden/matcher.npz, saved from the authors' code
    (tests/golden/README.md).
    """

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)

    return read
