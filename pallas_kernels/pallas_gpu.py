"""Multi-scale deformable attention as Pallas GPU kernels, forward and backward. The only file that
knows Pallas' Triton backend.

One program handles a block of queries of one head of one image; blocks are the fastest grid axis,
so that one head's values stay in the cache. A program computes coordinates once a query and point,
gathers whole rows of `d` values for the four corners, and keeps its sums in float32 registers.
Softmax and locations are part of the kernel. The backward kernel computes everything again from the
inputs and adds rows to grad_value atomically.

Triton is deprecated as a Pallas backend from jax 0.11 on. The ways out, when it goes: the same two
    kernels through jax-triton (its load, store and
atomic_add map one to one), or Mosaic GPU on devices that gather rows in hardware (Blackwell; on
Hopper it cannot express this gather).
"""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels import tiles
from pallas_kernels.reference import SpatialShapes, level_sizes


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a kernel is compiled for, besides the shapes of its arguments."""

    spatial_shapes: SpatialShapes
    softmax: bool  # True: scores are logits; False: they are the weights
    interpret: bool = False  # run the kernel's steps as XLA operations, on any platform
    tile: tiles.Tile | None = None  # None: from the table
    # False: without the partitioning rules, which can only be lowered where there are devices
    partitioned: bool = True


def unsupported_reason(value: Any, offsets: Any, *, platform: str) -> str | None:
    """The reason why these kernels cannot run here, or None if they can."""
    if platform != "gpu":
        return f"it needs a GPU, and jax runs on {platform}"
    if not all(isinstance(size, int) for size in (*value.shape, *offsets.shape)):
        return "sizes must be static"
    if value.dtype not in (jnp.float32, jnp.bfloat16):
        return f"values must be float32 or bfloat16, not {value.dtype}"
    if value.shape[-1] > 128:
        return f"heads of {value.shape[-1]} do not fit (at most 128)"
    if max(value.size, offsets.size) >= 2**31:
        return "32-bit indices do not reach this far: use a smaller batch"
    return None


def deformable_attention(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    sampling_locations: Float[Array, "b q n l p 2"],
    attention_weights: Float[Array, "b q n l p"],
    *,
    interpret: bool = False,
    tile: tiles.Tile | None = None,
    partitioned: bool = True,
) -> Float[Array, "b q n*d"]:
    """See `pallas_kernels.deformable_attention`. For tests and tuning, the fields of `_Static`."""
    b, q, _, l = attention_weights.shape[:4]
    origin = jnp.full((b, q, l, 2), -0.5, jnp.float32)
    offsets = (
        sampling_locations.astype(jnp.float32)
        * level_sizes(spatial_shapes, jnp.float32)[:, None, :]
    )
    return _attend(
        _Static(tuple(spatial_shapes), False, interpret, tile, partitioned),
        value,
        origin,
        offsets,
        attention_weights,
    )


def deformable_attention_from_offsets(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Array, "b q l 2"],
    offsets: Float[Array, "b q n l p 2"],
    logits: Float[Array, "b q n l p"],
    *,
    interpret: bool = False,
    tile: tiles.Tile | None = None,
    partitioned: bool = True,
) -> Float[Array, "b q n*d"]:
    """See `pallas_kernels.deformable_attention`. For tests and tuning, the fields of `_Static`."""
    origin = reference_points.astype(jnp.float32) * level_sizes(spatial_shapes, jnp.float32) - 0.5
    return _attend(
        _Static(tuple(spatial_shapes), True, interpret, tile, partitioned),
        value,
        origin,
        offsets,
        logits,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, value, origin, offsets, scores):
    """Pixels are origin [b q l 2] + offsets [b q n l p 2]."""
    if static.partitioned:
        out = _partitioned_forward(value, origin, offsets, scores, static)
    else:
        out = _forward_call(static, value, origin, offsets, scores)
    return out.reshape(*out.shape[:2], -1)


def _attend_forward(static: _Static, *inputs):
    return _attend(static, *inputs), inputs


def _attend_backward(static: _Static, inputs, cotangent):
    value, origin, offsets, scores = inputs
    cotangent = cotangent.reshape(*cotangent.shape[:2], *value.shape[2:])
    if static.partitioned:
        grad_value, grad_offsets, grad_scores = _partitioned_backward(
            value, origin, offsets, scores, cotangent, static
        )
    else:
        grad_value, grad_offsets, grad_scores = _backward_call(
            static, value, origin, offsets, scores, cotangent
        )
    grad_origin = grad_offsets.sum((2, 4))
    return (
        grad_value.astype(value.dtype),
        grad_origin,
        grad_offsets.astype(offsets.dtype),
        grad_scores.astype(scores.dtype),
    )


_attend.defvjp(_attend_forward, _attend_backward)


# ---- calls: one device's shard ----


def _forward_call(static: _Static, value, origin, offsets, scores):
    grid, kernel, parameters = _plan(static, "forward", _forward_kernel, value, scores)
    out = jax.ShapeDtypeStruct(
        (scores.size // math.prod(scores.shape[3:]) * value.shape[3],), value.dtype
    )
    flat = [x.reshape(-1) for x in (value, origin, offsets, scores)]
    out = pl.pallas_call(kernel, out, grid=grid, name="deformable_attention_forward", **parameters)(
        *flat
    )
    return out.reshape(*scores.shape[:3], value.shape[3])


def _backward_call(static: _Static, value, origin, offsets, scores, cotangent):
    grid, kernel, parameters = _plan(static, "backward", _backward_kernel, value, scores)
    outputs = [jax.ShapeDtypeStruct((x.size,), jnp.float32) for x in (value, offsets, scores)]
    flat = [x.reshape(-1) for x in (value, origin, offsets, scores, cotangent)]
    zeros = jnp.zeros(
        value.size, jnp.float32
    )  # grad_value is added to, so it comes in as zeros and goes out as the same buffer
    call = pl.pallas_call(
        kernel,
        outputs,
        grid=grid,
        name="deformable_attention_backward",
        input_output_aliases={5: 0},
        **parameters,
    )
    return tuple(
        gradient.reshape(x.shape)
        for gradient, x in zip(call(*flat, zeros), (value, offsets, scores), strict=True)
    )


def _plan(static: _Static, direction: str, kernel, value, scores):
    """Grid, kernel with its sizes bound, and compiler parameters that select the Triton backend
    whatever the version's default.
    """
    # Announced on every lowering; the module's docstring is the answer to it.
    warnings.filterwarnings(
        "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
    )
    b, q, n, l, p = scores.shape
    device_kind = "interpreter" if static.interpret else jax.devices()[0].device_kind
    tile = static.tile or tiles.choose(device_kind, direction, value.dtype.name, q)
    sizes = _Sizes(static.spatial_shapes, value.shape[1], n, value.shape[3], q, l, p, tile.queries)
    parameters = {
        "compiler_params": plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        "interpret": static.interpret,
    }
    return (
        (pl.cdiv(q, tile.queries), n, b),
        functools.partial(kernel, sizes, static.softmax, static.interpret),
        parameters,
    )


# ---- kernels: all references are flat, tiles are powers of two ----


@dataclasses.dataclass(frozen=True)
class _Sizes:
    spatial_shapes: SpatialShapes
    s: int
    n: int
    d: int
    q: int
    l: int
    p: int
    block: int

    def program(self):
        """This program's queries, counted over the batch; which of them exist; its head and image."""
        query, head, image = (
            pl.program_id(0) * self.block + jnp.arange(self.block, dtype=jnp.int32),
            pl.program_id(1),
            pl.program_id(2),
        )
        return image * self.q + query, query < self.q, head, image

    def lanes(self):
        lane = jnp.arange(pl.next_power_of_2(self.d), dtype=jnp.int32)
        return lane, lane < self.d

    def samples(self):
        sample = jnp.arange(pl.next_power_of_2(self.l * self.p), dtype=jnp.int32)
        return sample, sample < self.l * self.p


