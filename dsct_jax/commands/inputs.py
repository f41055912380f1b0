"""The images and videos that a command line names, and where their drawings go."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dsct_jax.config import expanded_path
from dsct_jax.errors import UserError
from dsct_jax.inference import video
from dsct_jax.preprocess import image_suffixes, suffix_remedy

DRAWN = "drawn"  # the folder of drawn images and videos, below the output


def find_inputs(paths: Sequence[str], *, exclude: Path) -> tuple[list[Path], list[Path]]:
    """(images, videos) meant by files, folders (to the bottom) and glob patterns, each once, in a
    fixed order, none below `exclude`, the folder for results. Raises UserError for a path, pattern
    or folder without any, and for a folder in `exclude`.
    """
    found: dict[Path, None] = {}
    for path in map(expanded_path, paths):
        if path.is_dir():
            files = _files_below(path, exclude.resolve())
        elif path.exists():
            files = [path]
        elif glob.has_magic(str(path)):
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = [match for match in matches if match.is_file()]
            if not files:
                raise UserError(f"{path}: the pattern matches no file")
        else:
            raise UserError(f"{path}: no such file or folder")
        found |= dict.fromkeys(files)
    videos = [file for file in found if file.suffix.lower() in video.SUFFIXES]
    return [file for file in found if file.suffix.lower() not in video.SUFFIXES], videos


def _files_below(folder: Path, exclude: Path) -> list[Path]:
    """The images and videos; prints how many files of other kinds there are."""
    if exclude in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"--output={exclude}: holds the images to look at; name another folder")
    known = {*image_suffixes(), *video.SUFFIXES}
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and exclude not in file.resolve().parents and file.name[0] != "."
    ]
    wanted = [file for file in files if file.suffix.lower() in known]
    others = Counter(file.suffix.lower() for file in files if file.suffix.lower() not in known)
    kinds = [f"{n} {kind or 'without suffix'}{suffix_remedy(kind)}" for kind, n in others.items()]
    left_out = (
        f"{others.total()} other files left out: {', '.join(sorted(kinds))}" if others else ""
    )
    if not wanted:
        raise UserError(
            f"{folder}: the folder holds no image or video; {left_out or 'it is empty'}"
        )
    if left_out:
        print(f"{folder}: {left_out}", flush=True)
    return wanted


def drawing_names(files: Sequence[Path], suffix: str) -> dict[Path, Path]:
    """Where each drawing goes, below the folder that holds all; equal names keep their type
    (a.jpg.png).
    """
    if not files:
        return {}
    folders = {folder: os.path.realpath(folder) for folder in {file.parent for file in files}}
    top = os.path.commonpath(folders.values())
    below = {folder: os.path.relpath(place, top) for folder, place in folders.items()}
    relative = {file: os.path.normpath(f"{below[file.parent]}/{file.name}") for file in files}
    count = Counter(os.path.splitext(path)[0] for path in relative.values())
    names = {}
    for file, path in relative.items():
        stem = os.path.splitext(path)[0]
        names[file] = Path((stem if count[stem] == 1 else path) + suffix)
    return names
