"""Checkpoints: exact there and back, on any number of devices, and what remains readable when files
are unfinished, half removed or damaged.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsct_jax.errors import UserError
from dsct_jax.parallel import FSDP, make_mesh, replicate, state_sharding
from dsct_jax.training import checkpoint
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.step import TrainState
from dsct_jax.weights.run_directory import best_step, load_weights, parse_run_path

ROOT = Path(__file__).parents[2]
METADATA = {
    "config": {
        "class_names": ("a", "b"),
        "multi_label": False,
        "model": {"hidden_dim": 8, "fusion": "paper"},
        "train": {"epochs": 2},
    }
}
OPTIMIZER = optax.adamw(1e-3)


def state_at(step: int, *, devices: int = 1, width: int = 3) -> TrainState:
    """A state whose every number depends on `step`."""
    rng = np.random.default_rng(step)
    params = {
        "a/0/kernel": jnp.float32(rng.standard_normal((5, width))),
        "a.b/bias": jnp.float32(rng.standard_normal(20000)),
    }
    opt_state = jax.tree.map(lambda x: x + step, OPTIMIZER.init(params))
    state = TrainState(
        jnp.int32(step),
        params,
        {"fixed/scale": jnp.float32([step, 2])},
        {"mean": jnp.ones(4)},
        opt_state,
    )
    return replicate(state, make_mesh(jax.devices()[:devices]))


def equal(one: Any, other: Any) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other))
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir, metadata=METADATA)
    assert checkpoints.latest_step() is None
    for step in (1, 2):
        checkpoints.save(state_at(step))
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restored(workdir: Path, like: TrainState, **config: Any) -> TrainState:
    checkpoints = Checkpoints(workdir, metadata={"config": METADATA["config"] | config})
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


@pytest.mark.parametrize("devices", [1, 8])
def test_the_newest_state_comes_back_exactly(saved, devices):
    like = state_at(0, devices=devices)
    state = restored(saved, like)
    assert equal(state, state_at(2))
    assert all(
        leaf.sharding == other.sharding
        for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True)
    )


def test_from_eight_devices_to_one_to_two(tmp_path):
    for number, devices in enumerate((8, 1, 2)):
        checkpoints = Checkpoints(tmp_path, metadata=METADATA)
        before = checkpoints.restore_newest(state_at(0, devices=devices))
        state = state_at(1, devices=devices) if before is None else before[0]
        assert equal(state, dataclasses.replace(state_at(1), step=jnp.int32(max(number, 1))))
        checkpoints.save(dataclasses.replace(state, step=state.step + 1) if number else state)
        checkpoints.close()


def test_arrays_that_are_spread_over_devices_stay_so_and_others_are_few(tmp_path):
    mesh = make_mesh(jax.devices()[:8])
    spread = jax.device_put(state_at(1, devices=8), state_sharding(state_at(1), mesh, rules=FSDP))
    assert not spread.params["a.b/bias"].is_fully_replicated
    for number, like in enumerate(
        (spread, state_at(0), spread, state_at(0, devices=2))
    ):  # whole -> whole is tested above
        checkpoints = Checkpoints(tmp_path, metadata=METADATA)
        state = checkpoints.restore(like) if number else spread
        assert equal(state, dataclasses.replace(state_at(1), step=jnp.int32(max(number, 1))))
        assert all(
            leaf.sharding == other.sharding
            for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True)
        )
        checkpoints.save(dataclasses.replace(state, step=jnp.int32(number + 1)))
        checkpoints.close()
    arrays = [
        json.loads((tmp_path / f"checkpoints/{step}/training/_METADATA").read_text())[
            "tree_metadata"
        ]
        for step in (3, 4)
    ]
    expected = {
        "packed.step.int32",
        "packed.skipped.int32",
        "packed.skipped_total.int32",
        "packed.opt_state.float32",
        "packed.opt_state.int32",
    }
    assert {name.strip("(',)") for name in arrays[1]} == expected
    assert len(arrays[0]) == len(expected) + 2  # both moments of the spread array


def test_checkpoints_from_before_arrays_were_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "pack", lambda values: (values, {}))
    checkpoints = Checkpoints(tmp_path, metadata=METADATA)
    checkpoints.save(state_at(1))
    checkpoints.close()
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "layout")
    assert equal(restored(tmp_path, state_at(0)), state_at(1))
    assert load_weights(tmp_path)[0]["fixed/scale"][0] == 1


def test_the_weights_alone(saved):
    params, norm_stats, metadata, step = load_weights(saved)
    assert step == 2
    expected = state_at(2)
    assert params.keys() == {"a/0/kernel", "a/b/bias", "fixed/scale"}
    np.testing.assert_array_equal(params["a/0/kernel"], expected.params["a/0/kernel"])
    np.testing.assert_array_equal(norm_stats["mean"], np.ones(4))
    assert metadata["config"]["model"] == {"hidden_dim": 8, "fusion": "paper"}


def test_the_weights_of_a_chosen_step(saved):
    assert load_weights(saved, 1)[0]["fixed/scale"][0] == 1
    assert load_weights(*parse_run_path(saved / "checkpoints" / "1"))[0]["fixed/scale"][0] == 1
    assert [parse_run_path(path) for path in (saved, saved / "checkpoints")] == [(saved, None)] * 2
    with pytest.raises(UserError, match=r"holds no checkpoint of step 7; there are 1, 2"):
        load_weights(saved, 7)


def test_the_step_of_the_best_validation(tmp_path, saved):
    checkpoints = Checkpoints(tmp_path, keep=1, metadata=METADATA)
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), progress={"best_step": min(step, 2)})
    checkpoints.close()
    assert best_step(tmp_path) == 2
    assert load_weights(tmp_path, best_step(tmp_path))[0]["fixed/scale"][0] == 2
    with pytest.raises(UserError, match="no checkpoint has a validation, so none is the best"):
        best_step(saved)


def test_a_step_is_saved_once_and_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, metadata=METADATA)
    for step in (1, 2, 3, 3):
        checkpoints.save(state_at(step))
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_reading_creates_and_removes_nothing(workdir, tmp_path):
    unfinished = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "model").write_text("half")
    assert load_weights(workdir)[0]["fixed/scale"][0] == 2
    assert unfinished.exists()
    with pytest.raises(UserError, match="no checkpoints/ here"):
        load_weights(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_an_unfinished_checkpoint_is_never_the_newest(workdir):
    unfinished = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "2", unfinished)
    assert equal(restored(workdir, state_at(0)), state_at(2))
    end = time.monotonic() + 20
    while (
        unfinished.exists() and time.monotonic() < end
    ):  # the run that continues tidies up, in the background
        time.sleep(0.05)
    assert not unfinished.exists()


def test_a_kill_while_an_old_checkpoint_is_removed(workdir):
    shutil.rmtree(workdir / "checkpoints" / "1" / "model")
    (workdir / "checkpoints" / "1" / "_CHECKPOINT_METADATA").unlink()
    assert equal(restored(workdir, state_at(0)), state_at(2))


@pytest.fixture
def unfinished_reads(monkeypatch):
    """Reads still under way when orbax gives up have nobody to tell (dsct_jax/runtime.py); pytest
    would take that for a failure.
    """
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


@pytest.mark.usefixtures("unfinished_reads")
@pytest.mark.parametrize(
    "place",
    [
        "model/ocdbt.process_0/d/*",
        "model/d/*",
        "model/_METADATA",
        "model/manifest.ocdbt",
        "metadata/metadata",
        "layout/metadata",
    ],
)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken(workdir, place, caplog):
    for path in damaged(workdir / "checkpoints" / "2", place):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = load_weights(workdir)  # a reader moves nothing
    assert found.params["fixed/scale"][0] == found.step == 1
    assert len(told(caplog)) == 1 and told(caplog)[0].startswith("checkpoint 2 is damaged (")
    caplog.clear()
    checkpoints = Checkpoints(workdir, metadata=METADATA)
    state, metadata = checkpoints.restore_newest(state_at(0))
    assert equal(state, state_at(1))
    assert metadata["config"]["model"]["hidden_dim"] == 8
    (line,) = told(caplog)
    assert (
        line.startswith("checkpoint 2 is damaged (")
        and line.endswith("the one before is taken")
        and "\n" not in line
    )
    checkpoints.save(state_at(2))  # the run comes by again
    checkpoints.close()
    assert equal(restored(workdir, state_at(0)), state_at(2))
    assert (workdir / "damaged_checkpoints" / "2").is_dir()


def told(caplog) -> list[str]:
    """Our own lines, without orbax's."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("dsct_jax")]


