"""Reading .pth files without PyTorch: exact tensors from what torch.save writes, and nothing
executed, read beyond or crashed by what it does not.
"""

import contextlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsct_jax.errors import UserError
from dsct_jax.weights.tensor_files import (
    read_pth,
    read_safetensors,
    read_tensors,
    write_npz,
    write_safetensors,
)
from dsct_jax.weights.tensor_files import write_pth as write_torch_file

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
}


class Global:
    """A name in a pickle, written without importing it."""

    def __init__(self, module: str, name: str):
        self.text = f"{module}\n{name}\n"


class Call:
    """function(*arguments) in a pickle, then object.__setstate__(state)."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.function, self.arguments, self.state = function, arguments, state


class Storage:
    """The numbers of a tensor, kept beside the pickle."""

    def __init__(self, array: np.ndarray, key: str):
        self.array, self.key = array, key


class Writer(pickle._Pickler):
    """A pickler for the three above."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + obj.text.encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        return "storage", Global("torch", STORAGES[obj.array.dtype]), obj.key, "cpu", obj.array.size


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def as_tensor(
    storage: Storage, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
) -> Call:
    return Call(
        REBUILD, storage, offset, size, stride, False, Call(Global("collections", "OrderedDict"))
    )


def write_pth(
    path: Path, content: Any, storages: list[Storage] = (), *, root: str = "archive"
) -> Path:
    """The archive that torch.save writes around a pickle; `content` may be a pickle's raw bytes."""
    buffer = io.BytesIO()
    if not isinstance(content, bytes):
        Writer(buffer, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{root}/data.pkl", content if isinstance(content, bytes) else buffer.getvalue()
        )
        archive.writestr(f"{root}/byteorder", "little")
        for storage in storages:
            archive.writestr(f"{root}/data/{storage.key}", storage.array.tobytes())
        archive.writestr(f"{root}/version", "3\n")
    return path


