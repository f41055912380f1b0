"""Multi-scale deformable attention in portable XLA operations, with its own backward pass: gathers
and scatters of whole rows, which a TPU moves well too, and dense arithmetic.

Forward: a scan over the levels adds the four corners of each point, row by row, to one running sum.
The index arithmetic stays inside the gather's fusion, so nothing but the sum is materialized
(PyTorch's grid_sample formulation writes every sample of every point).

Backward: only the inputs are kept; corners are computed again. Two forms, chosen when the program
is lowered:
- CPU: blocks of queries small enough for the cache, all corners of a block at once; one scatter per
  block into a gradient updated in place.
- everything else: a scan over the corners with all queries at once, as accelerators need it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode
from jaxtyping import Array, Float

from pallas_kernels.reference import SpatialShapes, level_sizes, no_fma

# (query, head) pairs per block of the CPU's backward pass; with 64 corners its rows fill 4 MiB
CPU_BLOCK = 512
CPU_LANES = (
    4  # partial sums per dot product, which XLA vectorizes there; a full reduction it does not
)
_FourCorners = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def deformable_attention(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    sampling_locations: Float[Array, "b q n l p 2"],
    attention_weights: Float[Array, "b q n l p"],
) -> Float[Array, "b q n*d"]:
    """See `pallas_kernels.deformable_attention`."""
    b, q, _, l = attention_weights.shape[:4]
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    origin = jnp.full((b, q, l, 2), -0.5, dtype)
    sizes = level_sizes(spatial_shapes, dtype)[:, None, :]
    offsets = no_fma(sampling_locations.astype(dtype) * sizes)
    return _sample(spatial_shapes, value, origin, offsets, attention_weights.astype(dtype))


def deformable_attention_from_offsets(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Array, "b q l 2"],
    offsets: Float[Array, "b q n l p 2"],
    logits: Float[Array, "b q n l p"],
) -> Float[Array, "b q n*d"]:
    """See `pallas_kernels.deformable_attention`."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    origin = no_fma(reference_points.astype(dtype) * level_sizes(spatial_shapes, dtype)) - 0.5
    weights = jax.nn.softmax(logits.astype(dtype).reshape(*logits.shape[:3], -1))
    offsets = offsets.astype(dtype)
    return _sample(spatial_shapes, value, origin, offsets, weights.reshape(logits.shape))


def _starts(spatial_shapes: SpatialShapes) -> jax.Array:
    """First token of each level [l]."""
    starts, start = [], 0
    for height, width in spatial_shapes:
        starts.append(jnp.asarray(start, jnp.int32))
        start += height * width
    return jnp.stack(starts)


