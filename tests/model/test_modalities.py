"""Runs with frozen modalities: what is trained and what is not, where their values come from and
stay, and what is left of them in a checkpoint, an export, a plan.
"""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import dsct_jax
import train
from configs import base, debug
from dsct_jax.__main__ import main
from dsct_jax.model.build import Network, network_config
from dsct_jax.model.modalities import PREFIX
from dsct_jax.weights.modalities import LAYOUTS
from dsct_jax.weights.rules import to_torch
from dsct_jax.weights.run_directory import load_weights
from dsct_jax.weights.tensor_files import read_safetensors, write_safetensors


def section(network: str = "dsct", **more):
    """A small network with the two kinds of modality."""
    config = debug.get_config()
    if network != "dsct":
        base.use_network(config, network)
        config.model.update({"backbone": "tiny", "norm": "group", "hidden_dim": 32, "num_heads": 2})
    config.train.update(batch_size=8, eval_batch_size=8)  # one for each simulated device
    config.data.update(train="16", val="8", test="8")
    config.model.update({"modality_backbone": "tiny", "modalities": ("scene", "instance")} | more)
    return config


def values_of(config, seed: int = 0):
    return Network(network_config(config.model.to_dict(), 4)).init(seed)


def features(network, params, stats, images):
    return jax.jit(lambda *values: network.bind(*values[:2]).features(values[2]))(
        params, stats, images
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each kind with its published names, drawn from another seed than the run's."""
    folder = tmp_path_factory.mktemp("published")
    _, drawn = values_of(section(), seed=7)
    for name in ("scene", "instance"):
        own = {k: v for k, v in drawn.items() if k.startswith(f"{PREFIX}{name}/")}
        tensors = to_torch(own, layout=LAYOUTS[name])
        head = {"scene": "module.fc.weight", "instance": "roi_heads.mask_head.0.0.bias"}[name]
        write_safetensors(folder / f"{name}.safetensors", tensors | {head: np.zeros((2, 2))}, {})
    return folder


def command(files, name: str, *more: str) -> list[str]:
    weights = tuple(str(files / f"{one}.safetensors") for one in ("scene", "instance"))
    config = section(modality_weights=weights)
    config.train.epochs = 2
    (files / "config.json").write_text(config.to_json())
    return [f"--config={files / 'config.json'}", f"--workdir={files / name}", *more]


@pytest.fixture(scope="module")
def workdir(files):
    assert train.main(command(files, "run")) == 0
    return files / "run"


def test_they_stay_as_published_and_their_projections_learn(workdir):
    weights, (before, _) = load_weights(workdir), values_of(section())
    published = values_of(section(), seed=7)[1]
    frozen = {k: v for k, v in weights.norm_stats.items() if k.startswith(PREFIX)}
    assert len(frozen) > 100
    for name, value in frozen.items():
        wanted = published[name]
        if "instance/body" in name and name.endswith("scale"):
            wanted = wanted * np.sqrt(1 + 1e-5 / published[name.replace("scale", "var")])
        np.testing.assert_array_equal(value, wanted, err_msg=name)
    projections = [name for name in before if name.startswith("modality_proj/")]
    assert len(projections) == 2 * 4 * 4 and not any(name.startswith(PREFIX) for name in before)
    still = [name for name in projections if np.array_equal(before[name], weights.params[name])]
    assert not [name for name in still if "conv/kernel" in name and "/3/" not in name]


def test_a_checkpoint_names_them_and_holds_no_copy(workdir, files):
    (folder,) = (workdir / "checkpoints").glob("4")
    metadata = json.loads((folder / "metadata/metadata").read_text())
    scene = metadata["modalities"]["scene"]
    assert scene["file"] == str(files / "scene.safetensors") and len(scene["sha256"]) == 64
    layout = json.loads((folder / "layout/metadata").read_text())
    assert "modalities" not in json.dumps(layout) and "modality_proj" in json.dumps(layout)


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one(workdir, files):
    broken = command(files, "broken")
    assert train.main([*broken, "--config.train.epochs=1"]) == 0
    assert train.main(broken) == 0
    a, b = (load_weights(files / name) for name in ("run", "broken"))
    for one, other in ((a.params, b.params), (a.norm_stats, b.norm_stats)):
        assert {k: v.tobytes() for k, v in one.items()} == {
            k: v.tobytes() for k, v in other.items()
        }


def test_evaluated_predicted_exported(workdir, files, tmp_path, capsys):
    assert train.main(command(files, "run", "--mode=eval", "--split=test")) == 0
    model, image = dsct_jax.load(workdir), Image.new("RGB", (80, 60), (90, 20, 140))
    people = dsct_jax.predict(model, image, min_confidence=0.0)
    flags = [f"--checkpoint={workdir}", f"--output={tmp_path}"]
    assert main(["export", *flags, "--format=safetensors"]) == 0
    held = read_safetensors(tmp_path / "model.safetensors")[0]
    assert sum(name.startswith(f"frozen/{PREFIX}") for name in held) > 100
    again = dsct_jax.predict(
        dsct_jax.load(tmp_path / "model.safetensors"), image, min_confidence=0.0
    )
    assert people and [one.box for one in people] == [one.box for one in again]
    blind = dsct_jax.load(workdir)
    blind.norm_stats = {
        name: value * (not name.startswith(PREFIX)) for name, value in blind.norm_stats.items()
    }
    others = dsct_jax.predict(blind, image, min_confidence=0.0)
    assert [one.box for one in people] != [one.box for one in others]  # they are looked at


def test_a_missing_or_changed_file_is_one_line(workdir, files, tmp_path, capsys):
    scene, aside = files / "scene.safetensors", tmp_path / "aside"
    scene.rename(aside)
    try:
        arguments = command(files, "run", "--config.train.epochs=3")
        assert train.main(arguments) == 2
        missing = f"error: {scene}: no such file, which the scene modality needs"
        assert capsys.readouterr().err.startswith(missing)
        flags = [str(aside), f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}"]
        assert main(["predict", *flags]) == 2
        assert capsys.readouterr().err.startswith(missing)
        tensors = read_safetensors(aside)[0]
        tensors["module.conv1.weight"] += 1
        write_safetensors(scene, tensors, {})
        assert train.main(arguments) == 2
        changed = f"{scene}: not the scene network that the checkpoint was trained with"
        assert changed in capsys.readouterr().err
    finally:
        aside.rename(scene)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({}, "modality_weights names 0 files: name a file for each of scene, instance"),
        ({"modality_weights": ("nothing.pth", "random")}, "nothing.pth: no such file"),
        ({"modalities": ("smell",)}, "must be one of scene, semantic, instance"),
        ({"modalities": ("scene", "scene")}, "must be one of scene, semantic, instance"),
    ],
)
def test_no_training_without_their_weights(tmp_path, capsys, model, says):
    (tmp_path / "config.json").write_text(section(**model).to_json())
    flags = [f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}"]
    assert train.main(flags) == 2
    assert says in capsys.readouterr().err


