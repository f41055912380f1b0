"""Training steps: the released trajectory, the same numbers however a batch is spread or cut, what
is communicated, kept, skipped and planned.
"""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from dsct_jax.batch import Batch, Targets
from dsct_jax.model.build import Network
from dsct_jax.model.dsct import DSCTConfig
from dsct_jax.model.layers import DropoutNoise, dropout
from dsct_jax.parallel import FSDP, make_mesh, shard_batch
from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig, StepConfig
from dsct_jax.training.halves import shapes_from_host
from dsct_jax.training.memory_plan import format_plan, make_plan
from dsct_jax.training.objective import SetPrediction
from dsct_jax.training.step import initial_state, make_train_step
from dsct_jax.weights.rules import from_torch, to_torch

RULES = get_config().optimizer.rules
SMALL = DSCTConfig(
    num_classes=26,
    dropout=0.0,
    **json.loads((Path(__file__).parents[1] / "golden" / "model_small.json").read_text()),
)


@pytest.fixture(scope="module")
def trajectory(golden):
    """12 steps of the released recipe: (golden arrays, state after them, metrics of each)."""
    arrays, weights = golden("train_trajectory"), golden("model_small")
    functions, mesh = Network(SMALL), make_mesh(jax.devices()[:1])
    shapes = functions.param_shapes | functions.norm_stats_shapes
    flat = from_torch(
        {k.removeprefix("state/"): v for k, v in weights.items() if k.startswith("state/")}, shapes
    )
    learning_rate, weight_decay, clip = (float(x) for x in arrays["lr_wd_clip"])
    config = OptimizerConfig(
        learning_rate=learning_rate, weight_decay=weight_decay, clip_norm=clip, rules=RULES
    )
    params, norm_stats = (
        {k: flat[k] for k in names}
        for names in (functions.param_shapes, functions.norm_stats_shapes)
    )
    optimizer, state = initial_state(params, norm_stats, config, total_steps=1000, mesh=mesh)
    step = make_train_step(
        functions,
        optimizer,
        objective=SetPrediction(LossConfig(), MatcherConfig(), multi_label=True),
        mesh=mesh,
        seed=0,
    )
    metrics = []
    for i in range(12):
        state, terms = step(state, shard_batch(trajectory_batch(arrays, i % 4), mesh))
        metrics.append(jax.device_get(terms))
    return arrays, state, metrics


def trajectory_batch(arrays, index) -> Batch:
    """Batch `index`, padded to its largest image as the released code pads; people padded to 4, so
    that fewer programs are compiled.
    """
    images = [arrays[f"b{index}_image_{i}"].transpose(1, 2, 0) for i in range(2)]
    sizes = np.array([x.shape[:2] for x in images], np.int32)
    canvas = np.zeros((2, *sizes.max(0), 3), np.float32)
    for i, image in enumerate(images):
        canvas[i, : image.shape[0], : image.shape[1]] = image
    boxes, labels, valid = (
        np.zeros((2, 4, 4), np.float32),
        np.zeros((2, 4, 26), np.float32),
        np.zeros((2, 4), bool),
    )
    count = arrays[f"b{index}_valid"].shape[1]
    boxes[:, :count], labels[:, :count], valid[:, :count] = (
        arrays[f"b{index}_{name}"] for name in ("tgt_boxes", "tgt_labels", "valid")
    )
    return Batch(
        canvas,
        sizes,
        Targets(boxes, labels, valid),
        np.arange(2, dtype=np.int32),
        sizes,
        np.ones(2, bool),
    )


