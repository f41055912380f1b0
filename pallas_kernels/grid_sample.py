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
    q, p = grid.shape[1:3]
    value = maps.reshape(n, c, 1, height * width).transpose(0, 3, 2, 1)
    places = ((grid + 1) / 2).reshape(n, q * p, 1, 1, 1, 2)
    weights = jnp.ones(places.shape[:-1], grid.dtype)
    sampled = reference.deformable_attention(value, ((height, width),), places, weights)
    return sampled.transpose(0, 2, 1).reshape(n, c, q, p)


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
    # queries last: runtimes add up the points of a query faster along an outer axis
    grid = (2 * sampling_locations.astype(dtype) - 1).transpose(3, 0, 2, 4, 1, 5)  # l b n p q 2
    weights = attention_weights.astype(dtype).transpose(3, 0, 2, 4, 1)  # l b n p q
    out, start = jnp.zeros((b * n, d, q), dtype), 0
    for level, (height, width) in enumerate(spatial_shapes):
        end = start + height * width
        maps = jax.lax.slice_in_dim(heads, start, end, axis=3).reshape(b * n, d, height, width)
        start = end
        sampled = grid_sample(maps, grid[level].reshape(b * n, p, q, 2))
        out += (sampled * weights[level].reshape(b * n, 1, p, q)).sum(2)
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
