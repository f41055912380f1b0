"""AdamW as the released recipe uses it, and the rules of other papers: one table decides which
parameters move and how fast.

The arithmetic is PyTorch's (decoupled decay, clipping by min(1, limit / (norm + 1e-6))), so a
released training run can be followed step by step.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dsct_jax.errors import UserError
from dsct_jax.training.config import OptimizerConfig

# nested dicts of arrays (or of ShapeDtypeStructs, or of floats), keys are strings or integers
Tree = Any
Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]
_DROP_FACTOR = 0.1
_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Learning rate of step 0, 1 ...: linear from 0 over `warmup_steps`, then "step" (x0.1 at each
    drop, not below the lowest) or "cosine" (to 0 at `total_steps`).
    """
    drops = [config.drop_at, *config.drop_again_at]
    drop_steps = jnp.array([round(at * total_steps) for at in drops])
    factors = [_DROP_FACTOR**number for number in range(len(drops) + 1)]
    rates = jnp.array([max(config.learning_rate * x, config.lowest_rate) for x in factors])
    decay_steps = max(total_steps - config.warmup_steps, 1)

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "step":
            return warm * rates[(step >= drop_steps).sum()]
        progress = jnp.clip((step - config.warmup_steps) / decay_steps, 0, 1)
        return warm * config.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return schedule


def learning_rates(config: OptimizerConfig, total_steps: int, step: int) -> dict[str, float]:
    """For the log: `learning_rate` of this step, and `learning_rate/0.1x` ... of the parameters
    whose rules have that multiplier.
    """
    rate = float(make_schedule(config, total_steps)(step))
    return {"learning_rate": rate} | {
        f"learning_rate/{m:g}x": rate * m for m in sorted({m for _, m in config.rules}) if m > 0
    }