def test_trajectory_losses_and_gradient_norms(trajectory):
    arrays, _, metrics = trajectory
    np.testing.assert_allclose([m["total"] for m in metrics], arrays["total"], rtol=1e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], arrays["grad_norm"], rtol=1e-4)
    names = {"loss_ce": "loss_class", "loss_bbox": "loss_bbox", "loss_giou": "loss_giou"}
    for column, theirs in enumerate(arrays["term_names"]):
        base, _, layer = (
            str(theirs).rpartition("_") if str(theirs)[-1].isdigit() else (str(theirs), "", "")
        )
        if base in names:
            ours = names[base] + (f"/{layer}" if layer else "")
            np.testing.assert_allclose(
                [m[ours] for m in metrics],
                arrays["terms"][:, column],
                rtol=1e-5,
                atol=1e-6,
                err_msg=ours,
            )


def test_trajectory_parameters(trajectory):
    arrays, state, _ = trajectory
    final = to_torch({**state.params, **state.frozen_params})
    for key in (k for k in arrays if k.startswith("final/")):
        np.testing.assert_allclose(
            final[key.removeprefix("final/")], arrays[key], rtol=0, atol=3e-5, err_msg=key
        )
    for name, group, norm in zip(
        arrays["param_names"], arrays["param_group"], arrays["final_sumsq_f64"], strict=True
    ):
        assert np.isclose(np.sum(np.square(final[str(name)], dtype=np.float64)), norm, rtol=1e-4), (
            name,
            group,
        )
    assert set(to_torch(state.frozen_params)) == set(arrays["frozen_names"])


TINY = DSCTConfig(
    num_classes=3,
    backbone="small",
    norm="group",
    hidden_dim=32,
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
    sizes = rng.integers(33, 65, (b, 2)).astype(np.int32)
    images = rng.integers(0, 256, (b, 64, 64, 3), dtype=np.uint8)
    labels = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (b, 3))]
    boxes = rng.uniform(0.2, 0.6, (b, 3, 4)).astype(np.float32)
    valid = rng.random((b, 3)) < 0.6
    valid[0] = False  # an image with no person
    return Batch(
        images,
        sizes,
        Targets(boxes, labels, valid),
        np.arange(b, dtype=np.int32),
        sizes,
        np.ones(b, bool),
    )


RUNS: dict[str, dict] = {
    "1 device": {"devices": 1},
    "8 devices": {"devices": 8},
    "2 devices, 4 parts of the batch": {"devices": 2, "accumulate": 4},
    "8 devices that share the state, matched on the device": {
        "devices": 8,
        "shard_rules": FSDP,
        "shard_min_size": 512,
        "implementation": "device",
    },
}
DECAY = 0.9
# Adam makes a whole step of a gradient that is rounding noise, and that differs from program to
# program. Clipped far below Adam's epsilon of 1e-8, gradients move the parameters in proportion to
# their size: gradient descent with momentum.
DESCENT = OptimizerConfig(learning_rate=10.0, clip_norm=1e-10, weight_decay=0.0, rules=RULES)


@functools.cache
def ten_steps(name: str):
    """Ten steps on 32 images each: what makes steps, the state, its params after each step, the
    metrics.
    """
    options = dict(RUNS[name])
    mesh = make_mesh(jax.devices()[: options.pop("devices")])
    matcher = MatcherConfig(implementation=options.pop("implementation", "scipy"))
    functions, step_config = Network(TINY), StepConfig(ema_decay=DECAY, **options)
    optimizer, state = initial_state(
        *functions.init(0), DESCENT, total_steps=1000, mesh=mesh, step_config=step_config
    )
    step = make_train_step(
        functions,
        optimizer,
        objective=SetPrediction(LossConfig(), matcher, multi_label=False),
        mesh=mesh,
        seed=0,
        step_config=step_config,
    )
    metrics, params = [], [jax.device_get(state.params)]
    for i in range(10):
        state, terms = step(state, shard_batch(synthetic_batch(32, i), mesh))
        metrics.append(jax.device_get(terms))
        params.append(jax.device_get(state.params))
    return step, state, params, metrics


