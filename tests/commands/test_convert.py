"""The command that turns weights of others into a model of ours."""

import json

import numpy as np
import pytest

import dsct_jax
from dsct_jax import __main__
from tests.inference.test_load import assert_golden, small_config
from tests.weights.test_tensor_files import write_state


def main(arguments):
    """`python -m dsct_jax convert` in this process."""
    return __main__.main(["convert", *arguments])


@pytest.fixture(scope="module")
def state(golden):
    arrays = golden("model_small")
    return {
        name.removeprefix("state/"): arrays[name] for name in arrays if name.startswith("state/")
    }


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    return tmp_path / "config.json"


def test_a_released_file_becomes_a_model_of_ours(state, config, golden, tmp_path, capsys):
    released = write_state(tmp_path / "x.pth", state)
    assert main([f"--input={released}", f"--output={tmp_path / 'a'}", f"--config={config}"]) == 0
    assert "unknown: none" in capsys.readouterr().out
    assert_golden(dsct_jax.load(tmp_path / "a" / "model.safetensors"), golden)
    # Again from our own file, which brings its configuration: the same bytes.
    assert (
        main([f"--input={tmp_path / 'a' / 'model.safetensors'}", f"--output={tmp_path / 'b'}"]) == 0
    )
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (
        tmp_path / "a" / "model.safetensors"
    ).read_bytes()
    assert "a model of ours" in (tmp_path / "b" / "report.txt").read_text()


def test_a_backbone_is_the_start_of_a_model(state, config, tmp_path, capsys):
    prefix = "backbone.0.body."
    source = write_state(
        tmp_path / "resnet.pth",
        {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        },
    )
    assert main([f"--input={source}", f"--output={tmp_path / 'a'}", f"--config={config}"]) == 0
    model = dsct_jax.load(tmp_path / "a" / "model.safetensors")
    np.testing.assert_array_equal(
        model.params["backbone/stem/conv/kernel"],
        state[f"{prefix}conv1.weight"].transpose(2, 3, 1, 0),
    )
    fresh, _ = model.functions.init(small_config()["seed"])
    np.testing.assert_array_equal(model.params["subject_queries"], fresh["subject_queries"])


def test_mistakes_are_one_line_and_nothing_is_written(state, config, tmp_path, capsys):
    released = write_state(
        tmp_path / "x.pth",
        {name: value for name, value in state.items() if name != "query_embed.weight"},
    )
    output = f"--output={tmp_path / 'a'}"
    assert main([f"--input={released}", output]) == 2
    assert "give --config" in capsys.readouterr().err
    assert main([f"--input={released}", output, f"--config={config}"]) == 2
    assert "context_queries is missing" in capsys.readouterr().err
    assert main([f"--input={tmp_path / 'nowhere.pth'}", output, f"--config={config}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "a").exists()
    assert (
        main([f"--input={released}", f"--output={released}", f"--config={config}", "--lenient"])
        == 2
    )
    assert "cannot be written" in capsys.readouterr().err
    assert main([f"--input={released}", output, f"--config={config}", "--lenient"]) == 0
    assert "unknown: context_queries is missing" in capsys.readouterr().out
