"""One training step and one evaluation step, sharded over all devices of a mesh.

A step knows a network and an objective. Where the objective needs the host (SciPy's matching), a
training step is two compiled halves: the first predicts, prepares the host's problem and keeps the
pull-back of its derivative; the host solves, each process for the shards it holds; the second half
computes the losses, pulls them back and updates. Otherwise the whole step is one program. Inside
shard_map every device sees its own images only, so nothing is gathered: the one communication is a
sum of gradients (and, with shard rules, the gathering of what they spread).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsct_jax.batch import Batch, FlatParams, Predictions
from dsct_jax.errors import UserError
from dsct_jax.model.build import Network, moving_statistics
from dsct_jax.model.layers import DropoutNoise
from dsct_jax.parallel import AXES, BATCH, LAYERED, spec_of, state_sharding
from dsct_jax.training.config import OptimizerConfig, StepConfig
from dsct_jax.training.halves import PullBack, add_axis, drop_axis, run_on_host
from dsct_jax.training.objective import LossSums, Objective
from dsct_jax.training.optimizer import (
    gradient_norms,
    make_optimizer,
    moving_average,
    multipliers,
)

_ZERO = np.int32(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes. Random numbers and the position in the data are functions of the
    seed and `step`.
    """

    step: Any  # int32 []
    params: FlatParams  # trained parameters, float32
    frozen_params: FlatParams  # parameters that the optimizer's rules freeze
    norm_stats: FlatParams  # statistics of norms, frozen or moving
    opt_state: Any
    # moving average of `params`, float32; {} = off
    ema: FlatParams = dataclasses.field(default_factory=dict)
    skipped: Any = _ZERO  # int32 [], steps skipped in a row because something was not finite
    skipped_total: Any = _ZERO  # int32 [], the same since the start of the run