@pytest.mark.parametrize("name", list(RUNS)[1:])
def test_every_way_of_spreading_a_batch_trains_the_same(name):
    _, state, params, metrics = ten_steps("1 device")
    _, other_state, other_params, other_metrics = ten_steps(name)
    assert metrics[-1]["total"] < metrics[0]["total"]
    for key in (key for key in metrics[0] if key.startswith(("loss", "total"))):
        found, expected = ([step[key] for step in steps] for steps in (other_metrics, metrics))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=key)
    # Clipping hides a factor common to all gradients. The median, because a gradient jumps where
    # rounding takes a sampling point into the next cell: by 1e-4 or so, at one step in several.
    pairs = zip(metrics, other_metrics, strict=True)
    ratios = np.array([other["grad_norm"] / one["grad_norm"] for one, other in pairs])
    assert np.median(np.abs(ratios - 1)) < 1e-5
    ema, other_ema = jax.device_get((state.ema, other_state.ema))
    for path, value in params[-1].items():
        np.testing.assert_allclose(other_params[-1][path], value, rtol=0, atol=1e-5, err_msg=path)
        np.testing.assert_allclose(other_ema[path], ema[path], rtol=0, atol=1e-5, err_msg=path)


def test_shared_state_is_spread_over_the_devices():
    _, state, _, _ = ten_steps("8 devices that share the state, matched on the device")
    path = "encoder/0/feedforward/linear1/kernel"
    shape = state.params[path].shape
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == shape]
    for value in (state.params[path], state.ema[path], *moments):
        assert value.addressable_shards[0].data.size == value.size // 8
    assert len(moments) >= 2
    assert state.params["box_head/layer2/bias"].sharding.is_fully_replicated


def test_only_gradients_are_communicated():
    step, state, _, _ = ten_steps("8 devices")
    batch = shard_batch(synthetic_batch(32, 0), step.mesh)
    forward = step.first_half(state, batch, None)
    solved = shapes_from_host(step.objective.host_half, forward.problem, step.mesh)
    texts = [
        step.first_half.lower(state, batch, None).compile().as_text(),
        step.second_half.lower(state, forward, solved, batch).compile().as_text(),
    ]
    for text in texts:
        assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    first, second = (re.findall(r"= (\S.*?) all-reduce(?:-start)?\(", text) for text in texts)
    assert not first
    number_of_boxes, gradients = second
    assert number_of_boxes == "s32[]"
    assert gradients.count("f32[") > 100  # all gradients and loss terms together, in one operation


def test_no_parameter_crosses_between_the_halves():
    step, state, _, _ = ten_steps("8 devices")
    pull_back = jax.eval_shape(step.first_half, state, synthetic_batch(32, 0), None).pull_back
    assert sum(isinstance(place, str) for place in pull_back.places) > 10
    kept = [value.shape[1:] for value in pull_back.kept]
    assert state.params["decoder/0/feedforward/linear1/kernel"].shape not in kept


def test_the_average_follows_the_parameters():
    _, state, params, _ = ten_steps("1 device")
    path = "class_head/kernel"
    average = params[0][path].astype(np.float64)
    for step, values in enumerate(params[1:]):
        keep = min(DECAY, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * values[path]
    np.testing.assert_allclose(state.ema[path], average, rtol=0, atol=1e-6)
    assert np.abs(average - params[-1][path]).max() > 1e-5


def test_a_step_that_is_not_finite_changes_nothing_and_counts():
    step, state, _, _ = ten_steps("8 devices")
    state = jax.tree.map(jnp.copy, state)
    good, bad = synthetic_batch(32, 1), synthetic_batch(32, 1)
    image, person = np.argwhere(bad.targets.valid)[0]
    bad.targets.boxes[image, person] = np.nan
    before = jax.device_get((state.params, state.opt_state, state.ema))
    for count in (1, 2):
        state, terms = step(state, shard_batch(bad, step.mesh))
        assert terms["nonfinite"] == 1
        assert (state.skipped, state.skipped_total, state.step) == (count, count, 10 + count)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((state.params, state.opt_state, state.ema)),
        before,
    )
    state, terms = step(state, shard_batch(good, step.mesh))
    assert (terms["nonfinite"], state.skipped, state.skipped_total) == (0, 0, 2)
    assert np.isfinite(terms["total"])


