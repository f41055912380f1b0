"""One training step and one evaluation step, sharded over all devices of a mesh.

With the SciPy matcher a training step is two compiled halves with the host between them: the first
    half predicts, computes the matching cost and
keeps the pull-back of its derivative; the host assigns people to queries, each process for the
shards it holds; the second half computes the losses, pulls them back and updates. With the device
matcher the whole step is one program. Inside shard_map every device sees its own images only, so
nothing is gathered: the one communication is a sum of gradients (and, with shard rules, the
gathering of what they spread).
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

from dsct_jax.batch import Batch, Predictions, padding_mask
from dsct_jax.config import StepConfig as StepConfig
from dsct_jax.errors import UserError
from dsct_jax.model.build import FlatParams, Network
from dsct_jax.model.layers import DropoutNoise
from dsct_jax.parallel import AXES, BATCH, LAYERED, spec_of, state_sharding
from dsct_jax.preprocess import normalize
from dsct_jax.training.losses import LossConfig, LossSums, count_boxes, loss_sums
from dsct_jax.training.matching import (
    MatcherConfig,
    assign_on_device,
    assign_on_host,
    matching_cost,
)
from dsct_jax.training.optimizer import OptimizerConfig, make_optimizer, multipliers

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
    norm_stats: FlatParams  # statistics of frozen norms
    opt_state: Any
    ema: FlatParams = dataclasses.field(
        default_factory=dict
    )  # moving average of `params`, float32; {} = off
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


def model_input(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Normalised images and their padding mask; images that are floating point already count as
    normalised.
    """
    mask = padding_mask(batch.sizes, *batch.images.shape[1:3])
    images = (
        batch.images
        if jnp.issubdtype(batch.images.dtype, jnp.floating)
        else normalize(batch.images, mask)
    )
    return images, mask


