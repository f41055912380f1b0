"""Loading a model from a released .pth, a .safetensors file and a run directory: the same answers,
and one line for what cannot be loaded.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsct_jax
from configs import base
from dsct_jax.config import to_builtins
from dsct_jax.errors import UserError
from dsct_jax.parallel import make_mesh, replicate
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.step import TrainState
from dsct_jax.weights.tensor_files import write_safetensors
from tests.weights.test_tensor_files import Call, Global, write_pth, write_state

ROOT = Path(__file__).parents[2]


def small_config(**model: Any) -> dict[str, Any]:
    """The configuration of tests/golden/model_small.npz."""
    config = base.get_config()
    config.model.update(
        json.loads((Path(__file__).parents[1] / "golden" / "model_small.json").read_text())
    )
    config.model.update(model)
    return to_builtins(config)


@pytest.fixture(scope="module")
def pth(golden, tmp_path_factory):
    arrays = golden("model_small")
    state = {
        name.removeprefix("state/"): arrays[name] for name in arrays if name.startswith("state/")
    }
    return write_state(tmp_path_factory.mktemp("released") / "checkpoint.pth", state)


@pytest.fixture(scope="module")
def released(pth):
    return dsct_jax.load(pth, small_config())


def assert_golden(model, golden) -> None:
    arrays = golden("model_small")
    out = model(arrays["batch"].transpose(0, 2, 3, 1), arrays["mask"])
    np.testing.assert_allclose(out.logits, arrays["all_logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(out.boxes, arrays["all_boxes"], rtol=0, atol=2e-6)


def test_a_released_file_gives_the_released_numbers(released, golden):
    assert_golden(released, golden)
    assert released.class_names == base.EMOTIC_CLASSES
    assert released.multi_label is True
    assert released.preprocessing.short_side == 800


def test_through_safetensors(released, golden, tmp_path):
    released.save(tmp_path / "x.safetensors")
    model = dsct_jax.load(tmp_path / "x.safetensors")
    assert model.config == released.config
    assert_golden(model, golden)
    same = dsct_jax.load(str(tmp_path / "x.safetensors"), small_config(dropout=0.5))
    assert same.functions.config.dropout == 0.5  # the same model, trained otherwise


def test_a_configuration_of_another_model_with_the_same_shapes(released, tmp_path):
    """Which context queries are selected, and how they are fused, no shape tells."""
    released.save(tmp_path / "x.safetensors")
    for field, value in (("semantic_selection", "smallest"), ("fusion", "released")):
        given = small_config(**{field: value})
        if given["model"] != released.config["model"]:
            assert f"config.model.{field}" in refused(tmp_path / "x.safetensors", given)


def test_the_fit_travels_with_the_file(released, pth, tmp_path):
    fitted = dataclasses.replace(released.decoder, thresholds=(0.25,) * 26, fitted_on="val")
    released.decoder, plain = fitted, released.decoder
    try:
        released.save(tmp_path / "x.safetensors")
    finally:
        released.decoder = plain
    assert dsct_jax.load(tmp_path / "x.safetensors").decoder == fitted
    older = {"class_names": plain.class_names, "temperature": 1.0, "thresholds": (0.25,) * 26}
    older |= {"split": "val", "people": 0, "checkpoint": "step 3", "min_confidence": None}
    texts = {"config": json.dumps(released.config), "calibration": json.dumps(older)}
    write_safetensors(tmp_path / "older.safetensors", released.arrays(), texts)
    assert dsct_jax.load(tmp_path / "older.safetensors").decoder == fitted


def test_a_run_directory(released, tmp_path, caplog):
    config = small_config()
    mesh = make_mesh(jax.devices()[:1])
    frozen_params = {
        name: value for name, value in released.params.items() if name.startswith("backbone/stem")
    }
    trained = {name: value for name, value in released.params.items() if name not in frozen_params}
    state = replicate(
        TrainState(
            jnp.int32(3), trained, frozen_params, released.norm_stats, {"count": jnp.int32(3)}
        ),
        mesh,
    )
    checkpoints = Checkpoints(tmp_path / "run", metadata={"config": config})
    checkpoints.save(state)
    checkpoints.close()
    caplog.clear()
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        model = dsct_jax.load(path)
        assert model.config == config
        assert [record for record in caplog.records if record.levelname == "WARNING"] == []
        for ours, expected in (
            (model.params, released.params),
            (model.norm_stats, released.norm_stats),
        ):
            assert ours.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(ours[name], value)


def refused(path: Path, config: Any = None) -> str:
    with pytest.raises(UserError) as error:
        dsct_jax.load(path, config)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_a_pth_with_the_configuration_of_another_model(pth):
    assert "which variant" in refused(pth)
    line = refused(pth, small_config(num_decoder_layers=3))
    assert "decoder/2/" in line
    assert "is missing" in line
    line = refused(pth, small_config(hidden_dim=128))
    assert "has shape (64,) where the model has (128,)" in line
    assert "config.model.fusion='relased'" in refused(pth, small_config(fusion="relased"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: config.pop("model"), "config.model: missing"),
        (lambda config: config.pop("class_names"), "config.class_names: missing"),
        (lambda config: config.pop("multi_label"), "config.multi_label: missing"),
        (lambda config: config["data"].pop("buckets"), "config.data.buckets: missing"),
        (
            lambda config: config["model"].update(hiden_dim=3),
            "did you mean config.model.hidden_dim?",
        ),
        (lambda config: config["model"].update(hidden_dim="64"), "config.model.hidden_dim='64'"),
    ],
)
def test_a_configuration_that_is_not_complete(pth, change, says):
    config = small_config()
    change(config)
    assert says in refused(pth, config)


def test_files_that_cannot_be_loaded(released, tmp_path):
    assert "no such file" in refused(tmp_path / "nowhere")
    assert "no checkpoints/ here" in refused(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "no complete checkpoint" in refused(tmp_path)
    (tmp_path / "x.onnx").write_text("")
    assert "neither a run directory nor" in refused(tmp_path / "x.onnx")
    (tmp_path / "x.pth").write_text("no archive")
    assert "not a .pth file" in refused(tmp_path / "x.pth", small_config())
    evil = write_pth(
        tmp_path / "evil.pth", Call(Global("os", "system"), f"touch {tmp_path / 'executed'}")
    )
    assert "os.system" in refused(evil, small_config())
    assert not (tmp_path / "executed").exists()


def test_safetensors_that_cannot_be_loaded(released, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    released.save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "cut short" in refused(path)
    save_file({"a": np.ones(3)}, str(path))
    assert "no configuration" in refused(path)
    save_file(
        {"params/a": np.ones(3, np.float32)},
        str(path),
        metadata={"config": json.dumps(small_config())},
    )
    assert "another model" in refused(path)
    save_file({"a": np.ones(3)}, str(path), metadata={"config": "{"})
    assert "configuration in it is damaged" in refused(path)


# --- the package's own names ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        "",
        "import dsct_jax.inference.predict",
        "import dsct_jax.inference.load, dsct_jax.inference.predict",
        "from dsct_jax.commands.predict import run",
    ],
)
def test_load_and_predict_are_functions_whatever_was_imported_first(first):
    program = f"""
import dsct_jax
{first}
import types
assert type(dsct_jax.load) is type(dsct_jax.predict) is types.FunctionType
from dsct_jax import predict, load
assert predict is dsct_jax.predict and 'predict' in dir(dsct_jax)
assert dsct_jax.__version__ and dsct_jax.UserError.__name__ == 'UserError'
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_data_workers_load_no_model():
    program = "import sys, data.pipeline\n"
    program += "assert not {'flax', 'optax', 'dsct_jax.model'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