def damaged(checkpoint: Path, place: str) -> list[Path]:
    files = [path for path in checkpoint.glob(place) if path.is_file()]
    assert files
    return files


def test_what_a_validation_fitted_stays_with_its_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, metadata=METADATA)
    checkpoints.save(state_at(1), decoder={"temperature": 1.5})
    checkpoints.save(state_at(2))
    checkpoints.close()
    assert load_weights(tmp_path, 1).metadata["decoder"] == {"temperature": 1.5}
    assert "decoder" not in load_weights(tmp_path).metadata


@pytest.mark.usefixtures("unfinished_reads")
def test_when_every_checkpoint_is_damaged(workdir):
    for path in damaged(workdir / "checkpoints", "*/metadata/metadata"):
        path.write_text("{")
    for read in (
        lambda: Checkpoints(workdir, metadata=METADATA).restore_newest(state_at(0)),
        lambda: load_weights(workdir),
    ):
        with pytest.raises(UserError, match=r"checkpoints/1: this checkpoint is damaged"):
            read()


def test_the_best_checkpoint_is_kept_however_old(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, metadata=METADATA)
    for step in range(1, 6):
        checkpoints.save(state_at(step), progress={"best_step": 2})
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
    checkpoints = Checkpoints(tmp_path, keep=2, metadata=METADATA)  # a run that continues remembers
    _, metadata = checkpoints.restore_newest(state_at(0))
    checkpoints.save(state_at(6), progress=metadata["progress"])
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5", "6"]


