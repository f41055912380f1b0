"""One training step and one evaluation step, sharded over the mesh axis 'data'.

A training step is two compiled halves with SciPy between them: the first half predicts, computes the matching cost and keeps the pull-back of
its derivative; the host assigns people to queries, each process for the shards it holds; the second half computes the losses, pulls them back
and updates. Inside shard_map every device sees its own images only, so nothing is gathered: the one communication is a sum of gradients.
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
from dsct_jax.losses import LossConfig, count_boxes, detection_losses
from dsct_jax.matcher import MatcherConfig, assign_on_host, matching_cost
from dsct_jax.model.layers import DropoutNoise
from dsct_jax.preprocess import normalize
from dsct_jax.state import Flat, ModelFunctions

AXIS = "data"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes. Random numbers and the position in the data are functions of the seed and `step`."""

    step: Any  # int32 []
    params: Flat  # trained parameters
    fixed: Flat  # parameters that the optimizer's rules freeze
    frozen: Flat  # statistics of frozen norms
    opt_state: Any


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or of those given) along 'data'."""
    return Mesh(np.array(devices or jax.devices()), (AXIS,))


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's part of a global batch -> global arrays, split along their first axis."""
    sharding = NamedSharding(mesh, P(AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies of every leaf on all devices."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def model_input(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Normalised images and their padding mask; images that are floating point already count as normalised."""
    mask = padding_mask(batch.sizes, *batch.images.shape[1:3])
    images = batch.images if jnp.issubdtype(batch.images.dtype, jnp.floating) else normalize(batch.images, mask)
    return images, mask


def assign_shards(cost: jax.Array, valid: jax.Array, mesh: Mesh) -> jax.Array:
    """Hungarian assignment of each addressable shard on the host: cost [layers b q t] -> target of each query or -1, int32 [layers b q]."""
    sharding = NamedSharding(mesh, P(None, AXIS))
    masks = {shard.device: shard.data for shard in valid.addressable_shards}
    parts = [
        jax.device_put(assign_on_host(np.asarray(shard.data), np.asarray(masks[shard.device])), shard.device) for shard in cost.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(cost.shape[:3], sharding, parts)


def make_train_step(
    functions: ModelFunctions,
    optimizer: optax.GradientTransformation,
    *,
    loss: LossConfig,
    matcher: MatcherConfig,
    multi_label: bool,
    mesh: Mesh,
    seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns step(state, batch) -> (state, metrics); the state is donated. `batch` is global, as from `shard_batch`."""

    def shard(f, *, in_specs, out_specs):
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def predict(params: Flat, fixed: Flat, frozen: Flat, batch: Batch, step: jax.Array):
        b = batch.images.shape[0]
        first = jax.lax.axis_index(AXIS) * b
        step_key = jax.random.fold_in(jax.random.key(seed), step)
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(first + jnp.arange(b))
        images, mask = model_input(batch)

        def forward(params):
            out = functions.bind(params | fixed, frozen)(images, mask, noise=DropoutNoise(keys))
            return out.logits, out.boxes

        (logits, boxes), pull_back = jax.vjp(forward, params)
        cost = matching_cost(logits, boxes, batch.targets, config=matcher, multi_label=multi_label)
        # What the pull-back holds has arbitrary shapes: a leading axis of 1 a device lets every leaf be split along 'data'.
        return cost, logits, boxes, jax.tree.map(lambda x: x[None], pull_back)

    def gradients(pull_back, logits, boxes, batch: Batch, assignment, num_boxes):
        pull_back = jax.tree.map(lambda x: x[0], pull_back)

        def objective(logits, boxes):
            # A filler that completes the last batch of an epoch is no negative example: logits this low cost nothing and learn nothing.
            logits = jnp.where(batch.real[None, :, None, None], logits, -100.0)
            terms = detection_losses(logits, boxes, batch.targets, assignment, num_boxes=num_boxes, config=loss, multi_label=multi_label)
            return terms["total"], terms

        cotangents, terms = jax.grad(objective, argnums=(0, 1), has_aux=True)(logits, boxes)
        (grads,) = pull_back(cotangents)
        terms = {k: v if k.startswith(("total", "loss_")) else v / mesh.size for k, v in terms.items()}  # sums add up, means are averaged
        return jax.lax.psum((grads, terms), AXIS)

    data, layered, replicated = P(AXIS), P(None, AXIS), P()
    first_half = jax.jit(
        lambda state, batch: shard(
            predict, in_specs=(replicated, replicated, replicated, data, replicated), out_specs=(layered, layered, layered, data)
        )(state.params, state.fixed, state.frozen, batch, state.step)
    )

    def second_half(state: TrainState, pull_back, logits, boxes, batch: Batch, assignment):
        num_boxes = count_boxes(batch.targets.valid)
        grads, terms = shard(gradients, in_specs=(data, layered, layered, data, layered, replicated), out_specs=(replicated, replicated))(
            pull_back, logits, boxes, batch, assignment, num_boxes
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = terms | {"grad_norm": optax.tree.norm(grads), "num_boxes": num_boxes}
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    second_half = jax.jit(second_half, donate_argnums=0)

    def step(state: TrainState, batch: Batch):
        cost, logits, boxes, pull_back = first_half(state, batch)
        assignment = assign_shards(cost, batch.targets.valid, mesh)
        return second_half(state, pull_back, logits, boxes, batch, assignment)

    step.first_half, step.second_half = first_half, second_half  # type: ignore[attr-defined]
    return step


def make_eval_step(functions: ModelFunctions, *, mesh: Mesh) -> Callable[[Flat, Flat, Batch], Predictions]:
    """Returns step(params, frozen, batch) -> predictions of the last layer, logits [1 b q k+1] and boxes [1 b q 4]."""

    def predict(params: Flat, frozen: Flat, batch: Batch):
        out = functions.bind(params, frozen)(*model_input(batch))
        return Predictions(out.logits[-1:], out.boxes[-1:])

    sharded = jax.shard_map(predict, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=P(None, AXIS), check_vma=False)
    return jax.jit(sharded)
