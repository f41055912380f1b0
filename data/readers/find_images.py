"""The image file that a name in an annotation file means, as tools and systems spell names."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dsct_jax.preprocess import image_suffixes

_UPLOADED = re.compile("^[0-9a-f]{8}-")  # what Label Studio puts before a file's name
_QUERY = re.compile(r"(?<=\.\w{3})\?.*|(?<=\.\w{4})\?.*")


class ImageFinder:
    """Finds files below `top`: by the name as it is, by it with backslashes, percent-encoding, URL
    or composed letters undone, else by its last part where only one file has it.
    """

    def __init__(self, top: Path, locate: Callable[[Path, str], Path]) -> None:
        self._top = top
        self._locate = locate
        self._by_last_part: dict[str, list[Path]] = {}
        self._respelled: list[str] = []  # what was found in another way than by its name

    def find(self, root: Path, name: str) -> Path:
        """The file that `name`, from `root` on, means; where there is none, the plain path."""
        path = self._locate(root, name)
        if os.path.exists(path):
            return path
        found = self._other_spelling(root, name) or self._same_last_part(name)
        if found:
            self._respelled.append(f"{name} is {found}")
        return found or path

    def notes(self) -> list[str]:
        """A line for the reader's report."""
        what = f"{len(self._respelled)} image names spelled otherwise"
        return [f"{what} (first: {first})" for first in self._respelled[:1]]

    def _other_spelling(self, root: Path, name: str) -> Path | None:
        plain = _plain(name)
        for spelling in (plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))):
            if os.path.exists(path := self._locate(root, spelling)):
                return path
        return None

    def _same_last_part(self, name: str) -> Path | None:
        if not self._by_last_part:
            self._by_last_part = defaultdict(list)
            for folder, _, files in os.walk(self._top):
                for file in files:
                    self._by_last_part[_key(file)].append(Path(folder, file))
                    stem, _, suffix = file.rpartition(".")
                    if f".{suffix}".lower() in image_suffixes():  # some tools leave it out
                        self._by_last_part[_key(stem)].append(Path(folder, file))
        last = _key(_plain(name).rpartition("/")[2])
        for part in (last, _UPLOADED.sub("", last)):
            found = self._by_last_part.get(part, [])
            if len(found) == 1:
                return found[0]
        return None


def _plain(name: str) -> str:
    """A relative path with slashes, of an URL, a path of Windows or one of Label Studio."""
    if "://" in name:
        name = urlsplit(name).path
    name = name.strip()
    name = name.partition("?d=")[2] or _QUERY.sub("", name)
    return unquote(name).replace("\\", "/").lstrip("/") or name


def _key(file: str) -> str:
    return unicodedata.normalize("NFC", file).casefold()
