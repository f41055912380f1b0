"""How far a command has come."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(things: Iterable[T], *, total: int, what: str, unit: str = "image") -> Iterable[T]:
    """The same things, with a bar on a terminal and now and then a line of it elsewhere (stderr)."""
    terminal = sys.stderr.isatty()
    often = {"mininterval": 0.2, "dynamic_ncols": True} if terminal else {"mininterval": 10, "delay": 10}
    return tqdm(things, total=total, desc=what, unit=unit, leave=False, **often)
