"""What all commands share: the process, the command line, paths, outputs that are tried before the
work, a user's mistake reported in one line, the exit status, and progress on the terminal.

A command is a function of its package's `parsers.py` (its flags; its docstring is their --help) and
the `run(arguments)` of the module of that name, which raises UserError for what cannot be used;
`run_subcommand` does the rest.
"""

import argparse
import contextlib
import difflib
import importlib
import inspect
import io
import keyword
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from dsct_jax.config import expanded_path
from dsct_jax.errors import UserError, missing_extra

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


class Parser(argparse.ArgumentParser):
    """Its errors are one line: UserError instead of a usage text and SystemExit."""

    def __init__(self, *, description: str | None, prog: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=prog,
            description=inspect.cleandoc(description or ""),
            formatter_class=layout,
            allow_abbrev=False,
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
    options.setdefault("encoding", None if "b" in mode else "utf-8")
    try:
        with temporary.open(mode, **options) as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def start_process() -> None:
    """Sets this process up as a command's; call it once, before anything is compiled.

    What a terminal's encoding cannot show of a name is escaped, rather than an error.
    The terminal shows this project's own lines (stdout) and warnings of others (stderr). Compiled
    programs are kept in a directory of the user, $XDG_CACHE_HOME/dsct_jax or ~/.cache/dsct_jax,
    unless JAX_COMPILATION_CACHE_DIR says where, so that nothing is compiled twice.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # orbax reports every leaf, and twice what it raises
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    ours = logging.StreamHandler(sys.stdout)
    for package in ("dsct_jax", "pallas_kernels", "data"):
        logger = logging.getLogger(package)
        logger.addHandler(ours)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # batches that workers had ready at a stop: Python's tracker frees them, and need not say so
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    sys.unraisablehook = _report_unraisable
    # or every data worker would run the command's file, and load all that it imports
    sys.modules["__main__"].__dict__.pop("__file__", None)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # per machine: programs for a CPU use its instructions, and home directories are shared
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = caches / "dsct_jax" / (platform.node() or "local")
        with contextlib.suppress(OSError):  # no such place to write
            directory.mkdir(parents=True, exist_ok=True)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)  # read where jax is imported
            if "jax" in sys.modules:
                sys.modules["jax"].config.update("jax_compilation_cache_dir", str(directory))


def _report_unraisable(unraisable: Any) -> None:
    """Python's own, but for reads under way when orbax gave up on a damaged checkpoint."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


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


def run_subcommand(package: str, argv: Sequence[str] | None = None, *, prog: str) -> int:
    """Runs the command of `package` that the first argument names; returns the exit status. `argv`:
    None = those of the process, which is then set up as a command's; `prog`: how the user calls
    this, such as "python -m data".
    """
    parsers = importlib.import_module(f"{package}.parsers")
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, parsers.COMMANDS)) + 2
        print("commands (each with --help):")
        print("\n".join(f"  {name:{width}}{text}" for name, text in parsers.COMMANDS.items()))
        print(parsers.SEE_ALSO)
        return 0 if words else 2
    name = words[0].replace("-", "_")
    if name not in parsers.COMMANDS:
        close = difflib.get_close_matches(name, parsers.COMMANDS, n=1)
        hint = f"must be one of {', '.join(parsers.COMMANDS)}. {parsers.SEE_ALSO}"
        hint = f"did you mean {close[0]}?" if close else hint
        print(f"error: {words[0]}: unknown command; {hint}", file=sys.stderr)
        return 2

    def run() -> int | None:
        parser = getattr(parsers, name + "_" * keyword.iskeyword(name))()
        parser.prog = f"{prog} {name}"
        arguments = parser.parse_args(words[1:])
        if argv is None:
            start_process()
        return importlib.import_module(f"{package}.{name}").run(arguments)

    return run_command(run)


def progress(
    things: Iterable[T], *, total: int | None = None, what: str | None = None, unit: str = "image"
) -> Iterator[T]:
    """The same things, with a bar on a terminal and now and then a line elsewhere (both stderr)."""
    from tqdm import tqdm

    pace: dict[str, Any] = {"mininterval": 0.2, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        pace = {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES}
    yield from tqdm(things, total=total, desc=what, unit=unit, leave=False, **pace)