def multipliers(params: Tree, rules: Sequence[tuple[str, float]]) -> Tree:
    """Learning-rate multiplier of every parameter, in a tree like `params`; 0 = frozen.

    A rule is (regular expression over the whole path "a/b/0/c", multiplier). A rule may match
    nothing.

    Raises:
        UserError: a parameter is matched by no rule or by several, a rule is not a regular
            expression, or its multiplier is negative.
    """
    compiled = []
    for pattern, multiplier in rules:
        if multiplier < 0:
            raise UserError(
                f"optimizer.rules: the multiplier of {pattern!r} is {multiplier}; give 0 (frozen) "
                "or a positive number"
            )
        try:
            compiled.append((re.compile(pattern), float(multiplier)))
        except re.error as error:
            raise UserError(
                f"optimizer.rules: {pattern!r} is not a regular expression ({error})"
            ) from error

    def multiplier_of(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [rule for rule in compiled if rule[0].fullmatch(name)]
        if len(found) != 1:
            which = "by several" if found else "by none of"
            patterns = (repr(pattern.pattern) for pattern, _ in found or compiled)
            raise UserError(
                f"optimizer.rules must match every parameter exactly once, but {name} is matched "
                f"{which}: {(' and ' if found else ', ').join(patterns)}"
            )
        return found[0][1]

    return jax.tree_util.tree_map_with_path(multiplier_of, params)


def make_optimizer(
    config: OptimizerConfig, params: Tree, total_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Clip, the update of its kind (Adam: 0.9, 0.999, 1e-8), decay of every parameter, schedule
    and rules.

    `params` are the trained ones, and give the paths only (ShapeDtypeStructs do). `update(...,
    skip=True)` moves nothing: updates are 0 whatever the gradients, the state stays as it is.
    """
    scales = multipliers(params, config.rules)

    def clip(updates: Tree, _: Tree) -> Tree:
        # torch.nn.utils.clip_grad_norm_: optax divides by the norm without the epsilon, and only
        # above the limit.
        factor = jnp.minimum(1.0, config.clip_norm / (optax.tree.norm(updates) + _CLIP_EPSILON))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.chain(
        optax.stateless(clip),
        (_adam if config.kind in ("adamw", "adam") else _momentum)(
            make_schedule(config, total_steps), config
        ),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)),
    )


def _adam(schedule: Schedule, config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """optax.adamw, or adam with the decay inside the gradient, that can skip a step in place.

    Skipped from outside (`where(skip, old state, new state)`), the parameter's update and the new
    moments both read the old moments, so XLA copies these before it overwrites them: 2.7 times the
    time of the whole update on a CPU. Here the update reads the moments that were decided upon.
    """
    b1, b2, epsilon, weight_decay = 0.9, 0.999, 1e-8, config.weight_decay
    if config.kind == "adam":
        weight_decay = 0.0

    def init(params):
        return optax.scale_by_adam().init(params)

    def update(gradients, state, params, *, skip: jax.Array | bool = False):
        def unless_skipped(new, old):
            return jax.tree.map(lambda new, old: jnp.where(skip, old, new), new, old)

        if config.kind == "adam":
            gradients = _with_decay(gradients, params, config)
        mean = unless_skipped(optax.tree.update_moment(gradients, state.mu, b1, 1), state.mu)
        square = unless_skipped(optax.tree.update_moment(gradients, state.nu, b2, 2), state.nu)
        count, rate = optax.safe_increment(state.count), schedule(state.count)

        def step(mean, square, param):
            return jnp.where(
                skip, 0.0, -rate * (mean / (jnp.sqrt(square) + epsilon) + weight_decay * param)
            )

        updates = jax.tree.map(
            step,
            optax.tree.bias_correction(mean, b1, count),
            optax.tree.bias_correction(square, b2, count),
            params,
        )
        return updates, optax.ScaleByAdamState(unless_skipped(count, state.count), mean, square)

    return optax.GradientTransformationExtraArgs(init, update)


def _with_decay(gradients: Tree, params: Tree, config: OptimizerConfig) -> Tree:
    """The gradients of the loss with L2 regularization."""
    return jax.tree.map(lambda g, x: g + config.weight_decay * x, gradients, params)


class MomentumState(NamedTuple):
    """Of `_momentum`."""

    count: Any  # int32 []
    velocity: Tree


def _momentum(schedule: Schedule, config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum, which can skip a step in place as `_adam` does."""

    def init(params):
        return MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params, *, skip: jax.Array | bool = False):
        rate, keras = schedule(state.count), config.kind == "keras"
        gradients = _with_decay(gradients, params, config)
        share = rate if keras else 1.0
        velocity = jax.tree.map(
            lambda v, g: jnp.where(skip, v, config.momentum * v + share * g),
            state.velocity,
            gradients,
        )

        def step(v, g):
            ahead = config.momentum * v + g if config.kind == "nesterov" else v
            return jnp.where(skip, 0.0, -ahead if keras else -rate * ahead)

        updates = jax.tree.map(step, velocity, gradients)
        count = jnp.where(skip, state.count, optax.safe_increment(state.count))
        return updates, MomentumState(count, velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def gradient_norms(grads: dict[str, Any]) -> dict[str, jax.Array]:
    """L2 norm of all gradients, `grad_norm`, and of each part of the network, `grad_norm/PART` (the
    first component of the paths).
    """
    squares: dict[str, Any] = {}
    for path, value in grads.items():
        group = path.split("/")[0]
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(value))
    groups = {f"grad_norm/{group}": jnp.sqrt(square) for group, square in squares.items()}
    return {"grad_norm": jnp.sqrt(sum(squares.values(), start=jnp.zeros(())))} | groups


def moving_average(
    ema: dict[str, Any], params: dict[str, Any], step: jax.Array, *, decay: float
) -> dict[str, Any]:
    """Moving average after one more step; early ones move it faster, by a decay of (1 + step) / (10
    + step), as in TensorFlow.
    """
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, ema, params)
