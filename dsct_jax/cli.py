"""What all commands share: a command line read, a user's mistake told in one line, and the exit
status.
"""

import argparse
import contextlib
import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from dsct_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Its errors are one line: UserError instead of a usage text and SystemExit."""

    def __init__(self, *, description: str | None, prog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(message)


def run_command(run: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Calls `run` and returns the exit status: its own (None = 0), 2 after a user's mistake told in
    one line on stderr, 130 after Ctrl-C.

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
        raise UserError(
            f"--output={output}: cannot be written ({error.strerror or error})"
        ) from error


def run_subcommand(package: str, commands: Mapping[str, str], argv: Sequence[str]) -> int:
    """`argv[0]` names one of `commands` (name -> what it does), a module of `package` whose `main`
    gets the rest; returns the exit status.
    """
    width = max(map(len, commands)) + 2
    listing = "\n".join(f"  {name:{width}}{text}" for name, text in commands.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"commands (each with --help):\n{listing}")
        return 0 if argv else 2
    name = argv[0].replace("-", "_")
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {close[0]}?" if close else f"must be one of {', '.join(commands)}"
        print(f"error: {argv[0]}: unknown command; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f"{package}.{name}").main(argv[1:])