def test_a_file_of_another_kind_is_named(files, tmp_path, capsys):
    swapped = tuple(str(files / f"{one}.safetensors") for one in ("instance", "scene"))
    (tmp_path / "config.json").write_text(section(modality_weights=swapped).to_json())
    flags = [f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}"]
    assert train.main(flags) == 2
    assert "as ResNet of Places365" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("network", "fusion"), [("dsct", "sum"), ("dino", "sum"), ("deformable_detr", "concat")]
)
def test_every_network_of_several_levels(network, fusion):
    """Without modalities the parameters are as they were; with them at scale 0 so is the answer."""
    plain = section(network, modalities=())
    config = section(network, modality_fusion=fusion, modality_scale=0.0, num_levels=5)
    before, (params, stats) = values_of(plain), values_of(config)
    assert not any(name.startswith("modal") for name in (*before[0], *before[1]))
    added = [name for name in params if name.startswith("modality_proj/")]
    assert len(added) == (2 * 5 * 4 if fusion == "sum" else 0)
    images = jax.random.normal(jax.random.key(0), (1, 64, 80, 3))
    network = Network(network_config(config.model.to_dict(), 4))
    maps = features(network, params, stats, images)
    assert [x.shape[1:3] for x in maps] == [(8, 10), (4, 5), (2, 3), (1, 2), (1, 1)]
    if fusion == "sum":
        bare = Network(network_config((config.model.to_dict() | {"modalities": ()}), 4))
        own = {name: params[name] for name in bare.param_shapes}
        alone = features(bare, own, {k: stats[k] for k in bare.norm_stats_shapes}, images)
        for one, other in zip(maps, alone, strict=True):
            np.testing.assert_array_equal(one, other)


def test_bfloat16_is_close(files):
    config = section()
    params, stats = values_of(config)
    images = jax.random.normal(jax.random.key(0), (1, 64, 80, 3))
    found = []
    for dtype in ("float32", "bfloat16"):
        config.model.modality_dtype = dtype
        network = Network(network_config(config.model.to_dict(), 4))
        found.append(features(network, params, stats, images))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == np.float32
        error = np.abs(exact - rounded).mean() / np.abs(exact).mean()
        assert 0 < error < 0.03
