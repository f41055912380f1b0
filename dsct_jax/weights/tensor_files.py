"""Tensor files without PyTorch: .pth and .safetensors, third-party files without running what is in
them.

A `.pth` file is a pickle that describes tensors, and raw bytes per storage: in a zip archive
(PyTorch >= 1.6), or one after the other. The unpickler here knows tensors and plain containers
only: any other name is refused, or kept as an inert `Opaque` where released files carry it.
"""

import contextlib
import dataclasses
import io
import json
import math
import pickle
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save as serialize

from dsct_jax.errors import UserError

_Content = tuple[dict[str, np.ndarray], dict[str, str]]  # tensors and texts by name
PTH_SUFFIXES = (".pth", ".pt", ".bin")

_TYPES: tuple[tuple[str, str, Any], ...] = (  # PyTorch's name, safetensors' name, numpy's type
    ("Float", "F32", np.float32), ("Double", "F64", np.float64), ("Half", "F16", np.float16),
    ("BFloat16", "BF16", ml_dtypes.bfloat16), ("Long", "I64", np.int64), ("Int", "I32", np.int32),
    ("Short", "I16", np.int16), ("Char", "I8", np.int8), ("Byte", "U8", np.uint8),
    ("Bool", "BOOL", np.bool_),
)  # fmt: skip
STORAGE_TYPES = {f"{name}Storage": kind for name, _, kind in _TYPES}
_STORAGE_NAMES = {np.dtype(kind): name for name, kind in STORAGE_TYPES.items()}
_SAFETENSORS_TYPES = {name: kind for _, name, kind in _TYPES}
# magic number and protocol
_PLAIN_FILE_START = b"".join(pickle.dumps(n, protocol=2) for n in (0x1950A86A20F9469CFC6C, 1001))

# What a pickle or an archive that was damaged or forged can raise.
_UNREADABLE: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, struct.error, zlib.error, ArithmeticError, AttributeError),
    *(EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError),
)


_BIG_ENDIAN = "written on a big-endian machine; save it again on another one"


class Opaque:
    """An object that carries no weights, such as the training script's arguments; does nothing."""

    def __init__(self, *_: Any): ...

    def __setstate__(self, _: Any) -> None: ...


class _Rebuild:
    """A function that a crafted pickle may call, but cannot give another body."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("it tries to change a function")


class _Entries(OrderedDict):
    """A dictionary in which no name may come twice: which of two tensors would count?"""

    def __setitem__(self, key: Any, value: Any) -> None:
        if key in self:
            raise pickle.UnpicklingError(f"it holds {key!r} twice")
        super().__setitem__(key, value)


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    """Numbers that a pickle refers to, not read yet."""

    kind: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class _View:
    """A tensor: a strided part of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def cut(self, numbers: np.ndarray) -> np.ndarray:
        """The tensor, from the numbers of its storage."""
        count = math.prod(self.size)
        steps = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        last = self.offset + steps if count else -1
        negative = min(self.offset, *self.size, *self.stride, 0) < 0
        if negative or max(count, last + 1) > numbers.size:
            raise pickle.UnpicklingError("a tensor reaches outside its storage")
        strides = tuple(s * numbers.itemsize for s in self.stride)
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.size, strides).copy()