def test_metrics_name_every_term_of_every_layer_and_every_part():
    step, state, _, _ = ten_steps("8 devices")
    _, terms = jax.eval_shape(step.second_half, *second_half_arguments(step, state))
    for name in ("loss_class", "loss_bbox", "loss_giou", "cardinality_error"):
        assert {name, f"{name}/0"} <= set(terms)
    assert {"total", "class_error", "matched_iou", "grad_norm", "num_boxes", "nonfinite"} <= set(
        terms
    )
    parts = {path.split("/")[0] for path in state.params}
    assert {f"grad_norm/{part}" for part in parts} <= set(terms)
    assert {value.dtype for value in terms.values()} == {np.dtype(np.float32)}


def second_half_arguments(step, state):
    batch = synthetic_batch(32, 0)
    forward = jax.eval_shape(step.first_half, state, batch, None)
    solved = shapes_from_host(step.objective.host_half, forward.problem, step.mesh)
    return state, forward, solved, batch


@pytest.mark.parametrize(
    "name",
    [
        "8 devices",
        "2 devices, 4 parts of the batch",
        "8 devices that share the state, matched on the device",
    ],
)
def test_plan_of_a_step(name):
    step, state, _, _ = ten_steps(name)
    plan = make_plan(step, state, [(64, 64)], batch_size=32, max_targets=3, num_classes=3)
    assert sum(module.trained for module in plan.modules) == sum(
        value.size for value in state.params.values()
    )
    assert {"backbone/stem", "encoder", "decoder", "class_head"} <= {
        module.name for module in plan.modules
    }
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert plan.state_bytes < 0.4 * whole if "share" in name else plan.state_bytes == whole
    (bucket,) = plan.buckets
    expected = {1: ["first_half", "second_half"], 4: ["first_half", "add_gradients", "update"]}[
        step.config.accumulate
    ]
    assert [program.name for program in bucket.programs] == (
        ["second_half"] if "matched" in name else expected
    )
    assert all(program.flops > 0 and program.argument_bytes > 0 for program in bucket.programs[:2])
    assert bucket.peak_bytes > plan.state_bytes
    assert bucket.peak_bytes >= max(program.live_bytes for program in bucket.programs)
    text = format_plan(plan)
    assert "32x64x64" in text and bucket.programs[0].name in text


def test_dropout_depends_on_the_image_not_on_its_place():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 7, 143))  # an odd number of entries: two come out of one random number
    whole = dropout(x, 0.25, DropoutNoise(keys))
    parts = jnp.concatenate(
        [dropout(x[:2], 0.25, DropoutNoise(keys[:2])), dropout(x[2:], 0.25, DropoutNoise(keys[2:]))]
    )
    np.testing.assert_array_equal(whole, parts)
    assert abs(float((whole == 0).mean()) - 0.25) < 0.03
    np.testing.assert_allclose(whole[whole > 0], 1 / 0.75, rtol=1e-6)
    assert dropout(x, 0.25, None) is x


def test_dropout_is_fair_and_fresh():
    noise = DropoutNoise(jax.random.split(jax.random.key(1), 2))
    first, second = (np.asarray(noise.keep((2, 200, 251), 0.1)) for _ in range(2))
    masks = np.concatenate([first, second]).reshape(4, -1)  # two images, twice
    halves = masks.reshape(8, -1)  # the upper and the lower bits of the random numbers
    np.testing.assert_allclose(
        halves.mean(1), 0.9, atol=5 * np.sqrt(0.09 / halves.shape[1])
    )  # five standard deviations
    assert abs(np.corrcoef(halves) - np.eye(8)).max() < 5 / np.sqrt(halves.shape[1])
