"""Two-stage networks as a user has them: train, resume, evaluate with given and found boxes,
predict, export; the same on one device and on eight.
"""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import dsct_jax
import train
from dsct_jax.__main__ import main
from dsct_jax.batch import Batch, Targets
from dsct_jax.config import read_config
from dsct_jax.errors import UserError
from dsct_jax.model.build import Network, network_config
from dsct_jax.parallel import make_mesh, shard_batch
from dsct_jax.training.classification import Classification
from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig, StepConfig
from dsct_jax.training.step import initial_state, make_train_step
from dsct_jax.weights.run_directory import load_weights

SMALL = {"widths": (4, 8), "hidden_dim": 8, "subject_size": 16, "context_size": 16}
SMALL |= {"context_resize": (20, 24), "context_corner": (2, 4)}
CONFIGURATION = f"""
from configs import base, debug

def get_config():
    config = debug.get_config()
    base.use_network(config, "two_stage")
    config.model.update(**{SMALL})
    config.optimizer.update(drop_at=1.0, drop_again_at=())
    config.train.update(batch_size=8, eval_batch_size=8, epochs=2)
    return config
"""


def flags(folder, name: str) -> list[str]:
    path = folder / "two_stage.py"
    path.write_text(CONFIGURATION)
    return [f"--config={path}", f"--workdir={folder / name}"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_stage")
    assert train.main(flags(folder, "run")) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def scene(workdir):
    path = workdir.parent / "scene.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_it_trains_and_evaluates_with_given_boxes(workdir, capsys):
    assert train.main([*flags(workdir.parent, "run"), "--mode=eval", "--split=test"]) == 0
    assert "boxes: given" in capsys.readouterr().out
    metrics = json.loads((workdir / "metrics_test.json").read_text())
    assert metrics["boxes"] == "given" and "box_AP" not in metrics
    assert metrics["mean_iou"] == pytest.approx(1, abs=1e-5)
    # the images and people of the split, although an example is a person
    assert (metrics["num_images"], metrics["num_people"]) == (2, 3)


def test_statistics_move_and_are_saved(workdir):
    weights = load_weights(workdir)
    moved = [np.abs(x).max() for name, x in weights.norm_stats.items() if name.endswith("mean")]
    assert len(moved) == 5 and min(moved) > 0


def test_a_resumed_run_is_the_unbroken_one(workdir):
    """Bit for bit: parameters, statistics, and the velocity that follows from them."""
    broken = flags(workdir.parent, "broken")
    assert train.main([*broken, "--config.train.epochs=1"]) == 0
    assert train.main(broken) == 0
    a, b = (load_weights(workdir.parent / name) for name in ("run", "broken"))
    assert a.step == b.step
    for one, other in ((a.params, b.params), (a.norm_stats, b.norm_stats)):
        assert {n: x.tobytes() for n, x in one.items()} == {
            n: x.tobytes() for n, x in other.items()
        }


def test_evaluation_with_found_boxes(workdir, tmp_path):
    """The boxes of a json answer for the annotated people whom they overlap."""
    run = train.RunConfig.from_mapping(read_config(workdir / "config.json"))
    records = train.build_dataset(run, "test", training=False).records
    boxes = {r.name: [[0, 0, 5, 5], *(r.boxes[:1] + 2).tolist()] for r in records}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    arguments = [*flags(workdir.parent, "run"), "--mode=eval", "--split=test"]
    assert train.main([*arguments, f"--boxes={tmp_path / 'boxes.json'}"]) == 0
    metrics = json.loads((workdir / "metrics_test_found.json").read_text())
    assert metrics["boxes"] == f"found by {tmp_path / 'boxes.json'}"
    assert (metrics["num_images"], metrics["num_people"]) == (2, 3)
    assert 0.2 < metrics["mean_iou"] < 1


def test_predict_needs_boxes_and_gives_what_was_weighed(workdir, scene):
    model = dsct_jax.load(workdir)
    with pytest.raises(UserError, match="finds nobody by itself"):
        dsct_jax.predict(model, scene)
    boxes = np.array([[5, 5, 30, 40], [40, 10, 70, 50], [9, 9, 9, 9]])
    people = dsct_jax.predict(model, scene, boxes=boxes)
    assert [tuple(np.round(person.box)) for person in people] == [(5, 5, 30, 40), (40, 10, 70, 50)]
    for person in people:
        assert sum(person.fusion_weights) == pytest.approx(1, abs=1e-5)
        assert np.sum(person.attention) == pytest.approx(1, abs=1e-5)
        assert np.shape(person.attention) == (8, 8)
        assert sum(person.probabilities.values()) == pytest.approx(1, abs=1e-5)
    # the same person alone
    (alone,) = dsct_jax.predict(model, [scene], boxes=[boxes[1:2]])[0]
    np.testing.assert_allclose(
        [*alone.probabilities.values()], [*people[1].probabilities.values()], rtol=1e-5
    )


def test_the_predict_command_draws_attention(workdir, scene, tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({"scene.png": [[5, 5, 30, 40]]}))
    arguments = ["predict", str(scene), f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}"]
    assert main([*arguments, f"--boxes={tmp_path / 'b.json'}"]) == 0
    document = json.loads((tmp_path / "out" / "predictions.json").read_text())
    (subject,) = document["images"][0]["subjects"]
    assert subject["box"] == pytest.approx([5, 5, 30, 40], abs=1e-3)
    assert document["boxes"] == str(tmp_path / "b.json")
    assert sum(subject["fusion_weights"]) == pytest.approx(1, abs=1e-5)
    with Image.open(tmp_path / "out" / "drawn" / "scene_attention.png") as drawn:
        assert drawn.width > 100
    # predictions.json is itself such a file
    again = [*arguments[:2], f"--checkpoint={workdir}", f"--output={tmp_path / 'again'}"]
    assert main([*again, f"--boxes={tmp_path / 'out' / 'predictions.json'}"]) == 0
    assert main([*arguments]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stablehlo", "safetensors"])
def test_it_is_exported(workdir, scene, tmp_path, form):
    arguments = [f"--checkpoint={workdir}", f"--output={tmp_path}", f"--format={form}"]
    assert main(["export", *arguments]) == 0
    if form == "safetensors":
        again = dsct_jax.load(tmp_path / "model.safetensors")
        boxes = np.array([[5, 5, 30, 40]])
        people = [dsct_jax.predict(m, scene, boxes=boxes) for m in (dsct_jax.load(workdir), again)]
        assert people[0] == people[1]


def test_eight_devices_are_two_with_the_same_local_batches():
    """Statistics are those of the images of a device, averaged: two devices that compute the same
    eight parts, four one after another, end at the same values.
    """
    network = Network(network_config({"name": "two_stage", "dropout": 0.0, **SMALL}, 4))
    values, rng = jax.device_get(network.init(0)), np.random.default_rng(1)
    b, eye = 16, np.eye(4, dtype=np.float32)
    targets = Targets(
        np.full((b, 1, 4), 0.5, np.float32),
        eye[rng.integers(0, 4, b)][:, None],
        np.ones((b, 1), bool),
    )
    sizes = np.full((b, 2), 16, np.int32)
    images, subjects = rng.integers(0, 256, (2, b, 16, 16, 3), np.uint8)
    batch = Batch(images, sizes, targets, np.arange(b), sizes, np.ones(b, bool), subjects)
    states = []
    for devices, accumulate in ((8, 1), (2, 4)):
        mesh, parts = make_mesh(jax.devices()[:devices]), StepConfig(accumulate=accumulate)
        optimizer = OptimizerConfig(kind="nesterov", learning_rate=0.1, rules=((".*", 1.0),))
        made, state = initial_state(*values, optimizer, total_steps=9, mesh=mesh, step_config=parts)
        objective = Classification(LossConfig(class_loss="cross_entropy"), MatcherConfig(), False)
        how = {"objective": objective, "mesh": mesh, "seed": 0, "step_config": parts}
        step = make_train_step(network, made, **how)
        for _ in range(2):
            state, _ = step(state, shard_batch(batch, mesh))
        states.append(jax.device_get(state))
    for part in ("params", "norm_stats"):
        one, other = (getattr(state, part) for state in states)
        assert one.keys() == other.keys() and one
        for path, value in one.items():
            np.testing.assert_allclose(value, other[path], rtol=1e-4, atol=2e-6, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": "face", "fusion": "linear"}, "model.fusion='linear' .* one stream"),
        ({"fusion": "linear"}, "model.attention='gla' .* none or caer"),
        ({"encoder": "vgg"}, "model.encoder='vgg' .* one of five_conv, resnet18"),
        ({"norm_momentum": 0.0}, "model.norm_momentum=0.0 .* more than 0"),
    ],
)
def test_what_cannot_be_used_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        network_config({"name": "two_stage", **changes}, 7)


@pytest.mark.parametrize("streams", ["face", "context"])
@pytest.mark.parametrize("attention", ["none", "gla"])
def test_a_stream_alone(streams, attention):
    """Without fusion weights; the face only guides the attention to a context alone."""
    section = {"name": "two_stage", **SMALL, "streams": streams, "attention": attention}
    network = Network(network_config(section, 4))
    parts = {path.split("/")[0] for path in network.param_shapes}
    assert ("face" in parts) == (streams == "face" or attention == "gla")
    assert ("context" in parts) == (streams == "context")
    assert not parts & {"face_score", "context_score"}
    assert network.param_shapes["hidden/kernel"] == (8, 8)


def test_losses_of_the_other_kind_of_network_are_one_line():
    with pytest.raises(UserError, match=r"class_loss='focal' .* cross_entropy or squared"):
        Classification(LossConfig(), MatcherConfig(), multi_label=False)
