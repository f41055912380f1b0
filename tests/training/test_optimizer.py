"""The optimizer against PyTorch's AdamW written out in NumPy, the schedules, and the rules over
parameter paths.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.base import get_config
from dsct_jax.errors import UserError
from dsct_jax.parallel import make_mesh
from dsct_jax.training.config import OptimizerConfig, StepConfig
from dsct_jax.training.optimizer import (
    learning_rates,
    make_optimizer,
    make_schedule,
    multipliers,
)
from dsct_jax.training.step import initial_state

RULES = ((r"backbone/stem/.*", 0.0), (r"backbone/layer\d/.*", 0.1), (r"(?!backbone/).*", 1.0))
SHAPES = {
    "backbone/layer2/kernel": (2, 4),
    "decoder/0/bias": (5,),
    "decoder/10/bias": (1,),
    "scale": (),
}
FROZEN = {"backbone/stem/kernel": (3, 2)}


def draw(seed, factor=1.0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.standard_normal(shape) * factor, jnp.float32)
        for path, shape in shapes.items()
    }


class TorchAdamW:
    """torch.optim.AdamW with one group per leaf, after torch's clip_grad_norm_, in float64."""

    def __init__(self, params, rates, weight_decay):
        self.params = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
        self.rates, self.weight_decay, self.step_count = rates, weight_decay, 0
        self.mean = [np.zeros_like(p) for p in self.params]
        self.square = [np.zeros_like(p) for p in self.params]

    def step(self, gradients, clip_norm, factor):
        self.step_count += 1
        gradients = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        clip = min(1.0, clip_norm / (norm + 1e-6))
        for i, (g, rate) in enumerate(zip(gradients, self.rates, strict=True)):
            rate = rate * factor
            self.params[i] = self.params[i] * (1 - rate * self.weight_decay)
            self.mean[i] = 0.9 * self.mean[i] + 0.1 * clip * g
            self.square[i] = 0.999 * self.square[i] + 0.001 * (clip * g) ** 2
            root = np.sqrt(self.square[i]) / np.sqrt(1 - 0.999**self.step_count) + 1e-8
            self.params[i] = (
                self.params[i] - rate / (1 - 0.9**self.step_count) * self.mean[i] / root
            )
        return norm


def test_steps_equal_torch_adamw_across_the_drop_with_and_without_clipping():
    config = OptimizerConfig(
        learning_rate=0.05, weight_decay=0.3, clip_norm=1.0, drop_at=0.5, rules=RULES
    )
    params, total_steps = draw(0), 8
    scales = multipliers(params, RULES)
    reference = TorchAdamW(params, [0.05 * scale for scale in jax.tree.leaves(scales)], 0.3)
    optimizer = make_optimizer(config, params, total_steps)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    clipped = []
    for index in range(total_steps):
        gradients = draw(100 + index, factor=0.1 if index % 3 == 0 else 3.0)
        params, state = step(params, state, gradients)
        expected_norm = reference.step(gradients, 1.0, 1.0 if index < 4 else 0.1)
        clipped.append(expected_norm > 1.0)
        for ours, theirs in zip(jax.tree.leaves(params), reference.params, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
    assert {True, False} == set(clipped)


def test_with_one_rate_for_all_it_is_adamw_of_optax_and_a_skipped_step_moves_nothing():
    plain = {"learning_rate": 0.05, "weight_decay": 0.3, "clip_norm": float("inf")}
    config = OptimizerConfig(**plain, warmup_steps=3, rules=((".*", 1.0),))
    ours, params = make_optimizer(config, draw(0), 10), draw(0)
    theirs = optax.adamw(make_schedule(config, 10), weight_decay=0.3)
    expected, state, their_state = params, ours.init(params), theirs.init(params)
    for index in range(8):
        skip = index in (0, 3, 4)
        gradients = draw(100 + index)
        if skip:
            before = state
            updates, state = ours.update(
                jax.tree.map(lambda g: g * jnp.nan, gradients), state, params, skip=jnp.bool_(True)
            )
            assert all(
                np.array_equal(*leaves)
                for leaves in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True)
            )
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
        else:
            updates, state = ours.update(gradients, state, params, skip=jnp.bool_(False))
            their_updates, their_state = theirs.update(gradients, their_state, expected)
            expected = optax.apply_updates(expected, their_updates)
        params = optax.apply_updates(params, updates)
        for got, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


def test_a_step_that_may_be_skipped_copies_nothing():
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones(300)}
    optimizer = make_optimizer(OptimizerConfig(), params, 10)

    def step(params, state, gradients, skip):
        updates, state = optimizer.update(gradients, state, params, skip=skip)
        return optax.apply_updates(params, updates), state

    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, optimizer.init(params), params, jnp.bool_(False))
        .compile()
        .as_text()
    )
    assert "input_output_alias" in compiled
    assert not re.findall(r"f32\[\d+.*\]\S* copy\(.*", compiled)