def initial_state(
    params: FlatParams,
    norm_stats: FlatParams,
    config: OptimizerConfig,
    *,
    total_steps: int,
    mesh: Mesh,
    step_config: StepConfig | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, TrainState]:
    """The optimizer, and the state before step 0 on its devices: which parameters are trained
    follows from the optimizer's rules.
    """
    step_config = step_config or StepConfig()
    rates = multipliers(params, config.rules)
    trained = {path: value for path, value in params.items() if rates[path] > 0}
    frozen_params = {path: value for path, value in params.items() if path not in trained}
    optimizer = make_optimizer(config, trained, total_steps)
    # A step donates the state, so no two of its leaves may be one buffer, nor one that the caller
    # still holds.
    ema = jax.tree.map(np.array, trained) if step_config.ema_decay else {}
    trained, frozen_params, norm_stats = jax.tree.map(
        np.array, (trained, frozen_params, norm_stats)
    )
    state = TrainState(_ZERO, trained, frozen_params, norm_stats, optimizer.init(trained), ema)
    return optimizer, jax.device_put(
        state,
        state_sharding(
            state, mesh, rules=step_config.shard_rules, min_size=step_config.shard_min_size
        ),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Forward:
    """What the first half hands to the second, for one part of the batch."""

    problem: Any  # from Objective.prepare; finite, where steps that are not finite are skipped
    predictions: Any
    pull_back: Any  # PullBack of the predictions with respect to the trained parameters
    statistics: FlatParams  # of norms that move, after this part


class TrainStep:
    """Callable, made by `make_train_step`. A step is `first_half`, the host, `second_half`, or
    `second_half` alone where the host has no part; with accumulation `add_gradients` takes the
    place of `second_half`, and `update` follows.
    """

    def __init__(
        self,
        functions: Network,
        optimizer: optax.GradientTransformationExtraArgs,
        *,
        objective: Objective,
        mesh: Mesh,
        seed: int,
        config: StepConfig,
    ):
        self.functions, self.optimizer, self.objective = functions, optimizer, objective
        self.mesh, self.seed, self.config = mesh, seed, config
        self.first_half = jax.jit(self._predict)
        self.second_half = jax.jit(self._finish_whole, donate_argnums=0)
        self.add_gradients = jax.jit(self._add_gradients, donate_argnums=0)
        self.update = jax.jit(self._finish_parts, donate_argnums=(0, 1))
        self.zeros = jax.jit(
            lambda params: jax.tree.map(
                lambda x: jnp.zeros((mesh.size, *x.shape), x.dtype), params
            ),
            out_shardings=NamedSharding(mesh, BATCH),
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if self.config.accumulate == 1:
            return self.second_half(state, *self._first(state, batch, None), batch)
        grads, parts = self.zeros(state.params), []
        for part in np.arange(self.config.accumulate, dtype=np.int32):
            # Nothing holds on to one part's forward pass while the next one is computed.
            grads, sums = self.add_gradients(
                grads, state, *self._first(state, batch, part), batch, part
            )
            parts.append(sums)
        return self.update(state, grads, parts, batch)

    def _first(self, state: TrainState, batch: Batch, part: Any) -> tuple[_Forward | None, Any]:
        """The first half and what the host makes of it; nothing where a step is one program."""
        if self.objective.host_half is None:
            return None, None
        forward = self.first_half(state, batch, part)
        return forward, run_on_host(self.objective.host_half, forward.problem)

    def _shard(self, f: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _cut(self, batch: Batch, part: jax.Array | None) -> Batch:
        """Part number `part` of a device's images; all of them where there is one part."""
        if part is None:
            return batch
        size = batch.images.shape[0] // self.config.accumulate
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, part * size, size), batch)

    def _noise_keys(self, b: int, step: jax.Array, part: jax.Array | None) -> jax.Array:
        """One key per image, a function of the step and of the image's number in the global batch,
        however that is spread and cut; `b` images are on this device.
        """
        numbers = jax.lax.axis_index(AXES) * b + jnp.arange(b)
        step_key = jax.random.fold_in(jax.random.key(self.seed), step)
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(numbers)
        if part is None:
            return keys
        size = b // self.config.accumulate
        return jax.lax.dynamic_slice_in_dim(keys, part * size, size)

    def _forward(self, values: tuple[Any, ...], batch: Batch, part: jax.Array | None) -> _Forward:
        """The forward pass of one device; its pull-back is not packed yet."""
        params, frozen_params, norm_stats, step = values
        keys = self._noise_keys(batch.images.shape[0], step, part)
        batch = self._cut(batch, part)
        inputs = self.functions.inputs(batch)

        def predict(params: FlatParams) -> Any:
            network = self.functions.bind(params | frozen_params, norm_stats)
            predictions = network(*inputs, people=batch.targets, noise=DropoutNoise(keys))
            return predictions, moving_statistics(network)

        predictions, pull_back, statistics = jax.vjp(predict, params, has_aux=True)
        with jax.named_scope("matching"):
            problem = self.objective.prepare(predictions, batch)
        if self.config.skip_nonfinite:
            # the step finds out by itself, and no matcher has to cope
            problem = jax.tree.map(
                lambda x: jnp.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0), problem
            )
        return _Forward(problem, predictions, pull_back, statistics)

    def _predict(self, state: TrainState, batch: Batch, part: jax.Array | None) -> _Forward:
        self._require_divisible(batch)

        def first_half(values, batch, part):
            forward = self._forward(values, batch, part)
            pull_back = PullBack.pack(forward.pull_back, _merged(values))
            return add_axis(dataclasses.replace(forward, pull_back=pull_back))

        return self._shard(first_half, in_specs=(P(), BATCH, P()), out_specs=BATCH)(
            _values(state), batch, part
        )

    def _require_divisible(self, batch: Batch) -> None:
        size, parts = batch.images.shape[0], self.config.accumulate
        if size % (self.mesh.size * parts):
            raise UserError(
                f"a batch of {size} cannot be cut into {parts} part(s) on each of "
                f"{self.mesh.size} device(s): use a multiple of {parts * self.mesh.size}"
            )

    def _gradients(
        self,
        state: TrainState,
        forward: _Forward | None,
        solved: Any,
        batch: Batch,
        part: jax.Array | None,
        totals: dict[str, jax.Array],
    ) -> tuple[FlatParams, LossSums]:
        """Gradients and loss sums of each device's images, not summed over devices: a leading axis
        of one per device. Without `forward` the forward pass is a part of it.
        """
        self._require_divisible(batch)

        def gradients(values, forward, solved, batch, part, totals):
            if forward is None:
                forward = self._forward(values, batch, part)
                solved, pull_back = forward.problem, forward.pull_back
            else:
                forward, solved = drop_axis((forward, solved))
                pull_back = forward.pull_back.unpack(_merged(values))
            batch = self._cut(batch, part)

            def objective(predictions):
                sums = self.objective.loss_sums(predictions, batch, solved, totals)
                return sums.terms["total"], sums

            with jax.named_scope("losses"):
                # integers among the predictions (who a query is made of) have no gradient
                cotangents, sums = jax.grad(objective, has_aux=True, allow_int=True)(
                    forward.predictions
                )
            finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(forward.predictions)]
            sums.terms["nonfinite"] = (~jnp.stack(finite).all()).astype(jnp.float32)
            (grads,) = pull_back(cotangents)
            return add_axis((grads, dataclasses.replace(sums, statistics=forward.statistics)))

        in_specs = (P(), BATCH, BATCH, BATCH, P(), P())
        return self._shard(gradients, in_specs=in_specs, out_specs=BATCH)(
            _values(state), forward, solved, batch, part, totals
        )

    def _finish_whole(self, state: TrainState, forward: _Forward | None, solved: Any, batch: Batch):
        totals = self.objective.totals(batch)
        grads, sums = self._gradients(state, forward, solved, batch, None, totals)
        return self._update(state, grads, [sums], totals)

    def _finish_parts(
        self, state: TrainState, grads: FlatParams, parts: list[LossSums], batch: Batch
    ):
        return self._update(state, grads, parts, self.objective.totals(batch))

    def _add_gradients(
        self,
        total: FlatParams,
        state: TrainState,
        forward: _Forward | None,
        solved: Any,
        batch: Batch,
        part: jax.Array,
    ):
        totals = self.objective.totals(batch)
        grads, sums = self._gradients(state, forward, solved, batch, part, totals)
        return jax.tree.map(jnp.add, total, grads), sums

    def _sum_over_devices(
        self, grads: FlatParams, parts: list[LossSums]
    ) -> tuple[FlatParams, LossSums]:
        """A gradient ends up split as its parameter is; the sums end up everywhere."""
        rules, min_size = self.config.shard_rules, self.config.shard_min_size
        specs = {
            path: spec_of(f"params/{path}", x.shape[1:], self.mesh, rules, min_size=min_size)
            for path, x in grads.items()
        }

        def add(grads: FlatParams, parts: list[LossSums]):
            whole = {path: grads[path][0] for path, spec in specs.items() if not any(spec)}
            sums = jax.tree.map(lambda *x: sum(y[0] for y in x), *parts)
            whole, sums = jax.lax.psum((whole, sums), AXES)
            return {
                path: whole[path] if path in whole else _scatter(grads[path][0], spec)
                for path, spec in specs.items()
            }, sums

        return self._shard(add, in_specs=(BATCH, BATCH), out_specs=(specs, P()))(grads, parts)

    def _update(
        self,
        state: TrainState,
        grads: FlatParams,
        parts: list[LossSums],
        totals: dict[str, jax.Array],
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, sums = self._sum_over_devices(grads, parts)
        terms, norms = sums.compute(), gradient_norms(grads)
        unsound = terms.pop("nonfinite") > 0
        unsound |= ~(jnp.isfinite(terms["total"]) & jnp.isfinite(norms["grad_norm"]))
        with jax.named_scope("optimizer"):
            skip = unsound & self.config.skip_nonfinite
            updates, opt_state = self.optimizer.update(
                grads, state.opt_state, state.params, skip=skip
            )
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema:
                average = moving_average(ema, params, state.step, decay=self.config.ema_decay)
                ema = jax.tree.map(lambda old, new: jnp.where(skip, old, new), ema, average)
            number = self.mesh.size * len(parts)  # each has moved the statistics by its own images
            moved = {
                path: jnp.where(skip, state.norm_stats[path], total / number)
                for path, total in sums.statistics.items()
            }
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            norm_stats=state.norm_stats | moved,
            opt_state=opt_state,
            ema=ema,
            skipped=jnp.where(unsound, state.skipped + 1, 0),
            skipped_total=state.skipped_total + unsound,
        )
        shardings = state_sharding(
            new, self.mesh, rules=self.config.shard_rules, min_size=self.config.shard_min_size
        )
        counts = {name: value for name, value in totals.items() if value.ndim == 0}
        metrics = terms | norms | counts | {"nonfinite": unsound.astype(jnp.float32)}
        return jax.lax.with_sharding_constraint(new, shardings), metrics


