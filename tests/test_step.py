"""Training steps: the released trajectory, the same numbers on 1 and 8 devices, what is communicated, and dropout that ignores sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsct_jax.batch import Batch, Targets
from dsct_jax.losses import LossConfig
from dsct_jax.matcher import MatcherConfig
from dsct_jax.model.dsct import DSCTConfig
from dsct_jax.model.layers import DropoutNoise, dropout
from dsct_jax.optimizer import OptimizerConfig
from dsct_jax.sharding import make_mesh, shard_batch
from dsct_jax.state import ModelFunctions
from dsct_jax.step import initial_state, make_train_step
from dsct_jax.torch_weights import from_torch, to_torch

RULES = (
    (r"backbone/(stem|layer1)/.*", 0.0),
    (r"backbone/layer[234]/.*", 0.1),
    (r"(.*/)?(sampling_offsets|reference_points)/.*", 0.1),
    (r"(?!backbone/|(.*/)?(sampling_offsets|reference_points)/).*", 1.0),
)
SMALL = DSCTConfig(
    num_classes=26,
    backbone="tiny",
    hidden_dim=64,
    num_heads=4,
    feedforward_dim=128,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_context_queries=20,
    num_spatial_neighbors=6,
    num_semantic_neighbors=5,
    fusion="released",
    semantic_selection="largest",
    dropout=0.0,
)


@pytest.fixture(scope="module")
def trajectory(golden):
    """12 steps of the released recipe: (golden arrays, state after them, metrics of each)."""
    arrays, weights = golden("train_trajectory"), golden("model_small")
    functions, mesh = ModelFunctions(SMALL), make_mesh(jax.devices()[:1])
    shapes = functions.param_shapes | functions.frozen_shapes
    flat = from_torch({k.removeprefix("state/"): v for k, v in weights.items() if k.startswith("state/")}, shapes)
    learning_rate, weight_decay, clip = (float(x) for x in arrays["lr_wd_clip"])
    config = OptimizerConfig(learning_rate=learning_rate, weight_decay=weight_decay, clip_norm=clip, rules=RULES)
    params, frozen = ({k: flat[k] for k in names} for names in (functions.param_shapes, functions.frozen_shapes))
    optimizer, state = initial_state(params, frozen, config, total_steps=1000, mesh=mesh)
    step = make_train_step(functions, optimizer, loss=LossConfig(), matcher=MatcherConfig(), multi_label=True, mesh=mesh, seed=0)
    metrics = []
    for i in range(12):
        state, terms = step(state, shard_batch(trajectory_batch(arrays, i % 4), mesh))
        metrics.append(jax.device_get(terms))
    return arrays, state, metrics


def trajectory_batch(arrays, index) -> Batch:
    """Batch `index`, padded to its largest image as the released code pads; people padded to 4, so that fewer programs are compiled."""
    images = [arrays[f"b{index}_image_{i}"].transpose(1, 2, 0) for i in range(2)]
    sizes = np.array([x.shape[:2] for x in images], np.int32)
    canvas = np.zeros((2, *sizes.max(0), 3), np.float32)
    for i, image in enumerate(images):
        canvas[i, : image.shape[0], : image.shape[1]] = image
    boxes, labels, valid = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 26), np.float32), np.zeros((2, 4), bool)
    count = arrays[f"b{index}_valid"].shape[1]
    boxes[:, :count], labels[:, :count], valid[:, :count] = (arrays[f"b{index}_{name}"] for name in ("tgt_boxes", "tgt_labels", "valid"))
    return Batch(canvas, sizes, Targets(boxes, labels, valid), np.arange(2, dtype=np.int32), sizes, np.ones(2, bool))


def test_trajectory_losses_and_gradient_norms(trajectory):
    arrays, _, metrics = trajectory
    np.testing.assert_allclose([m["total"] for m in metrics], arrays["total"], rtol=1e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], arrays["grad_norm"], rtol=1e-4)
    names = {"loss_ce": "loss_class", "loss_bbox": "loss_bbox", "loss_giou": "loss_giou"}
    for column, theirs in enumerate(arrays["term_names"]):
        base, _, layer = str(theirs).rpartition("_") if str(theirs)[-1].isdigit() else (str(theirs), "", "")
        if base in names:
            ours = names[base] + (f"/{layer}" if layer else "")
            np.testing.assert_allclose([m[ours] for m in metrics], arrays["terms"][:, column], rtol=1e-5, atol=1e-6, err_msg=ours)


def test_trajectory_parameters(trajectory):
    arrays, state, _ = trajectory
    final = to_torch({**state.params, **state.fixed}, num_decoder_layers=2)
    for key in (k for k in arrays if k.startswith("final/")):
        np.testing.assert_allclose(final[key.removeprefix("final/")], arrays[key], rtol=0, atol=3e-5, err_msg=key)
    for name, group, norm in zip(arrays["param_names"], arrays["param_group"], arrays["final_sumsq_f64"], strict=True):
        assert np.isclose(np.sum(np.square(final[str(name)], dtype=np.float64)), norm, rtol=1e-4), (name, group)
    assert set(to_torch(state.fixed, num_decoder_layers=2)) == set(arrays["frozen_names"])


TINY = DSCTConfig(
    num_classes=3,
    backbone="small",
    norm="group",
    hidden_dim=64,  # with 32, the groups of the input projection's norm are single channels and its bias has no gradient
    num_heads=2,
    feedforward_dim=32,
    num_points=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    num_context_queries=6,
    num_spatial_neighbors=2,
    num_semantic_neighbors=2,
    dropout=0.1,
)


def synthetic_batch(b: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(65, 129, (b, 2)).astype(np.int32)
    images = rng.integers(0, 256, (b, 128, 128, 3), dtype=np.uint8)
    labels = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (b, 3))]
    boxes = rng.uniform(0.2, 0.6, (b, 3, 4)).astype(np.float32)
    valid = rng.random((b, 3)) < 0.6
    valid[0] = False  # an image with no person
    return Batch(images, sizes, Targets(boxes, labels, valid), np.arange(b, dtype=np.int32), sizes, np.ones(b, bool))


@pytest.fixture(scope="module", params=[1, 8])
def five_steps(request):
    mesh = make_mesh(jax.devices()[: request.param])
    functions = ModelFunctions(TINY)
    params, frozen = functions.init(3)
    optimizer, state = initial_state(params, frozen, OptimizerConfig(clip_norm=1.0, rules=RULES), total_steps=1000, mesh=mesh)
    step = make_train_step(functions, optimizer, loss=LossConfig(), matcher=MatcherConfig(), multi_label=False, mesh=mesh, seed=7)
    losses = []
    for i in range(5):
        batch = shard_batch(synthetic_batch(8, i), mesh)
        if i == 4 and request.param == 8:
            forward = step.first_half(state, batch, None)
            assignment = jnp.zeros(forward.cost.shape[:3], jnp.int32)
            texts = [
                step.first_half.lower(state, batch, None).compile().as_text(),
                step.second_half.lower(state, forward, batch, assignment).compile().as_text(),
            ]
        state, terms = step(state, batch)
        losses.append(float(terms["total"]))
    return request.param, losses, jax.device_get(state.params), texts if request.param == 8 else None


_runs: dict = {}


def test_one_device_and_eight_agree(five_steps):
    devices, losses, params, _ = five_steps
    _runs[devices] = (losses, params)
    assert np.isfinite(losses).all()
    if len(_runs) == 2:
        np.testing.assert_allclose(_runs[1][0], _runs[8][0], rtol=1e-5)
        for name, value in _runs[1][1].items():
            if name.endswith("self_attention/in_proj/bias"):
                continue  # softmax ignores the bias of the keys: its gradient is rounding noise, which Adam turns into whole steps
            np.testing.assert_allclose(value, _runs[8][1][name], rtol=0, atol=1e-5, err_msg=name)


def test_only_gradients_are_communicated(five_steps):
    devices, _, _, texts = five_steps
    if devices == 1:
        pytest.skip("a single device communicates nothing")
    for text in texts:
        assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    first, second = (re.findall(r"= (\S.*?) all-reduce(?:-start)?\(", text) for text in texts)
    assert not first
    number_of_boxes, gradients = second
    assert number_of_boxes == "s32[]"
    assert gradients.count("f32[") > 100  # all gradients and loss terms together, in one operation


def test_dropout_depends_on_the_image_not_on_its_place():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 1000))
    whole = dropout(x, 0.25, DropoutNoise(keys))
    parts = jnp.concatenate([dropout(x[:2], 0.25, DropoutNoise(keys[:2])), dropout(x[2:], 0.25, DropoutNoise(keys[2:]))])
    np.testing.assert_array_equal(whole, parts)
    assert abs(float((whole == 0).mean()) - 0.25) < 0.03
    np.testing.assert_allclose(whole[whole > 0], 1 / 0.75, rtol=1e-6)
    assert dropout(x, 0.25, None) is x
