"""The operation in the form that other runtimes have: one bilinear sampling per level, as ONNX
GridSample does it (zeros around the map, pixel centers at halves). For exports; `xla` is faster.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import reference
from pallas_kernels.reference import SpatialShapes


@jax.jit  # exports find it by its name, and write the runtime's own operation for it
def grid_sample(
    maps: Float[Array, "n c h w"], grid: Float[Array, "n q p 2"]
) -> Float[Array, "n c q p"]:
    """`maps` at the places (x, y) of `grid`, where -1 and 1 are the map's borders."""
    n, c, height, width = maps.shape
    flat = maps.reshape(n, c, height * width)
    x = (grid[..., 0] + 1) * (width / 2) - 0.5
    y = (grid[..., 1] + 1) * (height / 2) - 0.5
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False if not finite, too
    x, y = jnp.where(inside, x, 0), jnp.where(inside, y, 0)
    left, top = jnp.floor(x), jnp.floor(y)
    out = jnp.zeros((n, c, *grid.shape[1:3]), maps.dtype)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        on_map = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        weight = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
        row, column = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
        index = (row * width + column).astype(jnp.int32).reshape(n, 1, -1)
        corner = jnp.take_along_axis(flat, index, axis=2).reshape(out.shape)
        out += corner * jnp.where(on_map, weight, 0).astype(maps.dtype)[:, None]
    return out


def deformable_attention(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    sampling_locations: Float[Array, "b q n l p 2"],
    attention_weights: Float[Array, "b q n l p"],
) -> Float[Array, "b q n*d"]:
    """Weighted sum of bilinear samples of `value`; see `pallas_kernels.deformable_attention`."""
    b, _, n, d = value.shape
    q, p = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    heads = value.astype(dtype).transpose(0, 2, 3, 1)  # b n d s
    grid = (2 * sampling_locations.astype(dtype) - 1).transpose(3, 0, 2, 1, 4, 5)  # l b n q p 2
    weights = attention_weights.astype(dtype).transpose(3, 0, 2, 1, 4)  # l b n q p
    out, start = jnp.zeros((b * n, d, q), dtype), 0
    for level, (height, width) in enumerate(spatial_shapes):
        end = start + height * width
        maps = jax.lax.slice_in_dim(heads, start, end, axis=3).reshape(b * n, d, height, width)
        start = end
        sampled = grid_sample(maps, grid[level].reshape(b * n, q, p, 2))
        out += (sampled * weights[level].reshape(b * n, 1, q, p)).sum(-1)
    return out.reshape(b, n * d, q).transpose(0, 2, 1).astype(value.dtype)


def deformable_attention_from_offsets(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Array, "b q l 2"],
    offsets: Float[Array, "b q n l p 2"],
    logits: Float[Array, "b q n l p"],
) -> Float[Array, "b q n*d"]:
    """The same at reference_points + offsets / (width, height), with weights softmax(logits)."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    samples = reference.samples(spatial_shapes, reference_points, offsets, logits, dtype)
    return deformable_attention(value, spatial_shapes, *samples)