def _load_scores(sizes: _Sizes, softmax: bool, scores_ref, row):
    """All weights of the block [queries, samples], and a function that loads those of one sample
    [queries].
    """
    sample, exists = sizes.samples()
    count = sizes.l * sizes.p
    exists = jnp.broadcast_to(exists[None, :], (sizes.block, sample.size))
    at = row[:, None] * count + sample[None, :]
    scores = plgpu.load(scores_ref.at[at], mask=exists, other=0.0).astype(jnp.float32)
    if not softmax:
        return jnp.where(exists, scores, 0.0), lambda k: plgpu.load(
            scores_ref.at[row * count + k]
        ).astype(jnp.float32)
    scores = jnp.where(exists, scores, -jnp.inf)
    top = jnp.max(scores, axis=1)
    powers = jnp.exp(scores - top[:, None])
    scale = 1.0 / jnp.sum(powers, axis=1)
    return (
        powers * scale[:, None],
        lambda k: (
            jnp.exp(plgpu.load(scores_ref.at[row * count + k]).astype(jnp.float32) - top) * scale
        ),
    )


def _corners(height: int, width: int, x, y):
    """For the four pixels around (x, y): token in the level, weight, whether on the map, and the
    derivatives of the weight by x and y.
    """
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for what is not finite, too
    x, y = jnp.where(inside, x, 0.0), jnp.where(inside, y, 0.0)
    left, top = jnp.floor(x), jnp.floor(y)
    dx, dy = x - left, y - top
    column, row = left.astype(jnp.int32), top.astype(jnp.int32)
    for down, (weight_y, slope_y) in enumerate(((1 - dy, -1.0), (dy, 1.0))):
        for right, (weight_x, slope_x) in enumerate(((1 - dx, -1.0), (dx, 1.0))):
            on_map = (
                inside
                & (column + right >= 0)
                & (column + right < width)
                & (row + down >= 0)
                & (row + down < height)
            )
            token = jnp.clip(row + down, 0, height - 1) * width + jnp.clip(
                column + right, 0, width - 1
            )
            yield token, weight_x * weight_y, on_map, slope_x * weight_y, slope_y * weight_x