def test_a_full_disk_while_saving_loses_nothing(workdir):
    """In a process of its own, which may write no file larger than 20 kB: the error of a full disk,
    in the middle of the array.
    """
    script = f"""
import resource, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from test_checkpoint import Checkpoints, METADATA, Path, state_at
from dsct_jax.errors import UserError
checkpoints = Checkpoints(Path({str(workdir)!r}), metadata=METADATA)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
    checkpoints.save(state_at(3))
    checkpoints.wait()
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "a checkpoint could not be written (" in done.stdout and "make room" in done.stdout, (
        done.stdout + done.stderr
    )
    assert done.stdout.count("\n") == 1
    assert equal(restored(workdir, state_at(0)), state_at(2))


def test_a_checkpoint_of_another_model(saved):
    with pytest.raises(UserError, match=r"config.model.fusion: 'paper' -> 'released'"):
        restored(saved, state_at(0), model={"hidden_dim": 8, "fusion": "released"})
    with pytest.raises(UserError, match=r"config.class_names: \('a', 'b'\) -> \('a', 'c'\)"):
        restored(saved, state_at(0), class_names=("a", "c"))
    with pytest.raises(
        UserError, match=r"weights of another model \(params.a.0.kernel and 0 more differ\)"
    ):
        restored(saved, state_at(0, width=4))
    # a longer run is the same model
    assert int(restored(saved, state_at(0), train={"epochs": 9}).step) == 2


def test_a_checkpoint_of_another_optimizer_still_has_weights_to_start_from(saved):
    like = dataclasses.replace(state_at(0), opt_state={"momentum": jnp.ones(3)})
    with pytest.raises(UserError, match=r"of an older version .*config\.init_from") as error:
        restored(saved, like)
    assert "opt_state" in str(error.value) and "\n" not in str(error.value)
