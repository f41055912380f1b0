"""Multi-scale deformable attention in plain jax.numpy: the definition, differentiated by JAX. Every
other implementation is tested against it.

Source: Zhu et al., Deformable DETR (ICLR 2021), Eq. 3; the paper's Eq. 9;
ms_deform_attn_core_pytorch of the released code. Letters: b batch, s memory tokens (all levels,
row-major, concatenated), q queries, n heads, d head size, l levels, p points.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# ((height, width), ...) of each level: ints, or symbolic sizes under jax.export
SpatialShapes = tuple[tuple[Any, Any], ...]


def deformable_attention(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    sampling_locations: Float[Array, "b q n l p 2"],
    attention_weights: Float[Array, "b q n l p"],
) -> Float[Array, "b q n*d"]:
    """Weighted sum of bilinear samples of `value`; see `pallas_kernels.deformable_attention`."""
    b, _, n, d = value.shape
    q = sampling_locations.shape[1]
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    out = jnp.zeros((b, q, n, d), dtype)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        end = start + height * width
        level_value = jax.lax.slice_in_dim(value, start, end, axis=1).astype(dtype)
        start = end
        locations = sampling_locations[:, :, :, level].astype(dtype)
        x = no_fma(locations[..., 0] * width) - 0.5  # pixel centers lie at integers
        y = no_fma(locations[..., 1] * height) - 0.5
        weights = attention_weights[:, :, :, level].astype(dtype)
        inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False if not finite, too
        x, y = jnp.where(inside, x, 0), jnp.where(inside, y, 0)
        left, top = jnp.floor(x), jnp.floor(y)
        for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            on_map = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight = weights * (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
            weight = jnp.where(on_map, weight, 0)
            row = jnp.clip(row, 0, height - 1).astype(jnp.int32)
            column = jnp.clip(column, 0, width - 1).astype(jnp.int32)
            index = (row * width + column).transpose(0, 2, 1, 3).reshape(b, n, -1, 1)  # b n (q p) 1
            corner = jnp.take_along_axis(level_value.transpose(0, 2, 1, 3), index, axis=2)
            corner = corner.reshape(b, n, q, -1, d)
            out += jnp.einsum("bnqpd,bqnp->bqnd", corner, weight, precision="highest")
    return out.reshape(b, q, n * d).astype(value.dtype)


def deformable_attention_from_offsets(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Array, "b q l 2"],
    offsets: Float[Array, "b q n l p 2"],
    logits: Float[Array, "b q n l p"],
) -> Float[Array, "b q n*d"]:
    """The same at reference_points + offsets / (width, height), with weights softmax(logits)."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    where = samples(spatial_shapes, reference_points, offsets, logits, dtype)
    return deformable_attention(value, spatial_shapes, *where)


def samples(
    spatial_shapes: SpatialShapes,
    reference_points: Float[Array, "b q l 2"],
    offsets: Float[Array, "b q n l p 2"],
    logits: Float[Array, "b q n l p"],
    dtype: Any,
) -> tuple[Float[Array, "b q n l p 2"], Float[Array, "b q n l p"]]:
    """Their locations and weights."""
    shifts = no_fma(offsets.astype(dtype) / level_sizes(spatial_shapes, dtype)[:, None])
    locations = reference_points.astype(dtype)[:, :, None, :, None] + shifts
    return locations, jax.nn.softmax(logits.astype(dtype), axis=(-2, -1))


def level_sizes(spatial_shapes: SpatialShapes, dtype) -> Float[Array, "l 2"]:
    """(width, height) of each level: the order of locations and offsets."""
    sizes = [[jnp.asarray(side, dtype) for side in (w, h)] for h, w in spatial_shapes]
    return jnp.stack([jnp.stack(size) for size in sizes])


def no_fma(product: jax.Array) -> jax.Array:
    """The product as it is. Compilers may round a multiplication and the addition that follows once
    or twice, and differently where they compute the same pixel twice: a weight could then belong to
    another pixel than its token. A clip in between, which clips nothing, keeps them apart.
    """
    limit = jnp.finfo(product.dtype).max
    return jnp.clip(product, -limit, limit)
