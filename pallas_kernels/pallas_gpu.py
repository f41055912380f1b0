"""Multi-scale deformable attention as Pallas GPU kernels, forward and backward. The only file that
knows Pallas' Triton backend.

One program handles a block of queries of one head of one image; blocks are the fastest grid axis,
so that one head's values stay in the cache. A program gathers whole rows of `d` values for the four
corners of each point and keeps its sums in float32 registers; softmax and locations are part of it.
The backward kernel recomputes everything from the inputs and adds rows to grad_value atomically.

Triton is deprecated as a Pallas backend from jax 0.11 on. The ways out: the same kernels through
jax-triton (load, store and atomic_add map one to one), or Mosaic GPU on devices that gather rows in
hardware (Blackwell; on Hopper it cannot express this gather).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.reference import SpatialShapes, level_sizes


class Tile(NamedTuple):
    """What one program of a kernel works on."""

    queries: int  # power of two
    warps: int


# Legal for every shape. Measured on an H100 by `python -m benchmarks.tune_tiles`.
FEW_QUERIES_TILE = Tile(4, 4)
MANY_QUERIES_TILE = Tile(8, 2)
MANY_QUERIES = 4096  # from here on one program per query block fills any GPU, whatever the block


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a kernel is compiled for, besides the shapes of its arguments."""

    spatial_shapes: SpatialShapes
    softmax: bool  # True: scores are logits; False: they are the weights
    interpret: bool = False  # run the kernel's steps as XLA operations, on any platform
    tile: Tile | None = None  # None: one of the two above
    partitioned: bool = True  # False: without rules that are lowered only where devices are


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
    **options: Any,
) -> Float[Array, "b q n*d"]:
    """See `pallas_kernels.deformable_attention`. `options`, for tests and tuning: of `_Static`."""
    b, q, _, l = attention_weights.shape[:4]
    static = _Static(tuple(spatial_shapes), softmax=False, **options)
    origin = jnp.full((b, q, l, 2), -0.5, jnp.float32)
    sizes = level_sizes(spatial_shapes, jnp.float32)[:, None, :]
    offsets = sampling_locations.astype(jnp.float32) * sizes
    return _attend(static, value, origin, offsets, attention_weights)


def deformable_attention_from_offsets(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Array, "b q l 2"],
    offsets: Float[Array, "b q n l p 2"],
    logits: Float[Array, "b q n l p"],
    **options: Any,
) -> Float[Array, "b q n*d"]:
    """See `pallas_kernels.deformable_attention`. `options`, for tests and tuning: of `_Static`."""
    static = _Static(tuple(spatial_shapes), softmax=True, **options)
    origin = reference_points.astype(jnp.float32) * level_sizes(spatial_shapes, jnp.float32) - 0.5
    return _attend(static, value, origin, offsets, logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, value, origin, offsets, scores):
    """Pixels are origin [b q l 2] + offsets [b q n l p 2]."""
    call = _partitioned_forward if static.partitioned else _forward_call
    out = call(static, value, origin, offsets, scores)
    return out.reshape(*out.shape[:2], -1)


def _attend_forward(static: _Static, *inputs):
    return _attend(static, *inputs), inputs


def _attend_backward(static: _Static, inputs, cotangent):
    value, origin, offsets, scores = inputs
    cotangent = cotangent.reshape(*cotangent.shape[:2], *value.shape[2:])
    call = _partitioned_backward if static.partitioned else _backward_call
    grad_value, grad_offsets, grad_scores = call(static, value, origin, offsets, scores, cotangent)
    return (
        grad_value.astype(value.dtype),
        grad_offsets.sum((2, 4)),
        grad_offsets.astype(offsets.dtype),
        grad_scores.astype(scores.dtype),
    )


_attend.defvjp(_attend_forward, _attend_backward)


# ---- calls: one device's shard ----


def _forward_call(static: _Static, value, origin, offsets, scores):
    shape = (*scores.shape[:3], value.shape[3])
    out = jax.ShapeDtypeStruct((math.prod(shape),), value.dtype)
    call = _pallas_call(static, "forward", _forward_kernel, out, value, scores)
    return call(*(x.reshape(-1) for x in (value, origin, offsets, scores))).reshape(shape)


def _backward_call(static: _Static, value, origin, offsets, scores, cotangent):
    inputs, differentiated = (value, origin, offsets, scores, cotangent), (value, offsets, scores)
    out = [jax.ShapeDtypeStruct((x.size,), jnp.float32) for x in differentiated]
    # grad_value is added to, so it comes in as zeros and goes out as the same buffer
    aliases = {"input_output_aliases": {len(inputs): 0}}
    call = _pallas_call(static, "backward", _backward_kernel, out, value, scores, **aliases)
    found = call(*(x.reshape(-1) for x in inputs), jnp.zeros(value.size, jnp.float32))
    return tuple(x.reshape(like.shape) for x, like in zip(found, differentiated, strict=True))


