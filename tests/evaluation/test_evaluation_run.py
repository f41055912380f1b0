"""Evaluating a checkpoint through train.py: what it leaves behind, thresholds from validation to
prediction, and several processes.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dsct_jax
import train
from dsct_jax.__main__ import main as command
from dsct_jax.config import read_config, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import read_fit, save_fit
from dsct_jax.evaluation.results import read_results
from dsct_jax.model.build import Network
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.step import initial_state
from dsct_jax.weights.run_directory import best_step, load_weights

ROOT = Path(__file__).parents[2]
IMAGES = 5  # with batches of 2: the last one is filled up


def small_config():
    config = read_config(ROOT / "configs" / "debug.py")
    config["multi_label"] = True
    config["data"] |= {"val": "4", "test": str(IMAGES)}
    return to_builtins(config)


@pytest.fixture(scope="module")
def one_device():
    mesh = train.make_mesh(jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda: mesh)
        yield mesh


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, one_device):
    """An untrained checkpoint, evaluated on val and then on test."""
    workdir, config = tmp_path_factory.mktemp("run"), small_config()
    save(workdir, config, one_device)
    run = train.RunConfig.from_mapping(config)
    train.evaluate_checkpoint(run, workdir, "val")
    train.evaluate_checkpoint(run, workdir, "test")
    return workdir


def save(workdir, config, mesh):
    run = train.RunConfig.from_mapping(config)
    _, state = initial_state(
        *Network(run.model).init(run.seed), run.optimizer, total_steps=1, mesh=mesh
    )
    checkpoints = Checkpoints(workdir, metadata={"config": config, "versions": {}})
    checkpoints.save(state)
    checkpoints.close()


def test_what_an_evaluation_leaves_behind(workdir):
    names = {path.name for path in workdir.iterdir()}
    kinds = (
        "metrics_{}.json",
        "metrics_{}.md",
        "metrics_{}.png",
        "predictions_{}.npz",
        "predictions_{}.png",
    )
    assert names == {"checkpoints", "thresholds.json"} | {
        kind.format(split) for kind in kinds for split in ("val", "test")
    }
    val, test = (
        json.loads((workdir / f"metrics_{split}.json").read_text()) for split in ("val", "test")
    )
    assert (val["num_images"], test["num_images"]) == (4, IMAGES)
    assert (test["split"], test["protocol"], test["checkpoint"]) == ("test", "custom", "step 0")
    assert "macro_f1_fitted" in test
    assert "macro_f1_fitted" not in val  # fitted there: it would say nothing
    assert len(read_results(workdir / "predictions_test.npz").image_ids) == IMAGES


def test_a_chosen_checkpoint(workdir, tmp_path, one_device):
    config = small_config()
    save(tmp_path, config, one_device)
    checkpoints = Checkpoints(tmp_path, metadata={"config": config, "versions": {}})
    params, norm_stats, *_ = load_weights(tmp_path)
    run = train.RunConfig.from_mapping(config)
    _, state = initial_state(
        {name: value * 0 for name, value in params.items()},
        norm_stats,
        run.optimizer,
        total_steps=1,
        mesh=one_device,
    )
    checkpoints.save(dataclasses.replace(state, step=state.step + 5), progress={"best_step": 0})
    checkpoints.close()
    chosen = train.evaluate_checkpoint(run, tmp_path, "test", step=best_step(tmp_path))
    expected = json.loads((workdir / "metrics_test.json").read_text())
    assert (
        chosen["checkpoint"] == "step 0"
        and chosen["mAP"] == expected["mAP"]
        and chosen["mean_iou"] == expected["mean_iou"]
    )
    assert train.evaluate_checkpoint(run, tmp_path, "test")["checkpoint"] == "step 5"


def test_the_numbers_come_again_from_the_file_alone(workdir, tmp_path):
    assert command(["evaluate", str(workdir / "predictions_test.npz"), f"--output={tmp_path}"]) == 0
    assert json.loads((tmp_path / "metrics_test.json").read_text()) == json.loads(
        (workdir / "metrics_test.json").read_text()
    )


def test_a_loaded_model_decides_with_the_fitted_thresholds(workdir, tmp_path):
    unfitted = train.RunConfig.from_mapping(small_config()).decoder
    fitted, checkpoint = read_fit(workdir / "thresholds.json", unfitted)
    assert (fitted.fitted_on, checkpoint) == ("val", "step 0")
    model = dsct_jax.load(workdir)
    assert model.decoder == fitted
    assert read_results(workdir / "predictions_test.npz").about.decoder == fitted
    model.save(tmp_path / "model.safetensors")
    again = dsct_jax.load(tmp_path / "model.safetensors")
    assert again.decoder == fitted
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    ours = dsct_jax.predict(again, [image], min_confidence=0.0, nms=1.0)[0]
    assert len(ours) == 4
    for subject in ours:
        assert set(subject.labels) == {
            name
            for name, cut in zip(model.class_names, fitted.thresholds, strict=True)
            if subject.probabilities[name] > cut
        }


def test_thresholds_of_other_weights_are_not_used(workdir, tmp_path, one_device, caplog):
    save(tmp_path, small_config(), one_device)
    unfitted = dsct_jax.load(tmp_path).decoder
    assert unfitted.thresholds is None
    fitted = dataclasses.replace(unfitted, thresholds=(0.5,) * 4, fitted_on="val")
    save_fit(fitted, tmp_path / "thresholds.json", checkpoint="step 700")
    with caplog.at_level("WARNING"):
        assert dsct_jax.load(tmp_path).decoder == unfitted
    assert "fitted for step 700, not for step 0" in caplog.text
    (tmp_path / "thresholds.json").write_text("{")
    with pytest.raises(UserError, match=r"thresholds\.json: not a stored fit"):
        dsct_jax.load(tmp_path)


PROCESS = """
import json, sys
from pathlib import Path
import jax
number, port, workdir = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, number)
import train
from dsct_jax.config import to_builtins
config = json.loads((workdir / "config.json").read_text())
run = train.RunConfig.from_mapping(to_builtins(config))
metrics = train.evaluate_checkpoint(run, workdir, "test")
(workdir / f"process{number}.json").write_text(json.dumps(metrics))
"""


def test_two_processes_count_every_image_once(workdir, tmp_path, one_device):
    config = small_config()
    save(tmp_path, config, one_device)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "thresholds.json").write_text((workdir / "thresholds.json").read_text())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        # of two flags, the last counts
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    }
    commands = [
        [sys.executable, "-c", PROCESS, str(number), str(port), str(tmp_path)]
        for number in range(2)
    ]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (
        json.loads((tmp_path / f"process{number}.json").read_text()) for number in range(2)
    )
    assert first == second
    alone = json.loads((workdir / "metrics_test.json").read_text())
    assert first["num_images"] == IMAGES
    assert first.keys() == alone.keys()
    np.testing.assert_allclose(
        [first["mAP"], first["mean_iou"]], [alone["mAP"], alone["mean_iou"]], rtol=1e-5
    )
    assert sum("numbers:" in output for output in outputs) == 1
