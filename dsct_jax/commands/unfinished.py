"""What a prediction has found so far, in OUTPUT/predictions.jsonl: the same command, after an
interruption, goes on from there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dsct_jax.cli import whole_file
from dsct_jax.commands.inputs import DRAWN

FILE = "predictions.jsonl"


class Unfinished:
    """Entries of predictions.json that are done, by file. A context manager.

    The first line of the file is `about`, of what model and options the results are; each other
    line holds what one batch gave, in one write: batches are the same ones after an interruption,
    so that their numbers are too.
    """

    def __init__(self, output: Path, about: Mapping[str, Any]) -> None:
        self._output, self._path = output, output / FILE
        lines = (
            self._path.read_text(encoding="utf-8").split("\n")[:-1] if self._path.exists() else []
        )
        first = json.dumps(about)
        self._lines = lines if lines[:1] == [first] else [first]
        self._entries = [pair for line in self._lines[1:] for pair in json.loads(line)]
        self._file: IO[str] | None = None  # opened with the first result

    def done(self, drawings: Mapping[Path, Path]) -> dict[Path, dict[str, Any]]:
        """The entries of those files, not changed since, whose drawing is there. `drawings`: below
        OUTPUT/drawn.
        """
        known = {entry["file"]: (state, entry) for state, entry in self._entries}
        found: dict[Path, dict[str, Any]] = {}
        for file, name in drawings.items():
            state, entry = known.get(str(file), (None, {}))
            drawn = Path(DRAWN, name)
            if entry and state == _state(file) and entry["drawn"] == drawn.as_posix():
                found |= {file: entry} if (self._output / drawn).exists() else {}
        return found

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keeps what one batch, or one video, gave."""
        if not entries:
            return
        if self._file is None:
            with whole_file(self._path) as file:  # without a line that was cut
                file.write("\n".join([*self._lines, ""]))
            self._file = self._path.open("a", encoding="utf-8")
        pairs = [[_state(Path(entry["file"])), entry] for entry in entries]
        self._file.write(json.dumps(pairs) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Removes the file: everything is in predictions.json."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _state(file: Path) -> list[int] | None:
    """What tells that a file has changed; None: it is no file, or is gone."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]
