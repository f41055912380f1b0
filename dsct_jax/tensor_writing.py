"""Writes files of tensors without PyTorch, and the same bytes for the same tensors wherever and whenever: `.safetensors`, `.npz` and `.pth`."""

import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

_DATE = (1980, 1, 1, 0, 0, 0)  # of every entry of an archive; the first that the format knows
_SAFETENSORS_TYPES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int32): "I32", np.dtype(np.int64): "I64"}
_STORAGE_TYPES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage", np.dtype(np.int64): "LongStorage"}
_ALIGNMENT = 8  # bytes; of the header's end, as safetensors wants it


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Arrays by name and texts by name, both sorted: the library itself leaves the order of the texts to chance."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    for name, array in ordered.items():
        header[name] = {"dtype": _SAFETENSORS_TYPES[array.dtype], "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in ordered.values():
            file.write(array.tobytes())


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """What `numpy.savez` writes, sorted by name; read it with `numpy.load`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(arrays):
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(arrays[name], order="C"), allow_pickle=False)


def write_pth(path: Path, tensors: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
    """A `.pth` that `torch.load(path, weights_only=True)` reads: {"model": tensors by name, and each of `notes` under its name}.

    Tensors that are one array are one storage, as PyTorch keeps them.
    """
    storages: dict[int, tuple[str, np.ndarray]] = {}
    entries = []
    for name, tensor in tensors.items():
        key, _ = storages.setdefault(id(tensor), (str(len(storages)), tensor))
        entries.append((name, _pickled_tensor(tensor, key)))
    content = [("model", _pickled_dict(entries)), *((name, _pickled_text(text)) for name, text in notes.items())]
    files = {"data.pkl": b"\x80\x02" + _pickled_dict(content) + b".", "byteorder": b"little"}
    files |= {f"data/{key}": np.asarray(tensor, order="C").tobytes() for key, tensor in storages.values()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files | {"version": b"3\n"}).items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _DATE), data)


# The opcodes of pickle protocol 2 that a file of tensors needs. Written out because Python's pickler writes a function's name only after importing
# it, and `torch._utils` may not be there.


def _pickled_text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _pickled_int(number: int) -> bytes:
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _pickled_tuple(parts: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _pickled_name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _pickled_dict(entries: Iterable[tuple[str, bytes]]) -> bytes:
    return b"}(" + b"".join(_pickled_text(name) + value for name, value in entries) + b"u"


def _pickled_tensor(tensor: np.ndarray, key: str) -> bytes:
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)."""
    kind = _pickled_name("torch", _STORAGE_TYPES[tensor.dtype])
    storage = _pickled_tuple([_pickled_text("storage"), kind, _pickled_text(key), _pickled_text("cpu"), _pickled_int(tensor.size)]) + b"Q"
    strides = [int(np.prod(tensor.shape[i + 1 :])) for i in range(tensor.ndim)]
    size, stride = (_pickled_tuple(map(_pickled_int, numbers)) for numbers in (tensor.shape, strides))
    hooks = _pickled_name("collections", "OrderedDict") + b")R"
    return _pickled_name("torch._utils", "_rebuild_tensor_v2") + _pickled_tuple([storage, _pickled_int(0), size, stride, b"\x89", hooks]) + b"R"
