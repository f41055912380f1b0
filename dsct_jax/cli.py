"""What all commands share: the command line, paths, outputs that are tried before the work, a
user's mistake reported in one line, the exit status, and progress on the terminal.

A command is a module with `make_parser()` (its flags) and `run(arguments)` (with those parsed; it
raises UserError for what cannot be used); `run_subcommand` does the rest.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from tqdm import tqdm

from dsct_jax.errors import UserError, missing_extra

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


def expanded_path(text: str) -> Path:
    """The `type` of a flag that is a path: shells leave the ~ of --flag=~/x alone."""
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    """Its errors are one line: UserError instead of a usage text and SystemExit."""

    def __init__(self, *, description: str | None, prog: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=prog, description=description, formatter_class=layout, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(message)

    def add_output(self, flag: str, *, folder: bool, help: str, **options: Any) -> None:
        """A flag that names the file or folder to write, which is tried while it is parsed."""

        class TryOutput(argparse.Action):
            def __call__(self, parser: Any, namespace: Any, value: Any, _: Any = None) -> None:
                try_output(value, folder=folder, flag=flag)
                setattr(namespace, self.dest, value)

        self.add_argument(flag, type=expanded_path, action=TryOutput, help=help, **options)


def try_output(path: Path, *, folder: bool, flag: str = "--output") -> None:
    """Raises UserError, naming the flag, where nothing can be written; leaves nothing behind."""
    if folder and path.is_file():
        raise UserError(f"{flag}={path}: is a file and cannot be written into; name a folder")
    if not folder and path.is_dir():
        raise UserError(f"{flag}={path}: is a folder and cannot be written as a file; name a file")
    place = path if folder else path.parent
    missing = [part for part in (place, *place.parents) if not part.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
        for made in missing:
            made.rmdir()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{flag}={path}: cannot be written ({reason})") from error


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """`path` opened for writing; the file appears there when the block has ended, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, **options) as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def run_command(run: Callable[[], int | None]) -> int:
    """Calls `run` and returns the exit status: its own (None = 0); 2 after one line on stderr for a
    user's mistake, a missing extra, a file that the system refuses or devices that jax does not
    have; 130 after Ctrl-C (with the line of the KeyboardInterrupt, if any).
    """
    try:
        return run() or 0
    except KeyboardInterrupt as interruption:
        print(str(interruption) or "interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        reason = str(error)
    except ModuleNotFoundError as error:
        reason = str(missing_extra(error) or "")
        if not reason:
            raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = f"{where}{error.strerror or error}"
    except (AssertionError, RuntimeError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms or _jax_starts():
            raise
        why = " ".join(f"({error})".split()) if str(error) else ""
        reason = f"jax finds no such devices {why}".rstrip() + "; unset it to let jax choose"
        reason = f"JAX_PLATFORMS={platforms}: {reason}"
    print(f"error: {reason}", file=sys.stderr)
    return 2


def _jax_starts() -> bool:
    import jax

    try:
        return bool(jax.devices())
    except (AssertionError, RuntimeError):
        return False


def run_subcommand(
    package: str, commands: Mapping[str, str], argv: Sequence[str] | None = None, *, prog: str
) -> int:
    """Runs the command that the first argument names, one of `commands` (name -> what it does), a
    module of `package`; returns the exit status. `argv`: None = those of the process, which is then
    set up as a command's; `prog`: how the user calls this, such as "python -m data".
    """
    if argv is None:
        from dsct_jax.runtime import start_process

        start_process()
        argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, commands)) + 2
        print("commands (each with --help):")
        print("\n".join(f"  {name:{width}}{text}" for name, text in commands.items()))
        return 0 if argv else 2
    name = argv[0].replace("-", "_")
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {close[0]}?" if close else f"must be one of {', '.join(commands)}"
        print(f"error: {argv[0]}: unknown command; {hint}", file=sys.stderr)
        return 2

    def run() -> int | None:
        command = importlib.import_module(f"{package}.{name}")
        parser = command.make_parser()
        parser.prog = f"{prog} {name}"
        return command.run(parser.parse_args(argv[1:]))

    return run_command(run)


def progress(
    things: Iterable[T], *, total: int | None = None, what: str | None = None, unit: str = "image"
) -> Iterator[T]:
    """The same things, with a bar on a terminal and now and then a line elsewhere (both stderr)."""
    pace: dict[str, Any] = {"mininterval": 0.2, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        pace = {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES}
    yield from tqdm(things, total=total, desc=what, unit=unit, leave=False, **pace)