def _sample(spatial_shapes: SpatialShapes, value, origin, offsets, weights):
    """Pixels are origin [b q l 2] + offsets [b q n l p 2]. One image at a time under vmap: indices
    into a table shared by the whole batch would make the partitioner gather the batch to every
    device of a mesh.
    """
    sample = jax.vmap(functools.partial(_sample_image, spatial_shapes))
    return sample(value, origin, offsets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sample_image(spatial_shapes: SpatialShapes, value, origin, offsets, weights):
    """value [s n d], origin [q l 2], offsets [q n l p 2], weights [q n l p] -> [q (n d)]."""
    s, n, d = value.shape
    q, _, l, p = weights.shape
    rows = value.reshape(s * n, d)
    sizes, starts = level_sizes(spatial_shapes, weights.dtype), _starts(spatial_shapes)
    head = jnp.arange(q * n, dtype=jnp.int32) % n
    origin = jnp.broadcast_to(origin[:, None], (q, n, l, 2)).reshape(q * n, l, 2)
    offsets, weights = offsets.reshape(q * n, l, p, 2), weights.reshape(q * n, l, p)

    def add_level(total, level):
        (width, height), start = sizes[level], starts[level]
        level_origin, level_offsets, level_weights = (
            jax.lax.dynamic_index_in_dim(x, level, 1, keepdims=False)
            for x in (origin, offsets, weights)
        )
        for point in range(p):
            x, y = (level_origin[:, axis] + level_offsets[:, point, axis] for axis in (0, 1))
            tokens = _corner_tokens(width, height, start, x, y)
            corner_weights = _corner_weights(width, height, x, y, level_weights[:, point])
            for token, weight in zip(tokens, corner_weights, strict=True):
                total += _take(rows, token * n + head).astype(total.dtype) * weight[:, None]
        return total, None

    out, _ = jax.lax.scan(add_level, jnp.zeros((q * n, d), weights.dtype), jnp.arange(l))
    return out.reshape(q, n * d).astype(value.dtype)


def _forward(spatial_shapes: SpatialShapes, *inputs):
    return _sample_image(spatial_shapes, *inputs), inputs


def _backward(spatial_shapes: SpatialShapes, inputs, cotangent):
    value, _, offsets, weights = inputs
    cotangent = cotangent.astype(weights.dtype).reshape(*weights.shape[:2], -1)  # q n d
    grad_rows, grad_offsets, grad_weights = jax.lax.platform_dependent(
        *inputs,
        cotangent,
        cpu=functools.partial(_gradients_by_block, spatial_shapes),
        default=functools.partial(_gradients_by_corner, spatial_shapes),
    )
    grad_value = grad_rows.reshape(value.shape).astype(value.dtype)
    return grad_value, grad_offsets.sum((1, 3)), grad_offsets, grad_weights


_sample_image.defvjp(_forward, _backward)


def _gradients_by_block(spatial_shapes: SpatialShapes, value, origin, offsets, weights, cotangent):
    s, n, d = value.shape
    q, _, l, p = weights.shape
    block = min(q, max(1, CPU_BLOCK // n))
    rows, lanes = value.reshape(s * n, d), math.gcd(d, CPU_LANES)
    sizes = level_sizes(spatial_shapes, weights.dtype).reshape(l, 2, 1)
    width, height, start = sizes[:, 0], sizes[:, 1], _starts(spatial_shapes).reshape(l, 1)
    head = (jnp.arange(block * n, dtype=jnp.int32) % n).reshape(-1, 1, 1)

    def first(i):  # the last block is moved back to end with the last query
        return jnp.minimum(i * block, q - block)

    def cut(i):
        arrays = (origin, offsets, weights, cotangent)
        return tuple(jax.lax.dynamic_slice_in_dim(x, first(i), block) for x in arrays)

    def add_block(i, carry):
        # The block was cut in the step before: a slice fused into the loops below would keep LLVM
        # from vectorizing them.
        (block_origin, block_offsets, block_weights, block_cotangent), grad_rows, *gradients = carry
        pixels = block_origin[:, None, :, None] + block_offsets
        x, y = jnp.moveaxis(pixels.reshape(-1, l, p, 2), -1, 0)
        corner_weights, pullback = jax.vjp(
            functools.partial(_corner_weights, width, height), x, y, block_weights.reshape(-1, l, p)
        )
        tokens = _corner_tokens(width, height, start, x, y)
        index = jnp.stack([token * n + head for token in tokens], -1).reshape(-1)
        g = block_cotangent.reshape(-1, 1, d)
        partial_sums = sum(
            _take(rows, index, lane, lanes).astype(g.dtype).reshape(g.shape[0], -1, lanes)
            * g[..., lane : lane + lanes]
            for lane in range(0, d, lanes)
        )
        scores = partial_sums.reshape(-1, lanes) @ jnp.ones((lanes, 1), g.dtype)
        scores = scores.reshape(-1, l, p, 4)
        *grad_xy, grad_weights = pullback(tuple(scores[..., corner] for corner in range(4)))
        new = jnp.stack(grad_xy, -1), grad_weights
        gradients = [
            jax.lax.dynamic_update_slice_in_dim(old, x.reshape(block, *old.shape[1:]), first(i), 0)
            for old, x in zip(gradients, new, strict=True)
        ]
        # the queries before were added by the block before
        fresh = jnp.repeat(first(i) + jnp.arange(block) >= i * block, n)[:, None, None, None]
        spread = jnp.where(fresh, jnp.stack(corner_weights, -1), 0).reshape(-1, l * p * 4, 1)
        grad_rows = grad_rows.at[index].add((spread * g).reshape(-1, d), mode="promise_in_bounds")
        return cut(i + 1), grad_rows, *gradients

    zeros = (jnp.zeros(rows.shape, weights.dtype), jnp.zeros_like(offsets), jnp.zeros_like(weights))
    return jax.lax.fori_loop(0, -(-q // block), add_block, (cut(0), *zeros))[1:]


def _gradients_by_corner(spatial_shapes: SpatialShapes, value, origin, offsets, weights, cotangent):
    s, n, d = value.shape
    rows = value.reshape(s * n, d)
    x, y = jnp.moveaxis(origin[:, None, :, None] + offsets, (-1, 2, 3), (0, 1, 2))  # each l p q n
    width, height = level_sizes(spatial_shapes, weights.dtype).T[..., None, None, None]
    start = _starts(spatial_shapes)[:, None, None, None]
    weights_at = functools.partial(_corner_weights, width, height)
    corner_weights, pullback = jax.vjp(weights_at, x, y, jnp.moveaxis(weights, (2, 3), (0, 1)))
    tokens = jnp.stack(_corner_tokens(width, height, start, x, y))
    index = (tokens * n + jnp.arange(n, dtype=jnp.int32)).reshape(-1, weights.shape[0] * n)
    g = cotangent.reshape(-1, d)

    def add_corner(grad_rows, corner):
        i, w = corner
        score = jnp.einsum("id,id->i", _take(rows, i).astype(g.dtype), g, precision="highest")
        return grad_rows.at[i].add(w[:, None] * g, mode="promise_in_bounds"), score

    spread = jnp.stack(corner_weights).reshape(index.shape)
    grad_rows, scores = jax.lax.scan(add_corner, jnp.zeros(rows.shape, g.dtype), (index, spread))
    grad_x, grad_y, grad_weights = pullback(tuple(scores.reshape(4, *x.shape)))
    grad_offsets = jnp.moveaxis(jnp.stack([grad_x, grad_y]), (0, 1, 2), (-1, 2, 3))
    return grad_rows, grad_offsets, jnp.moveaxis(grad_weights, (0, 1), (2, 3))


def _take(rows, index, first=0, count=None):
    """rows[index, first : first + count]; the indices are in bounds by construction."""
    count = rows.shape[1] if count is None else count
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
    )
    start = jnp.stack([index, jnp.full_like(index, first)], -1)
    mode = GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.gather(rows, start, numbers, (1, count), mode=mode)


def _floor(width, height, x, y):
    """Top left corner and the place inside its cell; points that touch no pixel, or are not finite,
    lie at (-1, -1), where all weights are zero.
    """
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = jnp.where(inside, x, -1), jnp.where(inside, y, -1)
    left, top = jnp.floor(x), jnp.floor(y)
    return left, top, x - left, y - top


def _corner_weights(width, height, x, y, weights) -> _FourCorners:
    """Weights of the top left, top right, bottom left and bottom right pixel; zero off the map."""
    left, top, dx, dy = _floor(width, height, x, y)
    columns = jnp.where(left >= 0, 1 - dx, 0), jnp.where(left < width - 1, dx, 0)
    rows = jnp.where(top >= 0, 1 - dy, 0) * weights, jnp.where(top < height - 1, dy, 0) * weights
    return rows[0] * columns[0], rows[0] * columns[1], rows[1] * columns[0], rows[1] * columns[1]


def _corner_tokens(width, height, start, x, y) -> _FourCorners:
    """Tokens of the same four pixels; outside the map the nearest one."""
    left, top, _, _ = (i.astype(jnp.int32) for i in _floor(width, height, x, y))
    width, height = width.astype(jnp.int32), height.astype(jnp.int32)
    columns = jnp.maximum(left, 0), jnp.minimum(left + 1, width - 1)
    rows = start + jnp.maximum(top, 0) * width, start + jnp.minimum(top + 1, height - 1) * width
    return rows[0] + columns[0], rows[0] + columns[1], rows[1] + columns[0], rows[1] + columns[1]