def assign_shards(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """Hungarian assignment of each addressable shard on the host: cost [layers b q t] -> target of
    each query or -1, int32 [layers b q].
    """
    masks = {shard.device: shard.data for shard in valid.addressable_shards}
    parts = [
        jax.device_put(
            assign_on_host(np.asarray(shard.data), np.asarray(masks[shard.device])), shard.device
        )
        for shard in cost.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(cost.shape[:3], cost.sharding, parts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _PullBack:
    """A pull-back between two compiled functions: without the parameters that it refers to, which
    both have, and without anything twice.
    """

    kept: list[
        Any
    ]  # arbitrary shapes, after a leading axis of one a device by which every leaf is split
    places: tuple[int | str, ...] = dataclasses.field(
        metadata={"static": True}
    )  # of each leaf of the closure: in `kept`, or the parameter's path
    structure: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def pack(cls, pull_back: Any, parameters: FlatParams) -> "_PullBack":
        leaves, structure = jax.tree.flatten(pull_back)
        paths = {id(value): path for path, value in parameters.items()}
        unique = list({id(leaf): leaf for leaf in leaves if id(leaf) not in paths}.values())
        numbers = {id(leaf): number for number, leaf in enumerate(unique)}
        return cls(
            [leaf[None] for leaf in unique],
            tuple(paths.get(id(leaf), numbers.get(id(leaf), "")) for leaf in leaves),
            structure,
        )

    def unpack(self, parameters: FlatParams) -> Any:
        leaves = [
            parameters[place] if isinstance(place, str) else self.kept[place][0]
            for place in self.places
        ]
        return jax.tree.unflatten(self.structure, leaves)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Forward:
    """What the first half hands to the second, for one part of the batch."""

    cost: Any  # [layers b q t]; what is not finite is replaced, where such steps are skipped
    valid: Any  # [b t]
    logits: Any
    boxes: Any
    pull_back: Any  # _PullBack of (logits, boxes) with respect to the trained parameters


class TrainStep:
    """Callable (state, batch) -> (state, metrics), the state donated; made by `make_train_step`.

    `programs` names the jitted functions of a step: one or two without accumulation, two or three
        with.
    """

    def __init__(
        self,
        functions: Network,
        optimizer: optax.GradientTransformationExtraArgs,
        *,
        loss: LossConfig,
        matcher: MatcherConfig,
        multi_label: bool,
        mesh: Mesh,
        seed: int,
        config: StepConfig,
    ):
        self.functions, self.optimizer, self.loss, self.matcher = (
            functions,
            optimizer,
            loss,
            matcher,
        )
        self.multi_label, self.mesh, self.seed, self.config = multi_label, mesh, seed, config
        self.first_half = jax.jit(self._predict)
        self.second_half = jax.jit(self._finish_whole, donate_argnums=0)
        self.whole_on_device = jax.jit(self._whole_on_device, donate_argnums=0)
        self.add_gradients = jax.jit(self._add_gradients, donate_argnums=0)
        self.add_gradients_on_device = jax.jit(self._add_gradients_on_device, donate_argnums=0)
        self.update = jax.jit(self._finish_parts, donate_argnums=(0, 1))
        self.zeros = jax.jit(
            lambda params: jax.tree.map(
                lambda x: jnp.zeros((mesh.size, *x.shape), x.dtype), params
            ),
            out_shardings=NamedSharding(mesh, BATCH),
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        on_device = self.matcher.implementation == "device"
        if self.config.accumulate == 1:
            if on_device:
                return self.whole_on_device(state, batch)
            forward = self.first_half(state, batch, None)
            return self.second_half(
                state, forward, batch, assign_shards(forward.cost, forward.valid)
            )
        grads, parts = self.zeros(state.params), []
        for part in np.arange(self.config.accumulate, dtype=np.int32):
            if on_device:
                grads, sums = self.add_gradients_on_device(grads, state, batch, part)
            else:
                forward = self.first_half(state, batch, part)
                grads, sums = self.add_gradients(
                    grads, state, forward, batch, part, assign_shards(forward.cost, forward.valid)
                )
                del forward  # before the next one
            parts.append(sums)
        return self.update(state, grads, parts, batch.targets.valid)

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

    def _predict(self, state: TrainState, batch: Batch, part: jax.Array | None) -> _Forward:
        b = batch.images.shape[0] // self.mesh.size
        if b * self.mesh.size != batch.images.shape[0] or b % self.config.accumulate:
            raise UserError(
                f"a batch of {batch.images.shape[0]} cannot be cut into {self.config.accumulate} "
                f"part(s) on each of {self.mesh.size} device(s): "
                f"use a multiple of {self.config.accumulate * self.mesh.size}"
            )

        def predict(
            params: FlatParams,
            frozen_params: FlatParams,
            norm_stats: FlatParams,
            batch: Batch,
            step: jax.Array,
            part: jax.Array | None,
        ) -> _Forward:
            # Dropout is a function of the step and of the image's number in the global batch,
            # however that is spread and cut.
            numbers = jax.lax.axis_index(AXES) * b + jnp.arange(b)
            step_key = jax.random.fold_in(jax.random.key(self.seed), step)
            keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(numbers)
            if part is not None:
                keys = jax.lax.dynamic_slice_in_dim(
                    keys, part * (b // self.config.accumulate), b // self.config.accumulate
                )
            batch = self._cut(batch, part)
            images, mask = model_input(batch)

            def forward(params):
                out = self.functions.bind(params | frozen_params, norm_stats)(
                    images, mask, noise=DropoutNoise(keys)
                )
                return out.logits, out.boxes

            (logits, boxes), pull_back = jax.vjp(forward, params)
            with jax.named_scope("matching"):
                cost = matching_cost(
                    logits, boxes, batch.targets, config=self.matcher, multi_label=self.multi_label
                )
            if (
                self.config.skip_nonfinite
            ):  # the step finds out by itself, and no matcher has to cope
                cost = jnp.nan_to_num(cost, nan=0.0, posinf=0.0, neginf=0.0)
            return _Forward(
                cost,
                batch.targets.valid,
                logits,
                boxes,
                _PullBack.pack(pull_back, params | frozen_params | norm_stats),
            )

        replicated, out_specs = P(), _Forward(LAYERED, BATCH, LAYERED, LAYERED, BATCH)
        in_specs = (replicated, replicated, replicated, BATCH, replicated, replicated)
        return self._shard(predict, in_specs=in_specs, out_specs=out_specs)(
            state.params, state.frozen_params, state.norm_stats, batch, state.step, part
        )

    def _gradients(
        self,
        state: TrainState,
        forward: _Forward,
        batch: Batch,
        part: Any,
        assignment: jax.Array,
        num_boxes: jax.Array,
    ) -> tuple[FlatParams, LossSums]:
        """Gradients and loss sums of each device's images, not summed over devices: a leading axis
        of one a device.
        """

        def gradients(
            parameters: FlatParams, forward: _Forward, batch: Batch, part, assignment, num_boxes
        ):
            pull_back = forward.pull_back.unpack(parameters)
            batch = self._cut(batch, part)

            def objective(logits, boxes):
                # A filler that completes the last batch of an epoch is no negative example: logits
                # this low cost nothing and learn nothing.
                logits = jnp.where(batch.real[None, :, None, None], logits, -100.0)
                sums = loss_sums(
                    logits,
                    boxes,
                    batch.targets,
                    assignment,
                    num_boxes=num_boxes,
                    config=self.loss,
                    multi_label=self.multi_label,
                )
                return sums.terms["total"], sums

            with jax.named_scope("losses"):
                cotangents, sums = jax.grad(objective, argnums=(0, 1), has_aux=True)(
                    forward.logits, forward.boxes
                )
            finite = jnp.isfinite(forward.logits).all() & jnp.isfinite(forward.boxes).all()
            sums.terms["nonfinite"] = (~finite).astype(jnp.float32)
            (grads,) = pull_back(cotangents)
            return jax.tree.map(lambda x: x[None], (grads, sums))

        in_specs = (
            P(),
            _Forward(LAYERED, BATCH, LAYERED, LAYERED, BATCH),
            BATCH,
            P(),
            LAYERED,
            P(),
        )
        parameters = state.params | state.frozen_params | state.norm_stats
        return self._shard(gradients, in_specs=in_specs, out_specs=BATCH)(
            parameters, forward, batch, part, assignment, num_boxes
        )

    def _assign(self, forward: _Forward) -> jax.Array:
        return self._shard(assign_on_device, in_specs=(LAYERED, BATCH), out_specs=LAYERED)(
            forward.cost, forward.valid
        )

    def _finish_whole(
        self, state: TrainState, forward: _Forward, batch: Batch, assignment: jax.Array
    ):
        num_boxes = count_boxes(batch.targets.valid)
        grads, sums = self._gradients(state, forward, batch, None, assignment, num_boxes)
        return self._update(state, grads, [sums], num_boxes)

    def _finish_parts(
        self, state: TrainState, grads: FlatParams, parts: list[LossSums], valid: jax.Array
    ):
        return self._update(state, grads, parts, count_boxes(valid))

    def _whole_on_device(self, state: TrainState, batch: Batch):
        forward = self._predict(state, batch, None)
        return self._finish_whole(state, forward, batch, self._assign(forward))

    def _add_gradients(
        self,
        total: FlatParams,
        state: TrainState,
        forward: _Forward,
        batch: Batch,
        part: jax.Array,
        assignment: jax.Array,
    ):
        grads, sums = self._gradients(
            state, forward, batch, part, assignment, count_boxes(batch.targets.valid)
        )
        return jax.tree.map(jnp.add, total, grads), sums

    def _add_gradients_on_device(
        self, total: FlatParams, state: TrainState, batch: Batch, part: jax.Array
    ):
        forward = self._predict(state, batch, part)
        return self._add_gradients(total, state, forward, batch, part, self._assign(forward))

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
        self, state: TrainState, grads: FlatParams, parts: list[LossSums], num_boxes: jax.Array
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
            average = (
                moving_average(state.ema, params, state.step, decay=self.config.ema_decay)
                if state.ema
                else {}
            )
            ema = jax.tree.map(lambda old, new: jnp.where(skip, old, new), state.ema, average)
        new = TrainState(
            step=state.step + 1,
            params=params,
            frozen_params=state.frozen_params,
            norm_stats=state.norm_stats,
            opt_state=opt_state,
            ema=ema,
            skipped=jnp.where(unsound, state.skipped + 1, 0),
            skipped_total=state.skipped_total + unsound,
        )
        shardings = state_sharding(
            new, self.mesh, rules=self.config.shard_rules, min_size=self.config.shard_min_size
        )
        metrics = terms | norms | {"num_boxes": num_boxes, "nonfinite": unsound.astype(jnp.float32)}
        return jax.lax.with_sharding_constraint(new, shardings), metrics


def make_train_step(
    functions: Network,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    loss: LossConfig,
    matcher: MatcherConfig,
    multi_label: bool,
    mesh: Mesh,
    seed: int,
    step_config: StepConfig | None = None,
) -> TrainStep:
    """Returns step(state, batch) -> (state, metrics); the state is donated. `batch` is global, as
    from `shard_batch`.

    Metrics, all float32 scalars of the global batch: the loss terms of every layer and their
        `total`, what `loss_sums` measures beside them,
    `grad_norm` before clipping, the same of each part of the network (`grad_norm/backbone` ...),
    `num_boxes`, and `nonfinite`: 1 where the loss, a prediction or a gradient was not finite. Such
    a step leaves parameters, optimizer and average as they were and counts in `skipped`, unless
    `step_config.skip_nonfinite` is False.
    """
    return TrainStep(
        functions,
        optimizer,
        loss=loss,
        matcher=matcher,
        multi_label=multi_label,
        mesh=mesh,
        seed=seed,
        config=step_config or StepConfig(),
    )


def _scatter(x: jax.Array, spec: P) -> jax.Array:
    """Sum over all devices, of which each keeps its slice along the axis that `spec` names."""
    ((dimension, axis),) = ((i, axis) for i, axis in enumerate(spec) if axis)
    x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, tuple(other for other in AXES if other != axis))


def gradient_norms(grads: FlatParams) -> dict[str, jax.Array]:
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
    ema: FlatParams, params: FlatParams, step: jax.Array, *, decay: float
) -> FlatParams:
    """Moving average after one more step; early ones move it faster, by a decay of (1 + step) / (10
    + step), as in TensorFlow.
    """
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, ema, params)


def make_eval_step(
    functions: Network, *, mesh: Mesh
) -> Callable[[FlatParams, FlatParams, Batch], Predictions]:
    """Returns step(params, frozen, batch) -> predictions of the last layer, logits [1 b q k+1] and
    boxes [1 b q 4].
    """

    def predict(params: FlatParams, norm_stats: FlatParams, batch: Batch):
        out = functions.bind(params, norm_stats)(*model_input(batch))
        return Predictions(out.logits[-1:], out.boxes[-1:])

    sharded = jax.shard_map(
        predict, mesh=mesh, in_specs=(P(), P(), BATCH), out_specs=LAYERED, check_vma=False
    )
    return jax.jit(sharded)