def make_train_step(
    functions: Network,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    objective: Objective,
    mesh: Mesh,
    seed: int,
    step_config: StepConfig | None = None,
) -> TrainStep:
    """Returns step(state, batch) -> (state, metrics); the state is donated. `batch` is global, as
    from `shard_batch`.

    Metrics, all float32 scalars of the global batch: the objective's loss terms, their `total`, and
    what it measures beside them, `grad_norm` before clipping, the same of each part of the network
    (`grad_norm/backbone` ...), and `nonfinite`: 1 where the loss, a prediction or a gradient was
    not finite. Such a step leaves parameters, optimizer and average as they were and counts in
    `skipped`, unless `step_config.skip_nonfinite` is False.
    """
    config = step_config or StepConfig()
    return TrainStep(functions, optimizer, objective=objective, mesh=mesh, seed=seed, config=config)


def _values(state: TrainState) -> tuple[FlatParams, FlatParams, FlatParams, jax.Array]:
    """What a forward pass reads of the state; the rest may be spread over the devices."""
    return state.params, state.frozen_params, state.norm_stats, state.step


def _merged(values: tuple[Any, ...]) -> FlatParams:
    params, frozen_params, norm_stats, _ = values
    return params | frozen_params | norm_stats


def _scatter(x: jax.Array, spec: P) -> jax.Array:
    """Sum over all devices, of which each keeps its slice along the axis that `spec` names."""
    ((dimension, axis),) = ((i, axis) for i, axis in enumerate(spec) if axis)
    x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, tuple(other for other in AXES if other != axis))


def make_eval_step(
    functions: Network, *, mesh: Mesh
) -> Callable[[FlatParams, FlatParams, Batch], Predictions]:
    """Returns step(params, norm_stats, batch) -> predictions of the last layer, logits [1 b q k+1]
    and boxes [1 b q 4].
    """

    def predict(params: FlatParams, norm_stats: FlatParams, batch: Batch):
        network = functions.bind(params, norm_stats)
        out = network(*functions.inputs(batch), people=batch.targets)
        return Predictions(out.logits[-1:], out.boxes[-1:])

    sharded = jax.shard_map(
        predict, mesh=mesh, in_specs=(P(), P(), BATCH), out_specs=LAYERED, check_vma=False
    )
    return jax.jit(sharded)
