"""Multi-scale deformable attention in portable XLA operations, with its own backward pass.

All corners of all points reduce to one primitive, `out[i] = sum_k weight[k, i] * table[index[k, i]]` for i over (query, head): a scan over the
corners k gathers whole rows and never materialises more than a few of them. Nothing but row gathers, row scatters and dense arithmetic, so it
lowers for CPU, GPU and TPU alike; a TPU has no scalar gathers worth looping over, but moves rows well.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from pallas_kernels.reference import SpatialShapes

UNROLL = 8  # corners gathered in one fused loop body


def deformable_attention(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    sampling_locations: Float[Array, "b q n l p 2"],
    attention_weights: Float[Array, "b q n l p"],
) -> Float[Array, "b q n*d"]:
    """See `pallas_kernels.deformable_attention`."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    x, y = _points_first(sampling_locations, dtype)
    weights = jnp.transpose(attention_weights.astype(dtype), (0, 3, 4, 1, 2))
    x = x * _sizes(spatial_shapes, 1, dtype) - 0.5
    y = y * _sizes(spatial_shapes, 0, dtype) - 0.5
    return _sample(value, spatial_shapes, x, y, weights)


def deformable_attention_from_offsets(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Array, "b q l 2"],
    offsets: Float[Array, "b q n l p 2"],
    logits: Float[Array, "b q n l p"],
) -> Float[Array, "b q n*d"]:
    """See `pallas_kernels.deformable_attention`."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    x, y = _points_first(offsets, dtype)
    reference = jnp.transpose(reference_points.astype(dtype), (3, 0, 2, 1))[:, :, :, None, :, None]  # 2 b l 1 q 1
    weights = jax.nn.softmax(jnp.transpose(logits.astype(dtype), (0, 3, 4, 1, 2)), axis=(1, 2))
    x = reference[0] * _sizes(spatial_shapes, 1, dtype) + x - 0.5
    y = reference[1] * _sizes(spatial_shapes, 0, dtype) + y - 0.5
    return _sample(value, spatial_shapes, x, y, weights)


def _points_first(pairs: Float[Array, "b q n l p 2"], dtype) -> tuple[jax.Array, jax.Array]:
    """x and y, each [b l p q n]: the scan runs over the leading axes."""
    pairs = jnp.transpose(pairs.astype(dtype), (5, 0, 3, 4, 1, 2))
    return pairs[0], pairs[1]


def _sizes(spatial_shapes: SpatialShapes, side: int, dtype) -> Num[Array, "l 1 1 1"]:
    return jnp.stack([jnp.asarray(shape[side], dtype) for shape in spatial_shapes]).reshape(-1, 1, 1, 1)


def _sample(value, spatial_shapes: SpatialShapes, x, y, weights):
    """value [b s n d], pixel positions and weights [b l p q n] -> [b q (n d)]. One image at a time under vmap: a row table shared by the
    batch would be gathered to every device of a mesh."""
    out = jax.vmap(functools.partial(_sample_image, spatial_shapes))(value, x, y, weights)
    return out.reshape(*out.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sample_image(spatial_shapes: SpatialShapes, value, x, y, weights):
    return _forward(spatial_shapes, value, x, y, weights)[0]


def _forward(spatial_shapes: SpatialShapes, value, x, y, weights):
    s, n, d = value.shape
    q = x.shape[2]
    rows = value.reshape(s * n, d)
    index, weight = _corner_rows(spatial_shapes, x, y, n), _corner_weights(spatial_shapes, x, y, weights)

    def add_corners(total, chunk):
        for i, w in zip(*chunk, strict=True):
            total += _take(rows, i).astype(total.dtype) * w[:, None]
        return total, None

    chunks = (
        (index.reshape(-1, UNROLL, q * n), weight.reshape(-1, UNROLL, q * n)) if index.shape[0] % UNROLL == 0 else (index[:, None], weight[:, None])
    )
    out, _ = jax.lax.scan(add_corners, jnp.zeros((q * n, d), weight.dtype), chunks)
    return out.reshape(q, n, d).astype(value.dtype), (value, x, y, weights)


def _backward(spatial_shapes: SpatialShapes, residuals, cotangent):
    value, x, y, weights = residuals
    s, n, d = value.shape
    rows = value.reshape(s * n, d)
    index = _corner_rows(spatial_shapes, x, y, n)
    weight, weight_pullback = jax.vjp(functools.partial(_corner_weights, spatial_shapes), x, y, weights)
    cotangent = cotangent.astype(weight.dtype).reshape(-1, d)

    def spread_corner(grad_rows, corner):
        i, w = corner
        grad_rows = grad_rows.at[i].add(cotangent * w[:, None], mode="promise_in_bounds")
        # einsum, not multiply and sum: XLA's CPU backend gathers again for every term of a fused reduction
        return grad_rows, jnp.einsum("id,id->i", _take(rows, i).astype(cotangent.dtype), cotangent)

    grad_rows, grad_weight = jax.lax.scan(spread_corner, jnp.zeros((s * n, d), weight.dtype), (index, weight))
    return grad_rows.reshape(s, n, d).astype(value.dtype), *weight_pullback(grad_weight)


_sample_image.defvjp(_forward, _backward)


def _take(rows, index):
    return rows.at[index].get(mode="promise_in_bounds")


def _corners(spatial_shapes: SpatialShapes, x, y):
    """Yields for each corner its column, row and whether it lies on the map, all [l p q n]."""
    width, height = _sizes(spatial_shapes, 1, x.dtype), _sizes(spatial_shapes, 0, x.dtype)
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for what is not finite, too
    left, top = jnp.floor(jnp.where(inside, x, 0)), jnp.floor(jnp.where(inside, y, 0))
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        yield row, column, inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)


def _corner_weights(spatial_shapes: SpatialShapes, x, y, weights) -> jax.Array:
    """[4 l p, q n]; zero for corners outside the map."""
    corners = [
        jnp.where(on_map, weights * (1 - jnp.abs(jnp.where(on_map, x, 0) - column)) * (1 - jnp.abs(jnp.where(on_map, y, 0) - row)), 0)
        for row, column, on_map in _corners(spatial_shapes, x, y)
    ]
    return jnp.stack(corners).reshape(-1, x.shape[2] * x.shape[3])


def _corner_rows(spatial_shapes: SpatialShapes, x, y, n: int) -> jax.Array:
    """Rows of the table (token, head) [4 l p, q n]; corners outside the map point at its nearest row."""
    starts, start = [], 0
    for height, width in spatial_shapes:
        starts.append(jnp.asarray(start, jnp.int32))
        start += height * width
    first = jnp.stack(starts).reshape(-1, 1, 1, 1)
    width, height = _sizes(spatial_shapes, 1, jnp.int32), _sizes(spatial_shapes, 0, jnp.int32)
    head = jnp.arange(n, dtype=jnp.int32)
    corners = []
    for row, column, _ in _corners(spatial_shapes, x, y):
        row, column = jnp.clip(row.astype(jnp.int32), 0, height - 1), jnp.clip(column.astype(jnp.int32), 0, width - 1)
        corners.append((first + row * width + column) * n + head)
    return jnp.stack(corners).reshape(-1, x.shape[2] * x.shape[3])