def _pallas_call(static: _Static, direction: str, kernel, out, value, scores, **options):
    """The kernel with its sizes bound; its parameters select Triton in every version."""
    b, q, n, l, p = scores.shape
    tile = static.tile or (MANY_QUERIES_TILE if q >= MANY_QUERIES else FEW_QUERIES_TILE)
    _, s, _, d = value.shape
    sizes = _Sizes(static, s, n, d, q, l, p, block=tile.queries)
    return pl.pallas_call(
        functools.partial(kernel, sizes),
        out,
        grid=(pl.cdiv(q, tile.queries), n, b),
        name=f"deformable_attention_{direction}",
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=static.interpret,
        **options,
    )


# ---- kernels: all references are flat, tiles are powers of two ----


@dataclasses.dataclass(frozen=True)
class _Sizes:
    static: _Static
    s: int
    n: int
    d: int
    q: int
    l: int
    p: int
    block: int

    def program(self):
        """This program's queries, counted over the batch, and which exist; its head and image."""
        query = pl.program_id(0) * self.block + jnp.arange(self.block, dtype=jnp.int32)
        head, image = pl.program_id(1), pl.program_id(2)
        return image * self.q + query, query < self.q, head, image

    def lanes(self):
        lane = jnp.arange(pl.next_power_of_2(self.d), dtype=jnp.int32)
        return lane, lane < self.d

    def samples(self):
        sample = jnp.arange(pl.next_power_of_2(self.l * self.p), dtype=jnp.int32)
        return sample, sample < self.l * self.p


def _load(ref, at, **mask) -> jax.Array:
    return plgpu.load(ref.at[at], **mask).astype(jnp.float32)


def _load_scores(sizes: _Sizes, scores_ref, row):
    """All weights of the block [queries, samples], and a loader of one sample's [queries]."""
    sample, exists = sizes.samples()
    start = row * (sizes.l * sizes.p)
    exists = jnp.broadcast_to(exists[None, :], (sizes.block, sample.size))
    scores = _load(scores_ref, start[:, None] + sample[None, :], mask=exists, other=0.0)
    if not sizes.static.softmax:
        return jnp.where(exists, scores, 0.0), lambda k: _load(scores_ref, start + k)
    scores = jnp.where(exists, scores, -jnp.inf)
    top = jnp.max(scores, axis=1)
    powers = jnp.exp(scores - top[:, None])
    scale = 1.0 / jnp.sum(powers, axis=1)

    def weight_of(k):
        return jnp.exp(_load(scores_ref, start + k) - top) * scale

    return powers * scale[:, None], weight_of


def _corners(height: int, width: int, x, y):
    """Of four pixels: token in the level, weight, whether on the map, the weight's slopes."""
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for what is not finite, too
    x, y = jnp.where(inside, x, 0.0), jnp.where(inside, y, 0.0)
    left, top = jnp.floor(x), jnp.floor(y)
    dx, dy = x - left, y - top
    for down, (weight_y, slope_y) in enumerate(((1 - dy, -1.0), (dy, 1.0))):
        row = top.astype(jnp.int32) + down
        for right, (weight_x, slope_x) in enumerate(((1 - dx, -1.0), (dx, 1.0))):
            column = left.astype(jnp.int32) + right
            on_map = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            token = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
            yield token, weight_x * weight_y, on_map, slope_x * weight_y, slope_y * weight_x


def _for_each_point(sizes: _Sizes, origin_ref, offsets_ref, query, row, visit, carry):
    """carry = visit(corners, first token of the level, sample number, carry) for all points."""
    first = 0
    for level, (height, width) in enumerate(sizes.static.spatial_shapes):
        at = (query * sizes.l + level) * 2
        origin = plgpu.load(origin_ref.at[at]), plgpu.load(origin_ref.at[at + 1])

        def point(k, carry, level=level, height=height, width=width, first=first, origin=origin):
            sample = level * sizes.p + k
            at = (row * (sizes.l * sizes.p) + sample) * 2
            x, y = (origin[axis] + _load(offsets_ref, at + axis) for axis in (0, 1))
            return visit(_corners(height, width, x, y), first, sample, carry)

        carry = jax.lax.fori_loop(0, sizes.p, point, carry)
        first += height * width
    return carry


def _load_rows(sizes: _Sizes, value_ref, row):
    """The rows [queries, lanes] in float32, and their addresses; only lanes past `d` are masked."""
    lane, exists = sizes.lanes()
    at = row[:, None] * sizes.d + lane[None, :]
    if lane.size == sizes.d:
        return _load(value_ref, at), at
    return _load(value_ref, at, mask=jnp.broadcast_to(exists[None, :], at.shape), other=0.0), at


