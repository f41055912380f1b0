"""The frames of videos, which may be more than memory holds: one JSON text a line in a file each,
from the first prediction to the last line of predictions.json.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsct_jax.cli import whole_file

FOLDER = "predictions_frames"  # of OUTPUT; goes away with the end of the work


class Frames:
    """What was found in each frame of one video, in order, in a file. Iterate over it as often as
    you like; `fresh`: begin with none.
    """

    def __init__(self, path: Path, *, fresh: bool = False):
        self.path = path
        if fresh:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")

    def lines(self) -> Iterator[str]:
        """Each frame as JSON."""
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                yield line.rstrip("\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self.lines())

    def __len__(self) -> int:
        return sum(1 for _ in self.lines())

    def number(self, numbers: Mapping[int, int]) -> None:
        """Gives every person of a track its number, also before the track had one."""
        frames = iter(self)
        with whole_file(self.path) as file:
            for frame in frames:
                for person in frame["subjects"]:
                    person["person"] = numbers.get(person.pop("track"))
                file.write(json.dumps(frame) + "\n")


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Writes predictions.json, in which each video's `frames` are Frames."""
    videos, marks = document["videos"], [f"\0{i}" for i in range(len(document["videos"]))]
    marked = [video | {"frames": mark} for video, mark in zip(videos, marks, strict=True)]
    rest = json.dumps({**document, "videos": marked}, indent=1)
    with whole_file(path) as file:
        for video, mark in zip(videos, marks, strict=True):
            before, rest = rest.split(json.dumps(mark), 1)
            file.write(before + "[")
            for i, line in enumerate(video["frames"].lines()):
                file.write(f"{',' * (i > 0)}\n    {line}")
            file.write("\n   ]")
        file.write(rest + "\n")