def _for_each_point(sizes: _Sizes, origin_ref, offsets_ref, query, row, visit, carry):
    """carry = visit(corners, first token of the level, sample number, carry), looping over the
    points of each level.
    """
    first = 0
    for level, (height, width) in enumerate(sizes.spatial_shapes):
        at = (query * sizes.l + level) * 2
        origin_x, origin_y = plgpu.load(origin_ref.at[at]), plgpu.load(origin_ref.at[at + 1])

        def point(
            k,
            carry,
            level=level,
            height=height,
            width=width,
            first=first,
            origin_x=origin_x,
            origin_y=origin_y,
        ):
            sample = level * sizes.p + k
            at = (row * (sizes.l * sizes.p) + sample) * 2
            x = origin_x + plgpu.load(offsets_ref.at[at]).astype(jnp.float32)
            y = origin_y + plgpu.load(offsets_ref.at[at + 1]).astype(jnp.float32)
            return visit(_corners(height, width, x, y), first, sample, carry)

        carry = jax.lax.fori_loop(0, sizes.p, point, carry)
        first += height * width
    return carry


def _load_rows(sizes: _Sizes, value_ref, row):
    """The rows [queries, lanes] in float32, and their addresses. All rows exist: only lanes past
    `d` need a mask.
    """
    lane, exists = sizes.lanes()
    at = row[:, None] * sizes.d + lane[None, :]
    if lane.size == sizes.d:
        return plgpu.load(value_ref.at[at]).astype(jnp.float32), at
    return plgpu.load(
        value_ref.at[at], mask=jnp.broadcast_to(exists[None, :], at.shape), other=0.0
    ).astype(jnp.float32), at


def _forward_kernel(
    sizes: _Sizes,
    softmax: bool,
    interpret: bool,
    value_ref,
    origin_ref,
    offsets_ref,
    scores_ref,
    out_ref,
):
    query, real, head, image = sizes.program()
    out_row = query * sizes.n + head
    query = jnp.where(
        real, query, 0
    )  # loads need an address that exists; masked stores keep theirs, each its own
    row = query * sizes.n + head
    _, weight_of = _load_scores(sizes, softmax, scores_ref, row)

    def add_point(corners, first, sample, total):
        attention = weight_of(sample)
        for token, weight, on_map, _, _ in corners:
            rows, _ = _load_rows(
                sizes, value_ref, (image * sizes.s + first + token) * sizes.n + head
            )
            total += rows * jnp.where(on_map, attention * weight, 0.0)[:, None]
        return total

    lane, exists = sizes.lanes()
    total = _for_each_point(
        sizes,
        origin_ref,
        offsets_ref,
        query,
        row,
        add_point,
        jnp.zeros((sizes.block, lane.size), jnp.float32),
    )
    plgpu.store(
        out_ref.at[out_row[:, None] * sizes.d + lane[None, :]],
        total.astype(out_ref.dtype),
        mask=real[:, None] & exists[None, :],
    )


