"""Torch7 files (.t7), binary and ascii, as plain values: numbers, texts, tables and tensors;
nothing in a file is ever run.

The format is that of Torch7's File:writeObject (its doc/serialization.md and File.lua): a type
number, then the value. Tables and torch objects carry an index, so that an object met again is only
named.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from data.readers.records import reading
from dsct_jax.errors import UserError

_NIL, _NUMBER, _STRING, _TABLE, _TORCH, _BOOLEAN = range(6)
_ELEMENTS = {"Double": "<f8", "Float": "<f4", "Long": "<i8", "Int": "<i4", "Short": "<i2"}
_ELEMENTS |= {"Char": "i1", "Byte": "u1"}
_WORD = re.compile(rb"\s*(\S+)")
_MAX_DEPTH = 100


def load_torch7(path: Path) -> Any:
    """What a .t7 file holds: nil -> None, number -> float, string -> str, boolean -> bool, tensor
    and storage -> numpy array.

    A table whose keys are 1, 2, ... n becomes a list, another table a dict; an empty one the empty
    list. Raises UserError when the file is missing, cut short, no Torch7 file, or holds functions
    or other classes than tensors.
    """
    with reading(path, "a Torch7 file"):
        content = path.read_bytes()
    # A binary file begins with a type number of four bytes, the last three being zero; an ascii
    # file with a digit and the end of the line.
    source = (_Binary if content[1:4] == b"\0\0\0" else _Ascii)(content)
    try:
        return _Objects(source).read(0)
    except (ValueError, OverflowError, MemoryError, IndexError) as error:
        raise UserError(
            f"{path}: not a usable Torch7 file, at byte {source.place} of {len(content)} ({error})"
        ) from None


class _Binary:
    """Values written one after the other, little-endian, a long being of 8 bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.place = 0

    def text(self, count: int) -> bytes:
        if not 0 <= count <= len(self._content) - self.place:
            raise ValueError("the file ends too early, or is damaged")
        self.place += count
        return self._content[self.place - count : self.place]

    def array(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self.text(count * np.dtype(dtype).itemsize), dtype)


class _Ascii(_Binary):
    """The same as decimal numbers between white space; texts as they are, ended by a line break."""

    def text(self, count: int) -> bytes:
        self.place += self._content[self.place : self.place + 1] == b"\n"  # of the number before it
        return super().text(count)

    def array(self, dtype: str, count: int) -> np.ndarray:
        if np.dtype(dtype).itemsize == 1:  # bytes are written as they are
            return super().array(dtype, count)
        if not 0 <= count <= len(self._content):
            raise ValueError(f"{count} values are announced, more than fit in the file")
        convert = float if np.dtype(dtype).kind == "f" else int
        return np.array([convert(self._word()) for _ in range(count)], dtype)

    def _word(self) -> bytes:
        found = _WORD.match(self._content, self.place)
        if found is None:
            raise ValueError("the file ends too early")
        self.place = found.end()
        return found[1]


class _Objects:
    def __init__(self, source: _Binary) -> None:
        self._source = source
        self._known: dict[int, Any] = {}  # index -> table or tensor, met before

    def _int(self) -> int:
        return int(self._source.array("<i4", 1)[0])

    def _longs(self, count: int) -> list[int]:
        return self._source.array(_ELEMENTS["Long"], count).tolist()

    def _text(self) -> str:
        return self._source.text(self._int()).decode("utf-8")

    def read(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} deep")
        kind = self._int()
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            return float(self._source.array(_ELEMENTS["Double"], 1)[0])
        if kind == _STRING:
            return self._text()
        if kind == _BOOLEAN:
            return self._int() == 1
        if kind not in (_TABLE, _TORCH):
            data = "numbers, texts, booleans, tables and tensors"
            raise ValueError(f"a value of type {kind}: only {data} are data")
        index = self._int()
        if index not in self._known:
            self._known[index] = None  # a table that holds itself reads as nil there
            self._known[index] = self._table(depth) if kind == _TABLE else self._torch(depth)
        return self._known[index]

    def _table(self, depth: int) -> dict | list:
        entries: dict[Any, Any] = {}
        for _ in range(self._int()):
            key = self.read(depth + 1)
            if not isinstance(key, str | float | bool):
                raise ValueError("a table with a key that is neither a text nor a number")
            entries[key] = self.read(depth + 1)
        numbers = range(1, len(entries) + 1)
        is_list = all(number in entries for number in numbers)
        return [entries[number] for number in numbers] if is_list else entries

    def _torch(self, depth: int) -> np.ndarray:
        name = self._text()
        if name.startswith("V "):  # the version of the class; the oldest files have none
            name = self._text()
        package, _, kind = name.partition(".")
        element = _ELEMENTS.get(kind.removesuffix("Tensor").removesuffix("Storage"))
        if package != "torch" or element is None or not kind.endswith(("Tensor", "Storage")):
            raise ValueError(f"an object of class {name}: only tensors are data")
        if kind.endswith("Storage"):
            return self._source.array(element, self._longs(1)[0])
        dimensions = self._int()
        if not 0 <= dimensions <= 16:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape, strides = self._longs(dimensions), self._longs(dimensions)
        offset = self._longs(1)[0] - 1
        storage = self.read(depth + 1)
        if storage is None or dimensions == 0:
            return np.zeros(0, element)
        steps = zip(shape, strides, strict=True)
        last = offset + sum((size - 1) * stride for size, stride in steps)
        lies_within = offset >= 0 and min(strides) >= 0 and min(shape) >= 0
        if not isinstance(storage, np.ndarray) or not lies_within or last >= len(storage):
            raise ValueError("a tensor that does not lie in its storage")
        in_bytes = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, in_bytes).copy()
