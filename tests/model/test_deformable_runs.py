"""The deformable networks of the DETR family as runs: two epochs of the built-in scenes, what is
left behind, exports, and one device against eight.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dsct_jax
import train
from configs import base, debug
from dsct_jax.__main__ import main
from dsct_jax.batch import Batch, Targets
from dsct_jax.model.build import Network, network_config
from dsct_jax.model.layers import DropoutNoise
from dsct_jax.parallel import make_mesh, shard_batch
from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig
from dsct_jax.training.objective import SetPrediction
from dsct_jax.training.step import initial_state, make_train_step
from dsct_jax.weights.run_directory import load_weights

MORE = {
    "h_deformable": {
        "box_refinement": True,
        "two_stage": True,
        "mixed_selection": True,
        "look_forward_twice": True,
        "num_one_to_many": 6,
        "one_to_many_repeats": 2,
    },
    "dino": {"num_denoising": 50},
    "dsct_dino": {
        "num_denoising": 50,
        "num_context_queries": 6,
        "num_spatial_neighbors": 3,
        "num_semantic_neighbors": 2,
        "roi_size": 4,
    },
}
NETWORKS = {
    "h_deformable": "deformable_detr",
    "dab_deformable_detr": "dab_deformable_detr",
    "dino": "dino",
    "dsct_dino": "dsct_dino",
    "deta": "deta",
}
SMALL = {
    "backbone": "tiny",
    "norm": "group",
    "hidden_dim": 32,
    "num_heads": 2,
    "num_points": 2,
    "feedforward_dim": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_queries": 8,
}


def configuration(name: str):
    config = debug.get_config()
    base.use_network(config, NETWORKS[name])
    config.model.update(SMALL | MORE.get(name, {}))
    config.train.update(batch_size=8, eval_batch_size=8, epochs=2)
    config.data.update(train="8", val="8", test="8")
    return config


@pytest.fixture(scope="module", params=NETWORKS)
def workdir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    file = folder / "config.json"
    file.write_text(configuration(request.param).to_json())
    assert train.main([f"--config={file}", f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


def test_it_trains(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    totals = [line["train/total"] for line in lines if "train/total" in line]
    assert len(totals) == 2 and np.isfinite(totals).all()
    before, _ = Network(dsct_jax.load(workdir).functions.config).init(0)
    after = load_weights(workdir).params
    # Frozen by rule; and DETA's fifth level, here one cell with one channel per group, of which a
    # group norm leaves nothing but its bias.
    frozen = ("backbone/stem", "backbone/layer1", "input_proj/4/conv", "input_proj/4/norm/scale")
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {path for path in before.keys() - moved if not path.startswith(frozen)} == set()


def test_it_predicts_and_is_exported(workdir, tmp_path, capsys):
    model = dsct_jax.load(workdir)
    (people,) = dsct_jax.predict(model, [Image.new("RGB", (80, 60))], min_confidence=0.0)
    assert people
    for form, more in (("stablehlo", ["--sizes=64x64"]), ("safetensors", [])):
        output = tmp_path / form
        arguments = [f"--checkpoint={workdir}", f"--output={output}", f"--format={form}", *more]
        assert main(["export", *arguments]) == 0
        assert "written" in capsys.readouterr().out


def batch_of(size: int, classes: int) -> Batch:
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0.2, 0.6, (size, 3, 4)).astype(np.float32)
    labels = np.eye(classes, dtype=np.float32)[rng.integers(classes, size=(size, 3))]
    valid = np.arange(3) < rng.integers(1, 4, (size, 1))
    return Batch(
        images=rng.normal(size=(size, 64, 80, 3)).astype(np.float32),
        sizes=np.tile(np.array([[60, 72]], np.int32), (size, 1)),
        targets=Targets(boxes, labels * valid[..., None], valid),
        image_ids=np.arange(size),
        original_sizes=np.full((size, 2), 64),
        real=np.ones(size, bool),
    )


def test_subjects_of_dsct_dino_are_told_nothing_by_denoising():
    """The same answer with and without noisy people, whose own does depend on the context."""
    network = Network(network_config(dict(configuration("dsct_dino").model) | {"dropout": 0.0}, 4))
    params, norm_stats = network.init(0)
    batch = batch_of(2, 4)
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def run(params, people):
        return network.bind(params, norm_stats)(
            *network.inputs(shard_batch(batch, make_mesh(jax.devices()[:1]))),
            people=people,
            noise=DropoutNoise(keys),
        )

    people = jax.tree.map(jnp.asarray, batch.targets)
    with_noise, without = run(params, people), run(params, None)
    assert [one.name for one in with_noise.branches] == ["encoder", "denoising"]
    np.testing.assert_allclose(with_noise.logits, without.logits, atol=1e-5)
    np.testing.assert_allclose(with_noise.boxes, without.boxes, atol=1e-5)
    moved = params | {"context_queries": params["context_queries"] + 1}
    other = run(moved, people)
    for one, two in ((with_noise, other), (with_noise.branches[1], other.branches[1])):
        assert np.abs(one.logits - two.logits).max() > 1e-3


@pytest.mark.parametrize("name", ["h_deformable", "dino"])
def test_eight_devices_are_one(name):
    network = Network(network_config(dict(configuration(name).model) | {"num_levels": 3}, 4))
    params, norm_stats = network.init(0)
    objective = SetPrediction(LossConfig(), MatcherConfig(), multi_label=False)
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh(devices)
        optimizer, state = initial_state(
            params, norm_stats, OptimizerConfig(), total_steps=10, mesh=mesh
        )
        step = make_train_step(network, optimizer, objective=objective, mesh=mesh, seed=0)
        _, metrics = step(state, shard_batch(batch_of(8, 4), mesh))
        found.append(jax.device_get(metrics))
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        if key.startswith(("loss", "total", "encoder", "denoising", "one_to_many", "grad_norm")):
            np.testing.assert_allclose(found[1][key], value, rtol=2e-5, err_msg=key)
