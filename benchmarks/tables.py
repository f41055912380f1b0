"""What every benchmark does around its numbers: where it ran, a markdown table, OUTPUT.md and
OUTPUT.json.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def make_parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """A parser that prints the module's docstring, with --output."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}", description=doc, formatter_class=form
    )
    add_output(parser)
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    """The flag that `report` reads."""
    parser.add_argument("--output", type=Path, help="writes OUTPUT.md and OUTPUT.json")


def hardware() -> dict[str, str]:
    """Where and with what this runs."""
    import jax

    device = jax.devices()[0]
    kind, cpu = device.device_kind, Path("/proc/cpuinfo")
    if device.platform == "cpu" and cpu.exists():
        kind = cpu.read_text().split("model name\t: ")[1].split("\n")[0]
    return {
        "device": kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def device_line() -> str:
    """Device and versions, for the line above a table."""
    import jax

    kind = jax.devices()[0].device_kind
    return f"{kind}, jax {jax.__version__}, Python {platform.python_version()}"


def in_words(details: dict[str, str]) -> str:
    """The same on one line."""
    return ", ".join(f"{key} {value}" for key, value in details.items() if value)


def row(cells: Iterable[object]) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table."""
    return "\n".join([row(columns), "|" + "---|" * len(columns), *map(row, rows)])


def report(text: str, numbers: Any, output: Path | None, *, indent: int | None = 1) -> None:
    """Prints the text and, with --output, writes it and the numbers."""
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        numbers = json.dumps(numbers, indent=indent)
        output.with_suffix(".json").write_text(numbers + "\n", encoding="utf-8")
