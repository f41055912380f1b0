"""Reading .pth files without PyTorch: exact tensors from what torch.save writes, and nothing executed, read beyond or crashed by what it does not."""

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
from dsct_jax.torch_files import read_pth

STORAGES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float64): "DoubleStorage", np.dtype(np.int64): "LongStorage"}


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


def as_tensor(storage: Storage, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    return Call(REBUILD, storage, offset, size, stride, False, Call(Global("collections", "OrderedDict")))


def write_pth(path: Path, content: Any, storages: list[Storage] = (), *, root: str = "archive") -> Path:
    """The archive that torch.save writes around a pickle; `content` may be raw bytes of a pickle."""
    buffer = io.BytesIO()
    if not isinstance(content, bytes):
        Writer(buffer, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", content if isinstance(content, bytes) else buffer.getvalue())
        archive.writestr(f"{root}/byteorder", "little")
        for storage in storages:
            archive.writestr(f"{root}/data/{storage.key}", storage.array.tobytes())
        archive.writestr(f"{root}/version", "3\n")
    return path


def write_state(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A released file: {'model': tensors, 'optimizer', 'epoch', 'args'} with the training script's arguments as they were."""
    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
    storages = {name: Storage(array.ravel(), str(number)) for number, (name, array) in enumerate(arrays.items())}
    tensors = {name: as_tensor(storages[name], a.shape, tuple(s // a.itemsize for s in a.strides)) for name, a in arrays.items()}
    arguments = Call(Global("argparse", "Namespace"), state={"lr": 2e-4, "output_dir": "/somewhere", "masks": False})
    return write_pth(path, {"model": tensors, "optimizer": {"state": {}}, "epoch": 49, "args": arguments}, list(storages.values()))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_pth(path)
    line = str(error.value)
    assert str(path) in line
    assert "\n" not in line
    return line


def test_tensors_of_a_released_file(tmp_path):
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1.5, -2]), "steps": np.array(7, np.int64)}
    found, _ = read_pth(write_state(tmp_path / "x.pth", arrays))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape


def test_views_of_one_storage(tmp_path):
    storage = Storage(np.arange(12, dtype=np.float32), "0")
    views = {"transposed": as_tensor(storage, (4, 3), (1, 4)), "part": as_tensor(storage, (2, 2), (4, 1), 5)}
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

    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 2))
    state = module.state_dict()
    optimizer = torch.optim.AdamW(module.parameters())
    content = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1.0)} if wrapped else state
    torch.save(content, tmp_path / "x.pth")
    found, _ = read_pth(tmp_path / "x.pth")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    assert "mkdir" in refused(write_pth(tmp_path / "x.pth", pickle.dumps({"model": Evil()}, protocol=2)))
    for name in ("builtins.eval", "builtins.getattr", "torch.storage._load_from_bytes", "functools.partial", "os.system"):
        assert name in refused(write_pth(tmp_path / "x.pth", Call(Global(*name.rsplit(".", 1)), "1")))
    assert not (tmp_path / "executed").exists()


def test_a_file_cannot_change_what_reads_it(tmp_path):
    storage = Storage(np.ones(3, np.float32), "0")
    for state in ({"_function": Global("collections", "OrderedDict")}, (None, {"_function": Global("collections", "OrderedDict")})):
        buffer = io.BytesIO()
        writer = Writer(buffer, protocol=2)
        buffer.write(pickle.PROTO + b"\x02")
        writer.save(REBUILD)
        writer.save(state)
        buffer.write(pickle.BUILD + pickle.STOP)
        assert "change a function" in refused(write_pth(tmp_path / "x.pth", buffer.getvalue()))
    np.testing.assert_array_equal(read_pth(write_pth(tmp_path / "y.pth", {"a": as_tensor(storage, (3,), (1,))}, [storage]))[0]["a"], storage.array)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((5,), (1,), 0), ((2, 2), (3, 1), 0), ((4,), (1,), 1), ((4,), (-1,), 0), ((2,), (1,), -1), ((10**9, 10**9), (0, 0), 0), ((-2, -2), (1, 1), 0)],
)
def test_tensors_stay_inside_their_storage(tmp_path, size, stride, offset):
    storage = Storage(np.zeros(4, np.float32), "0")
    assert "storage" in refused(write_pth(tmp_path / "x.pth", {"a": as_tensor(storage, size, stride, offset)}, [storage]))
    inner = as_tensor(storage, (2, 2), (2, 1))
    assert refused(write_pth(tmp_path / "x.pth", {"a": Call(REBUILD, inner, 1, (3,), (1,))}, [storage]))


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
    assert "archive/data/0" in refused(write_pth(path, {"a": as_tensor(storage, (4,), (1,))}))  # its numbers are not there


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    whole = write_state(tmp_path / "x.pth", {"a": np.arange(20, dtype=np.float32), "b": np.ones((2, 3))}).read_bytes()
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
    Writer(buffer, protocol=2).dump({"model": {"a": as_tensor(storage, (4, 5), (5, 1))}, "args": arguments})
    rng = np.random.default_rng(1)
    for _ in range(1000):
        spoilt = bytearray(buffer.getvalue())
        spoilt[rng.integers(len(spoilt))] = rng.integers(256)
        path = write_pth(tmp_path / "x.pth", bytes(spoilt), [storage])
        with contextlib.suppress(UserError):
            assert all(array.size <= 20 for array in read_pth(path)[0].values())
