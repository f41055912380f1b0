"""A model that was compiled once predicts in later processes without being traced again."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dsct_jax
from dsct_jax.errors import UserError
from dsct_jax.inference import programs
from dsct_jax.weights.tensor_files import read_safetensors, write_safetensors
from tests.inference.test_load import pth, released, small_config  # noqa: F401

ROOT = Path(__file__).parents[2]
INPUTS = np.ones((1, 64, 96, 3), np.float32), np.zeros((1, 64, 96), bool)


@pytest.fixture(scope="module")
def kept(released, tmp_path_factory):  # noqa: F811
    """(file of weights, cache, answer of the process that compiled)."""
    folder = tmp_path_factory.mktemp("programs")
    released.save(folder / "model.safetensors")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    try:
        out = dsct_jax.load(folder / "model.safetensors")(*INPUTS)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    return folder / "model.safetensors", folder / "cache", out


@pytest.fixture
def cache(kept, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(kept[1]))
    yield kept[1]
    jax.config.update("jax_compilation_cache_dir", before)


SECOND = """
import sys
import numpy as np
sys.modules["flax"] = None  # whoever imports it fails
import dsct_jax
out = dsct_jax.load(sys.argv[1])(np.ones((1, 64, 96, 3), "f"), np.zeros((1, 64, 96), bool))
np.savez(sys.argv[2], logits=out.logits, boxes=out.boxes)
"""


def test_a_second_process_needs_no_network(kept, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    answer = tmp_path / "answer.npz"
    command = [sys.executable, "-c", SECOND, str(kept[0]), str(answer)]
    subprocess.run(command, cwd=ROOT, check=True)
    with np.load(answer) as found:
        np.testing.assert_array_equal(found["logits"], kept[2].logits)
        np.testing.assert_array_equal(found["boxes"], kept[2].boxes)


def test_a_damaged_program_is_made_again(kept, cache):
    (file,) = (cache / "programs").glob("*/*")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    model = dsct_jax.load(kept[0])
    assert model.programs.known
    np.testing.assert_array_equal(model(*INPUTS).logits, kept[2].logits)
    assert len(file.read_bytes()) > 1000


def test_other_code_other_weights_and_other_settings_have_other_programs(
    kept, cache, tmp_path, monkeypatch
):
    arrays, texts = read_safetensors(kept[0])
    name = next(name for name in arrays if name.endswith("bias"))
    write_safetensors(tmp_path / "x.safetensors", arrays | {name: arrays[name][:-1]}, texts)
    with pytest.raises(UserError, match="weights of another model"):
        dsct_jax.load(tmp_path / "x.safetensors")
    assert not dsct_jax.load(kept[0], small_config(dropout=0.5)).programs.known
    monkeypatch.setattr(programs, "_sources", lambda: ["changed"])
    assert not dsct_jax.load(kept[0]).programs.known


def test_what_jax_has_cached_is_not_stored_from_there(kept, cache, monkeypatch):
    # as after an update of the code that compiles to the same program
    monkeypatch.setattr(programs, "_sources", lambda: ["updated"])
    for _ in range(2):
        model = dsct_jax.load(kept[0])
        np.testing.assert_array_equal(model(*INPUTS).logits, kept[2].logits)
    assert model.programs.known
    assert len(list((cache / "programs").glob("*/*"))) == 2


def test_without_a_cache_nothing_is_kept(kept, cache):
    jax.config.update("jax_compilation_cache_dir", None)
    model = dsct_jax.load(kept[0])
    np.testing.assert_array_equal(model(*INPUTS).logits, kept[2].logits)
    assert not model.programs.known
