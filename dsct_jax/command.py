"""What all commands share: a command line read, a user's mistake told in one line, and the exit status."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from dsct_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Its errors are one line: UserError instead of a usage text and SystemExit."""

    def __init__(self, *, description: str | None, prog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(message)


def run_command(run: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Calls `run` and returns the exit status: its own (None = 0), 2 after a user's mistake told in one line on stderr, 130 after Ctrl-C.

    Args:
        interrupted: the line after Ctrl-C.
    """
    try:
        return run() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Around what writes --output: raises UserError, naming it, where the system refuses."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror or error})") from error