def _view(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _View(storage, offset, tuple(size), tuple(stride))


_ALLOWED = {
    ("collections", "OrderedDict"): _Entries,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(_view),
    ("torch._utils", "_rebuild_tensor"): _Rebuild(_view),  # before PyTorch 0.4
    ("torch._utils", "_rebuild_parameter"): _Rebuild(lambda data, *_: data),
    ("torch.nn.parameter", "Parameter"): _Rebuild(lambda data, *_: data),
    ("argparse", "Namespace"): Opaque,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader | io.BytesIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}  # every one that the pickle refers to, by key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and name in STORAGE_TYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of weights needs")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, count, *view = pid
        is_view = any(part is not None for part in view)
        if kind != "storage" or storage_type not in STORAGE_TYPES or is_view:
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        self.storages[str(key)] = _Storage(str(storage_type), str(key), int(count))
        return self.storages[str(key)]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name of a file of either kind. Raises UserError when it cannot be read."""
    if path.suffix in PTH_SUFFIXES:
        return read_pth(path)[0]
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    raise UserError(f"{path}: neither a .safetensors file nor a .pth, .pt or .bin of PyTorch")


def read_pth(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, texts) by name of a `.pth` file: the tensors of its entry 'model' or 'state_dict'
    where there is one, otherwise of the whole file, and the texts beside that entry.

    Raises UserError for any other file, and for one that holds more than tensors and containers.
    """
    try:
        with path.open("rb") as file:
            read = _from_archive if zipfile.is_zipfile(file) else _from_plain_file
            tensors, texts = read(path, file)
    except (zipfile.BadZipFile, StopIteration):
        remedy = "copy it again, or save it again with torch.save"
        raise UserError(f"{path}: not a .pth file, or cut short; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: refused, {reason}") from None
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name")
    return tensors, texts


def _from_archive(path: Path, file: io.BufferedReader) -> _Content:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise pickle.UnpicklingError(f"it holds {_doubled(names)!r} twice")
        description = next(name for name in names if name.endswith("data.pkl"))
        root = description.removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{path}: {_BIG_ENDIAN}")
        views, texts = _named_views(_Unpickler(io.BytesIO(archive.read(description))).load())

        def numbers(storage: _Storage) -> np.ndarray:
            content = archive.read(f"{root}data/{storage.key}")
            return np.frombuffer(content, STORAGE_TYPES[storage.kind], storage.count)

        return {name: view.cut(numbers(view.storage)) for name, view in views.items()}, texts


def _from_plain_file(path: Path, file: io.BufferedReader) -> _Content:
    """Five pickles (a magic number, a protocol, the machine, the content, the storages' keys), then
    a count and the numbers of each storage.
    """
    file.seek(0)
    if file.read(len(_PLAIN_FILE_START)) != _PLAIN_FILE_START:
        raise zipfile.BadZipFile
    if not _Unpickler(file).load()["little_endian"]:
        raise UserError(f"{path}: {_BIG_ENDIAN}")
    unpickler = _Unpickler(file)
    views, texts = _named_views(unpickler.load())
    storages: dict[str, np.ndarray] = {}
    for key in _Unpickler(file).load():
        kind = np.dtype(STORAGE_TYPES[unpickler.storages[key].kind])
        (count,) = struct.unpack("<q", file.read(8))
        if not 0 <= count * kind.itemsize <= path.stat().st_size:
            raise EOFError("cut short")
        storages[key] = np.frombuffer(file.read(count * kind.itemsize), kind, count)
    return {name: view.cut(storages[view.storage.key]) for name, view in views.items()}, texts


def _named_views(content: Any) -> tuple[dict[str, _View], dict[str, str]]:
    """Tensors of the entry that holds the model, and the texts beside it."""
    if not isinstance(content, dict):
        return {}, {}
    texts = {str(name): text for name, text in content.items() if isinstance(text, str)}
    entries = (content.get("model"), content.get("state_dict"), content)
    model = next(entry for entry in entries if isinstance(entry, dict))
    return {str(name): view for name, view in model.items() if isinstance(view, _View)}, texts


def read_safetensors_texts(path: Path) -> dict[str, str]:
    """The metadata of a `.safetensors` file. Raises UserError when it is damaged."""
    with _safetensors_errors(path), safetensors.safe_open(path, framework="np") as file:
        return file.metadata() or {}


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, texts) by name of a `.safetensors` file. Raises UserError when it is damaged, cut
    short, or names a tensor twice.
    """
    with _safetensors_errors(path):
        entries = safetensors.deserialize(path.read_bytes())
    tensors = {}
    for name, entry in entries:  # the library's own conversion does not know bfloat16
        kind = entry["dtype"]
        if kind not in _SAFETENSORS_TYPES:
            raise UserError(f"{path}: {name} has numbers of type {kind}, which are no weights")
        numbers = np.frombuffer(entry["data"], _SAFETENSORS_TYPES[kind])
        tensors[name] = numbers.reshape(entry["shape"])
    return tensors, read_safetensors_texts(path)


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (safetensors.SafetensorError, ValueError) as error:
        if doubled := _doubled_name(path.read_bytes()):
            raise UserError(f"{path}: holds {doubled!r} twice") from None
        remedy = "the file may be cut short, copy it again"
        raise UserError(f"{path}: cannot be read as .safetensors ({error}); {remedy}") from None


def _doubled_name(content: bytes) -> str | None:
    """The name that comes twice in the header of a `.safetensors` file, which its library reports
    as a wrong offset.
    """
    doubled: list[str | None] = []
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    with contextlib.suppress(ValueError):
        note = lambda pairs: doubled.append(_doubled(name for name, _ in pairs))  # noqa: E731
        json.loads(header, object_pairs_hook=note)
    return next(filter(None, doubled), None)


def _doubled(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


_DATE = (1980, 1, 1, 0, 0, 0)  # of every entry of an archive; the first that the format knows
_ALIGNMENT = 8  # bytes; of the header's end, as safetensors wants it


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Arrays and texts by name, the same bytes every time: the library leaves the order of the
    texts to chance, so they are added here.
    """
    content = serialize({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)})
    start = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:start])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(memoryview(content)[start:])


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Sorted by name, which makes the bytes the same every time; read it with `numpy.load`."""
    ordered: dict[str, Any] = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    np.savez(path, **ordered)


@dataclasses.dataclass(frozen=True)
class _Name:
    """A function or class of PyTorch in a pickle, which wants what it calls to be callable."""

    module: str
    name: str

    def __call__(self) -> None: ...


class _Pickler(pickle._Pickler):
    """Writes names without importing them, unlike Python's own: PyTorch may not be there."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", _Name("torch", obj.kind), obj.key, "cpu", obj.count
        return None

    def reducer_override(self, obj: Any) -> Any:
        """A tensor is _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)."""
        if isinstance(obj, _Name):
            return obj.name
        if isinstance(obj, _View):
            view: Any = (obj.storage, obj.offset, obj.size, obj.stride, False, OrderedDict())
            return _Name("torch._utils", "_rebuild_tensor_v2"), view
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.module if isinstance(obj, _Name) else obj.__module__
        text = f"c{module}\n{name or obj.__name__}\n"
        self.write(text.encode())  # type: ignore[attr-defined]


def write_pth(path: Path, tensors: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
    """A `.pth` that `torch.load(path, weights_only=True)` reads: {"model": tensors by name} and the
    `notes`. Tensors that are one array are one storage, as PyTorch keeps them.
    """
    storages: dict[int, _Storage] = {}
    views, pickled, files = {}, io.BytesIO(), {"data.pkl": b"", "byteorder": b"little"}
    for name, tensor in tensors.items():
        kind, key = _STORAGE_NAMES[tensor.dtype], str(len(storages))
        storage = storages.setdefault(id(tensor), _Storage(kind, key, tensor.size))
        files[f"data/{storage.key}"] = np.asarray(tensor, order="C").tobytes()
        strides = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim))
        views[name] = _View(storage, 0, tensor.shape, strides)
    _Pickler(pickled, protocol=2).dump({"model": views, **notes})
    files |= {"data.pkl": pickled.getvalue(), "version": b"3\n"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _DATE), data)