def _forward_kernel(sizes: _Sizes, value_ref, origin_ref, offsets_ref, scores_ref, out_ref):
    query, real, head, image = sizes.program()
    out_row = query * sizes.n + head
    # loads need an address that exists; masked stores keep theirs, each its own
    query = jnp.where(real, query, 0)
    row = query * sizes.n + head
    _, weight_of = _load_scores(sizes, scores_ref, row)

    def add_point(corners, first, sample, total):
        attention = weight_of(sample)
        for token, weight, on_map, _, _ in corners:
            value_row = (image * sizes.s + first + token) * sizes.n + head
            rows, _ = _load_rows(sizes, value_ref, value_row)
            total += rows * jnp.where(on_map, attention * weight, 0.0)[:, None]
        return total

    lane, exists = sizes.lanes()
    total = jnp.zeros((sizes.block, lane.size), jnp.float32)
    total = _for_each_point(sizes, origin_ref, offsets_ref, query, row, add_point, total)
    at, written = out_row[:, None] * sizes.d + lane[None, :], real[:, None] & exists[None, :]
    plgpu.store(out_ref.at[at], total.astype(out_ref.dtype), mask=written)


def _backward_kernel(
    sizes: _Sizes, value_ref, origin_ref, offsets_ref, scores_ref, cotangent_ref, _, *grad_refs
):
    grad_value_ref, grad_offsets_ref, grad_scores_ref = grad_refs
    query, real, head, image = sizes.program()
    out_row = query * sizes.n + head
    query = jnp.where(real, query, 0)
    row = query * sizes.n + head
    weights, weight_of = _load_scores(sizes, scores_ref, row)
    lane, lane_exists = sizes.lanes()
    written = real[:, None] & lane_exists[None, :]
    g = _load(cotangent_ref, row[:, None] * sizes.d + lane[None, :], mask=written, other=0.0)
    column, sample_exists = sizes.samples()

    def add_point(corners, first, sample, gradients):
        attention = weight_of(sample)
        by_x = by_y = by_weight = jnp.zeros_like(attention)
        for token, weight, on_map, slope_x, slope_y in corners:
            value_row = (image * sizes.s + first + token) * sizes.n + head
            rows, at = _load_rows(sizes, value_ref, value_row)
            score = jnp.where(on_map, jnp.sum(rows * g, axis=1), 0.0)
            by_x, by_y = by_x + slope_x * score, by_y + slope_y * score
            by_weight += weight * score
            added = (attention * weight)[:, None] * g
            _add_rows(sizes, grad_value_ref, at, added, written & on_map[:, None])
        new = zip((attention * by_x, attention * by_y, by_weight), gradients, strict=True)
        here = column[None, :] == sample
        return tuple(jnp.where(here, x[:, None], old) for x, old in new)

    empty = (jnp.zeros((sizes.block, column.size), jnp.float32),) * 3
    found = _for_each_point(sizes, origin_ref, offsets_ref, query, row, add_point, empty)
    by_x, by_y, by_weight = found
    if sizes.static.softmax:
        by_weight = weights * (by_weight - jnp.sum(weights * by_weight, axis=1)[:, None])
    at = out_row[:, None] * (sizes.l * sizes.p) + column[None, :]
    written = real[:, None] & sample_exists[None, :]
    plgpu.store(grad_offsets_ref.at[2 * at], by_x, mask=written)
    plgpu.store(grad_offsets_ref.at[2 * at + 1], by_y, mask=written)
    plgpu.store(grad_scores_ref.at[at], by_weight, mask=written)


def _add_rows(sizes: _Sizes, grad_ref, at, rows, mask):
    if not sizes.static.interpret:
        plgpu.atomic_add(grad_ref, (at,), rows, mask=mask)
        return
    # the interpreter knows no mask here, and keeps one of several equal addresses
    grad_ref[...] = grad_ref[...].at[at].add(jnp.where(mask, rows, 0.0))


# ---- sharding: a kernel is opaque to the partitioner, which would gather its arguments; these rule


def _partition(call, num_outputs: int):
    def partition(static, mesh, arguments, results):
        images, _, heads, _ = (*arguments[0].sharding.spec, None, None, None, None)[:4]
        value, origin = P(images, None, heads, None), P(images, None, None, None)
        scores = P(images, None, heads, None, None)
        offsets = P(*scores, None)
        inputs = (value, origin, offsets, scores, value)[: len(arguments)]
        outputs = value if num_outputs == 1 else (value, offsets, scores)
        place = functools.partial(
            jax.tree.map, lambda spec: NamedSharding(mesh, spec), is_leaf=lambda x: isinstance(x, P)
        )
        return mesh, functools.partial(call, static), place(outputs), place(inputs)

    return partition


def _partitioned(call, num_outputs: int, outputs: str):
    inputs = "b s n d, b q l xy, b q n l p xy, b q n l p" + (", b q n d" if num_outputs > 1 else "")
    partitioned = custom_partitioning(call, static_argnums=(0,))
    partitioned.def_partition(
        _partition(call, num_outputs),
        sharding_rule=f"{inputs} -> {outputs}",
        need_replication_factors=("s", "d", "q", "l", "xy", "p"),  # in order of appearance
    )
    return partitioned


_partitioned_forward = _partitioned(_forward_call, 1, "b q n d")
_partitioned_backward = _partitioned(_backward_call, 3, "b s n d, b q n l p xy, b q n l p")