def write_state(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A released file: {'model': tensors, 'optimizer', 'epoch', 'args'} with the training script's
    arguments as they were.
    """
    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
    storages = {
        name: Storage(array.ravel(), str(number))
        for number, (name, array) in enumerate(arrays.items())
    }
    tensors = {
        name: as_tensor(storages[name], a.shape, tuple(s // a.itemsize for s in a.strides))
        for name, a in arrays.items()
    }
    arguments = Call(
        Global("argparse", "Namespace"),
        state={"lr": 2e-4, "output_dir": "/somewhere", "masks": False},
    )
    return write_pth(
        path,
        {"model": tensors, "optimizer": {"state": {}}, "epoch": 49, "args": arguments},
        list(storages.values()),
    )


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_pth(path)
    line = str(error.value)
    assert str(path) in line
    assert "\n" not in line
    return line


def test_tensors_of_a_released_file(tmp_path):
    arrays = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1.5, -2]),
        "steps": np.array(7, np.int64),
    }
    found, _ = read_pth(write_state(tmp_path / "x.pth", arrays))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape


def test_views_of_one_storage(tmp_path):
    storage = Storage(np.arange(12, dtype=np.float32), "0")
    views = {
        "transposed": as_tensor(storage, (4, 3), (1, 4)),
        "part": as_tensor(storage, (2, 2), (4, 1), 5),
    }
    views["none"] = as_tensor(storage, (0, 3), (3, 1))
    found, _ = read_pth(write_pth(tmp_path / "x.pth", views, [storage]))
    whole = storage.array.reshape(3, 4)
    np.testing.assert_array_equal(found["transposed"], whole.T)
    np.testing.assert_array_equal(found["part"], whole[1:, 1:3])
    assert found["none"].shape == (0, 3)


@pytest.mark.torch
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_torch_saves(tmp_path, wrapped):
    import argparse

    import torch

    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 2)
    )
    state = module.state_dict()
    optimizer = torch.optim.AdamW(module.parameters())
    content = (
        {
            "model": state,
            "optimizer": optimizer.state_dict(),
            "epoch": 3,
            "args": argparse.Namespace(lr=1.0),
        }
        if wrapped
        else state
    )
    torch.save(content, tmp_path / "x.pth")
    found, _ = read_pth(tmp_path / "x.pth")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    assert "mkdir" in refused(
        write_pth(tmp_path / "x.pth", pickle.dumps({"model": Evil()}, protocol=2))
    )
    for name in (
        "builtins.eval",
        "builtins.getattr",
        "torch.storage._load_from_bytes",
        "functools.partial",
        "os.system",
    ):
        assert name in refused(
            write_pth(tmp_path / "x.pth", Call(Global(*name.rsplit(".", 1)), "1"))
        )
    assert not (tmp_path / "executed").exists()


def test_a_file_cannot_change_what_reads_it(tmp_path):
    storage = Storage(np.ones(3, np.float32), "0")
    for state in (
        {"_function": Global("collections", "OrderedDict")},
        (None, {"_function": Global("collections", "OrderedDict")}),
    ):
        buffer = io.BytesIO()
        writer = Writer(buffer, protocol=2)
        buffer.write(pickle.PROTO + b"\x02")
        writer.save(REBUILD)
        writer.save(state)
        buffer.write(pickle.BUILD + pickle.STOP)
        assert "change a function" in refused(write_pth(tmp_path / "x.pth", buffer.getvalue()))
    np.testing.assert_array_equal(
        read_pth(write_pth(tmp_path / "y.pth", {"a": as_tensor(storage, (3,), (1,))}, [storage]))[
            0
        ]["a"],
        storage.array,
    )


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((5,), (1,), 0),
        ((2, 2), (3, 1), 0),
        ((4,), (1,), 1),
        ((4,), (-1,), 0),
        ((2,), (1,), -1),
        ((10**9, 10**9), (0, 0), 0),
        ((-2, -2), (1, 1), 0),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, size, stride, offset):
    storage = Storage(np.zeros(4, np.float32), "0")
    assert "storage" in refused(
        write_pth(tmp_path / "x.pth", {"a": as_tensor(storage, size, stride, offset)}, [storage])
    )
    inner = as_tensor(storage, (2, 2), (2, 1))
    assert refused(
        write_pth(tmp_path / "x.pth", {"a": Call(REBUILD, inner, 1, (3,), (1,))}, [storage])
    )


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "x.pth"
    assert "cannot be read" in refused(path)  # missing
    path.write_bytes(b"")
    assert "not a .pth file" in refused(path)
    path.write_text("these are no weights")
    assert "not a .pth file" in refused(path)
    path.write_bytes(pickle.dumps({"a": 1}))  # as before PyTorch 1.6
    assert "torch.save" in refused(path)
    assert "holds no tensors" in refused(write_pth(path, {"model": {"a": 1}}))
    assert "holds no tensors" in refused(write_pth(path, [1, 2]))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other", "x")
    assert "not a .pth file" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/byteorder", "big")
    assert "big-endian" in refused(path)
    storage = Storage(np.zeros(4, np.float32), "0")
    assert "archive/data/0" in refused(
        write_pth(path, {"a": as_tensor(storage, (4,), (1,))})
    )  # its numbers are not there


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    whole = write_state(
        tmp_path / "x.pth", {"a": np.arange(20, dtype=np.float32), "b": np.ones((2, 3))}
    ).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "y.pth"
    for cut in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:cut])
        refused(path)
    survived = 0
    for _ in range(300):
        spoilt = bytearray(whole)
        for place in rng.integers(0, len(whole), 2):
            spoilt[place] = rng.integers(256)
        path.write_bytes(bytes(spoilt))
        with contextlib.suppress(UserError):
            read_pth(path)
            survived += 1
    assert survived < 200


def test_every_damaged_pickle_is_refused_or_harmless(tmp_path):
    """Without the archive's checksums in the way."""
    storage = Storage(np.arange(20, dtype=np.float32), "0")
    buffer = io.BytesIO()
    arguments = Call(Global("argparse", "Namespace"), state={"x": 1})
    Writer(buffer, protocol=2).dump(
        {"model": {"a": as_tensor(storage, (4, 5), (5, 1))}, "args": arguments}
    )
    rng = np.random.default_rng(1)
    for _ in range(1000):
        spoilt = bytearray(buffer.getvalue())
        spoilt[rng.integers(len(spoilt))] = rng.integers(256)
        path = write_pth(tmp_path / "x.pth", bytes(spoilt), [storage])
        with contextlib.suppress(UserError):
            assert all(array.size <= 20 for array in read_pth(path)[0].values())


# --- files of before PyTorch 1.6, names that come twice, .safetensors -----------------------------


@pytest.mark.torch
def test_a_file_of_before_the_archives(tmp_path):
    """As torchvision's and Deformable DETR's oldest weights are; storages in another order than the
    tensors, one of them shared, one not wanted.
    """
    import torch

    numbers = torch.arange(12, dtype=torch.float32)
    state = {
        "b": numbers.reshape(3, 4),
        "a": numbers[2:5],
        "half": torch.tensor([1.5, -2], dtype=torch.float16),
        "steps": torch.tensor(7),
    }
    content = {"optimizer": {"momentum": torch.zeros(1000)}, "model": state, "epoch": 3}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    found, _ = read_pth(tmp_path / "x.pth")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
    whole = (tmp_path / "x.pth").read_bytes()
    for cut in range(1, len(whole), 97):
        (tmp_path / "x.pth").write_bytes(whole[:cut])
        assert refused(tmp_path / "x.pth")
    # Code in place of the content, after a start that introspections right.
    start = whole[: whole.index(b"optimizer") - 20]
    (tmp_path / "x.pth").write_bytes(
        start[: start.rindex(b".") + 1] + pickle.dumps(_Mkdir(tmp_path / "executed"), protocol=2)
    )
    assert "mkdir" in refused(tmp_path / "x.pth")
    assert not (tmp_path / "executed").exists()


class _Mkdir:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_name_that_comes_twice_is_refused(tmp_path):
    storage = Storage(np.ones(3, np.float32), "0")
    one = as_tensor(storage, (3,), (1,))
    buffer = io.BytesIO()
    writer = Writer(buffer, protocol=2)
    buffer.write(pickle.PROTO + b"\x02")
    writer.save(Call(Global("collections", "OrderedDict")))
    buffer.write(pickle.MARK)
    for _ in range(2):
        writer.save("layer.weight")
        writer.save(one)
    buffer.write(pickle.SETITEMS + pickle.STOP)
    assert "'layer.weight' twice" in refused(
        write_pth(tmp_path / "x.pth", buffer.getvalue(), [storage])
    )
    path = write_pth(tmp_path / "x.pth", {"a": one}, [storage])
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", np.zeros(3, np.float32).tobytes())
    assert "'archive/data/0' twice" in refused(path)


def test_what_we_write_is_what_we_read(tmp_path):
    shared = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    arrays = {
        "b.weight": shared,
        "a": np.array(7, np.int64),
        "c": np.zeros((0, 3), np.float32),
        "copy": shared,
        "d": np.ones(5, np.float16),
    }
    for again in (1, 2):
        order = arrays if again == 1 else dict(reversed(arrays.items()))
        write_safetensors(
            tmp_path / f"{again}.safetensors",
            order,
            {"x": "1", "a": "\u00e9"} if again == 1 else {"a": "\u00e9", "x": "1"},
        )
        write_npz(tmp_path / f"{again}.npz", order)
        write_torch_file(tmp_path / f"{again}.pth", arrays, {"config": "{}"})
    for kind in ("safetensors", "npz", "pth"):
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes(), kind
    assert read_safetensors(tmp_path / "1.safetensors")[1] == {"a": "\u00e9", "x": "1"}
    assert read_pth(tmp_path / "1.pth")[1] == {"config": "{}"}
    for found in (
        read_tensors(tmp_path / "1.safetensors"),
        read_tensors(tmp_path / "1.pth"),
        dict(np.load(tmp_path / "1.npz")),
    ):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape


def test_safetensors_of_the_library_and_bfloat16(tmp_path):
    import ml_dtypes
    from safetensors.numpy import load_file

    write_safetensors(
        tmp_path / "x.safetensors", {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, {}
    )
    np.testing.assert_array_equal(
        load_file(str(tmp_path / "x.safetensors"))["a"], [[0, 1, 2], [3, 4, 5]]
    )

    def write(header: str, numbers: bytes) -> Path:
        (tmp_path / "y.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header.encode() + numbers
        )
        return tmp_path / "y.safetensors"

    numbers = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        read_tensors(
            write('{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}', numbers.tobytes())
        )["a"],
        numbers,
    )
    entry = '"a":{"dtype":"F16","shape":[1],"data_offsets":[%d,%d]}'
    with pytest.raises(UserError, match="holds 'a' twice"):
        read_tensors(write(f"{{{entry % (0, 2)},{entry % (2, 4)}}}", b"1234"))
    with pytest.raises(UserError, match="cut short"):
        read_tensors(write('{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}', b"12"))
    with pytest.raises(UserError, match=r"neither a \.safetensors"):
        read_tensors(tmp_path / "x.onnx")