def test_clipping_has_the_epsilon_of_torch():
    """At a norm equal to the limit PyTorch already shrinks a little; Adam hides a constant factor,
    so the first moment is looked at.
    """
    config = OptimizerConfig(clip_norm=1e-6, rules=((".*", 1.0),))
    params = {"a": jnp.zeros(1)}
    optimizer = make_optimizer(config, params, 10)
    _, state = optimizer.update({"a": jnp.full(1, 1e-6)}, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32]
    np.testing.assert_allclose(moments[0], 0.1 * 0.5e-6, rtol=1e-5)


def test_frozen_parameters_have_no_state_and_are_kept_apart():
    """Then they have no gradient either, no part in its norm, and never move."""
    params = draw(0, shapes=SHAPES | FROZEN)
    _, state = initial_state(
        params,
        {},
        OptimizerConfig(rules=RULES),
        total_steps=10,
        mesh=make_mesh(jax.devices()[:1]),
        step_config=StepConfig(ema_decay=0.9),
    )
    assert state.params.keys() == state.ema.keys() == SHAPES.keys()
    assert state.frozen_params.keys() == FROZEN.keys()
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    assert (3, 2) not in shapes
    assert shapes.count((2, 4)) == 2


def test_multipliers_follow_whole_paths_with_integer_keys():
    params = draw(0, shapes=SHAPES | FROZEN)
    assert multipliers(params, (*RULES, ("nothing/.*", 3.0))) == {
        "backbone/stem/kernel": 0.0,
        "backbone/layer2/kernel": 0.1,
        "decoder/0/bias": 1.0,
        "decoder/10/bias": 1.0,
        "scale": 1.0,
    }
    assert multipliers({"a": {10: {"b": 0.0}}}, (("a/10/b", 0.5),)) == {"a": {10: {"b": 0.5}}}


def test_the_rules_of_the_base_configuration_cover_every_kind_of_parameter_once():
    names = {
        "backbone/stem/kernel": 0.0,
        "backbone/layer1/0/conv1/kernel": 0.0,
        "backbone/layer4/2/conv3/kernel": 0.1,
        "encoder/layers/0/self_attention/sampling_offsets/kernel": 0.1,
        "decoder/reference_points/bias": 0.1,
        "reference_points/kernel": 0.1,
        "encoder/layers/0/self_attention/value/kernel": 1.0,
        "class_head/bias": 1.0,
        "subject_queries": 1.0,
    }
    assert multipliers(dict.fromkeys(names, 0.0), get_config().optimizer.rules) == names


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("a/.*", 1.0),), r"but b/c is matched by none of: 'a/\.\*'"),
        (((".*", 1.0), ("b/.*", 0.1)), r"but b/c is matched by several: '\.\*' and 'b/\.\*'"),
        ((("(", 1.0),), r"'\(' is not a regular expression"),
        (((".*", -1.0),), r"the multiplier of '\.\*' is -1\.0"),
    ],
)
def test_rules_that_do_not_cover_every_parameter_exactly_once(rules, message):
    with pytest.raises(UserError, match=message):
        multipliers({"a": {"x": 0.0}, "b": {"c": 0.0}}, rules)


def test_step_schedule_drops_once():
    schedule = make_schedule(OptimizerConfig(learning_rate=2e-4, drop_at=0.8, warmup_steps=4), 50)
    rates = np.array([float(schedule(step)) for step in range(60)])
    np.testing.assert_allclose(rates[:5], np.arange(5) * 5e-5, rtol=1e-6)
    np.testing.assert_allclose(rates[4:40], 2e-4, rtol=1e-6)
    np.testing.assert_allclose(rates[40:], 2e-5, rtol=1e-6)


def test_learning_rates_of_a_step_by_multiplier():
    config = OptimizerConfig(learning_rate=2e-4, drop_at=0.8, rules=get_config().optimizer.rules)
    for step, rate in ((0, 2e-4), (90, 2e-5)):
        found = learning_rates(config, 100, step)
        assert found == pytest.approx(
            {"learning_rate": rate, "learning_rate/0.1x": rate / 10, "learning_rate/1x": rate},
            rel=1e-6,
        )


def test_cosine_schedule_ends_at_zero():
    schedule = make_schedule(
        OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=10), 110
    )
    np.testing.assert_allclose(
        [schedule(s) for s in (0, 5, 10, 60, 110, 500)], [0, 0.5, 1, 0.5, 0, 0], atol=1e-6
    )


def test_a_wrong_setting_is_named():
    with pytest.raises(
        UserError, match="schedule='poly' cannot be used: must be one of step, cosine"
    ):
        OptimizerConfig(schedule="poly")
    with pytest.raises(UserError, match="clip_norm=0"):
        OptimizerConfig(clip_norm=0.0)


def test_no_clipping_on_request():
    optimizer = make_optimizer(OptimizerConfig(clip_norm=float("inf")), {"a": jnp.zeros(1)}, 10)
    _, state = optimizer.update(
        {"a": jnp.full(1, 1e6)}, optimizer.init({"a": jnp.zeros(1)}), {"a": jnp.zeros(1)}
    )
    np.testing.assert_allclose(
        next(leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32), 1e5, rtol=1e-6
    )
