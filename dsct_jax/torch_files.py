"""Reads `.pth` files without PyTorch and without running anything stored in them.

A `.pth` file (PyTorch >= 1.6) is a zip archive with a pickle that describes tensors and one file of raw bytes a storage. The unpickler here
knows tensors and plain containers only: any other name in the pickle is refused, or kept as an inert `Opaque` where released files carry it.
"""

import io
import math
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsct_jax.errors import UserError

_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


# What a pickle or an archive that was damaged or forged can raise.
_UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    zlib.error,
)


class Opaque:
    """Stands for an object that carries no weights, such as the training script's arguments; it keeps nothing and does nothing."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Rebuild:
    """A function that a pickle may call and may not change: functions and partials can be given another body by a crafted file."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("it tries to change a function")


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else offset
    if storage.ndim != 1 or min(offset, *size, *stride, 0) < 0 or count > storage.size or (count and last >= storage.size):
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    strides = tuple(s * storage.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Rebuild(lambda data, *_: data),
    ("argparse", "Namespace"): Opaque,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of weights needs")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage_type, key, _, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        return np.frombuffer(self._archive.read(f"{self._root}data/{key}"), _DTYPES[storage_type], count)


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a `.pth` file by name: of the entry 'model' or 'state_dict' where there is one, otherwise of the whole file.

    Raises UserError when the file is no such archive or holds anything that is not a tensor or a plain container.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            description = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            root = description.removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path}: written on a big-endian machine; save it again on another one")
            content = _Unpickler(io.BytesIO(archive.read(description)), archive, root).load()
    except (zipfile.BadZipFile, StopIteration):
        raise UserError(f"{path}: not a .pth file of PyTorch 1.6 or newer, or cut short; copy it again, or save it again with torch.save") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"{path}: refused, {' '.join(str(error).split()) or type(error).__name__}") from None
    for entry in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, np.ndarray)} if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name")
    return tensors