def _backward_kernel(
    sizes: _Sizes,
    softmax: bool,
    interpret: bool,
    value_ref,
    origin_ref,
    offsets_ref,
    scores_ref,
    cotangent_ref,
    _,
    grad_value_ref,
    grad_offsets_ref,
    grad_scores_ref,
):
    query, real, head, image = sizes.program()
    out_row = query * sizes.n + head
    query = jnp.where(real, query, 0)
    row = query * sizes.n + head
    weights, weight_of = _load_scores(sizes, softmax, scores_ref, row)
    lane, lane_exists = sizes.lanes()
    written = real[:, None] & lane_exists[None, :]
    g = plgpu.load(
        cotangent_ref.at[row[:, None] * sizes.d + lane[None, :]], mask=written, other=0.0
    ).astype(jnp.float32)
    column, sample_exists = sizes.samples()

    def add_point(corners, first, sample, gradients):
        attention = weight_of(sample)
        by_x = by_y = by_weight = jnp.zeros_like(attention)
        for token, weight, on_map, slope_x, slope_y in corners:
            rows, at = _load_rows(
                sizes, value_ref, (image * sizes.s + first + token) * sizes.n + head
            )
            score = jnp.where(on_map, jnp.sum(rows * g, axis=1), 0.0)
            by_x, by_y, by_weight = (
                by_x + slope_x * score,
                by_y + slope_y * score,
                by_weight + weight * score,
            )
            _add_rows(
                grad_value_ref,
                at,
                (attention * weight)[:, None] * g,
                written & on_map[:, None],
                interpret,
            )
        here = column[None, :] == sample
        new = (attention * by_x, attention * by_y, by_weight)
        return tuple(
            jnp.where(here, x[:, None], tile) for x, tile in zip(new, gradients, strict=True)
        )

    empty = jnp.zeros((sizes.block, column.size), jnp.float32)
    by_x, by_y, by_weight = _for_each_point(
        sizes, origin_ref, offsets_ref, query, row, add_point, (empty, empty, empty)
    )
    if softmax:
        by_weight = weights * (by_weight - jnp.sum(weights * by_weight, axis=1)[:, None])
    at = out_row[:, None] * (sizes.l * sizes.p) + column[None, :]
    written = real[:, None] & sample_exists[None, :]
    plgpu.store(grad_offsets_ref.at[2 * at], by_x, mask=written)
    plgpu.store(grad_offsets_ref.at[2 * at + 1], by_y, mask=written)
    plgpu.store(grad_scores_ref.at[at], by_weight, mask=written)


def _add_rows(grad_ref, at, rows, mask, interpret: bool):
    if interpret:  # the interpreter knows no mask here, and keeps one of several equal addresses
        everything = grad_ref[...]
        grad_ref[...] = everything.at[at].add(jnp.where(mask, rows, 0.0))
    else:
        plgpu.atomic_add(grad_ref, (at,), rows, mask=mask)


# ---- sharding: a kernel is opaque to the partitioner, which would gather its arguments; these rule


def _specs(images, heads):
    value, origin, points = (
        P(images, None, heads, None),
        P(images, None, None, None),
        P(images, None, heads, None, None),
    )
    return value, origin, P(*points, None), points


def _partition(call, num_outputs: int):
    def partition(static, mesh, arguments, results):
        images, _, heads, _ = (*arguments[0].sharding.spec, None, None, None, None)[:4]
        value, origin, offsets, scores = _specs(images, heads)
        inputs = (value, origin, offsets, scores, value)[: len(arguments)]
        outputs = value if num_outputs == 1 else (value, offsets, scores)
        place = functools.partial(
            jax.tree.map, lambda spec: NamedSharding(mesh, spec), is_leaf=lambda x: isinstance(x, P)
        )
        return mesh, functools.partial(call, static), place(outputs), place(inputs)

    return partition


@functools.partial(custom_partitioning, static_argnums=(4,))
def _partitioned_forward(value, origin, offsets, scores, static):
    return _forward_call(static, value, origin, offsets, scores)


@functools.partial(custom_partitioning, static_argnums=(5,))
def _partitioned_backward(value, origin, offsets, scores, cotangent, static):
    return _backward_call(static, value, origin, offsets, scores, cotangent)


_FIXED = ("s", "d", "q", "l", "xy", "p")  # in order of appearance
_INPUTS = "b s n d, b q l xy, b q n l p xy, b q n l p"
_partitioned_forward.def_partition(
    _partition(_forward_call, 1),
    sharding_rule=f"{_INPUTS} -> b q n d",
    need_replication_factors=_FIXED,
)
_partitioned_backward.def_partition(
    _partition(_backward_call, 3),
    sharding_rule=f"{_INPUTS}, b q n d -> b s n d, b q n l p xy, b q n l p",
    need_replication_factors=_FIXED,
)
