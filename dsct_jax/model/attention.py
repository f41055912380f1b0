"""Attention layers: multi-scale deformable attention (Eq. 9) and joint self-attention of all
queries.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from dsct_jax.model.layers import SAVED, Linear, linear_in_float32, matmul_2d
from pallas_kernels.deformable_attention import deformable_attention_from_offsets

SpatialShapes = tuple[tuple[int, int], ...]


class LayerShape(NamedTuple):
    """The sizes that the layers of encoder and decoder share."""

    d: int
    num_heads: int
    num_levels: int
    num_points: int
    feedforward_dim: int
    dropout: float


def initial_offsets(num_heads: int, num_levels: int, num_points: int) -> np.ndarray:
    """Initial sampling offsets [n l p 2], pixels: head i looks in direction i, point j at distance
    j + 1 (Deformable DETR).
    """
    angles = np.arange(num_heads, dtype=np.float32) * np.float32(2 * math.pi / num_heads)
    grid = np.stack([np.cos(angles), np.sin(angles)], -1)
    grid = grid / np.abs(grid).max(-1, keepdims=True)
    distances = np.arange(1, num_points + 1, dtype=np.float32)
    offsets = grid[:, None, None, :] * distances[None, None, :, None]
    return np.broadcast_to(offsets, (num_heads, num_levels, num_points, 2)).astype(np.float32)


class DeformableAttention(nnx.Module):
    """Each query samples `num_points` locations per head and level around its reference point.
    Source: Zhu et al. 2020; paper Eq. 9.
    """

    def __init__(self, shape: LayerShape, *, rngs: nnx.Rngs):
        d = shape.d
        self.shape = (shape.num_heads, shape.num_levels, shape.num_points)
        samples = math.prod(self.shape)
        bias = jnp.asarray(initial_offsets(*self.shape)).reshape(-1)
        zeros = nnx.initializers.zeros
        self.sampling_offsets = Linear(
            d, samples * 2, kernel_init=zeros, bias_init=lambda *_: bias, rngs=rngs
        )
        self.attention_weights = Linear(d, samples, kernel_init=zeros, rngs=rngs)
        self.value_proj = Linear(d, d, rngs=rngs)
        self.output_proj = Linear(d, d, rngs=rngs)

    def __call__(
        self,
        queries: Float[Array, "b q d"],
        reference_points: Float[Array, "b q l 2"],
        memory: Float[Array, "b s d"],
        memory_padding: Bool[Array, "b s"],
        spatial_shapes: SpatialShapes,
        *,
        boxes: Float[Array, "b q l 2"] | None = None,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "b q d"], dict[str, jax.Array]]:
        """Returns the attended values, and what was sampled: sampling_locations [b q n l p 2] in
        [0, 1], attention_weights [b q n l p].

        `boxes` are widths and heights in [0, 1] of the padded canvas: sampling offsets then count
        in half boxes instead of pixels, the farthest initial point on the border (Zhu et al. 2020,
        iterative bounding box refinement). A width of 0 keeps a query's offsets in pixels.
        """
        b, q, d = queries.shape
        n, l, p = self.shape
        value = jnp.where(memory_padding[..., None], 0, self.value_proj(memory))
        value = value.reshape(b, -1, n, d // n)
        # Locations and softmax are float32 whatever the type of the rest: half a bfloat16 step is
        # half a pixel at the far edge of a map.
        offsets = linear_in_float32(self.sampling_offsets, queries).reshape(b, q, n, l, p, 2)
        sizes = np.array([(w, h) for h, w in spatial_shapes], np.float32).reshape(1, 1, 1, l, 1, 2)
        if boxes is not None:
            half = boxes[:, :, None, :, None] * sizes / (2 * p)
            offsets *= jnp.where(half > 0, half, 1)
        logits = linear_in_float32(self.attention_weights, queries).reshape(b, q, n, l, p)
        with jax.named_scope("deformable_attention"):
            where = (value, spatial_shapes, reference_points, offsets, logits)
            attended = deformable_attention_from_offsets(*where, implementation=implementation)
        attended = checkpoint_name(attended, SAVED)
        weights = jax.nn.softmax(logits.reshape(b, q, n, l * p)).reshape(logits.shape)
        sampled = {  # dead code under jit unless the caller keeps it
            "sampling_locations": reference_points[:, :, None, :, None, :] + offsets / sizes,
            "attention_weights": weights,
        }
        return self.output_proj(attended), sampled


class SelfAttention(nnx.Module):
    """Multi-head self-attention; positions enter queries and keys, not values. The projections are
    packed as in torch.nn.MultiheadAttention.
    """

    def __init__(self, d: int, *, num_heads: int, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.in_proj = Linear(d, 3 * d, rngs=rngs)
        self.out_proj = Linear(d, d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        forbidden: Bool[Array, "q q"] | None = None,
    ) -> tuple[Float[Array, "b q d"], jax.Array]:
        """Returns the attended tokens and the attention weights [b n q q]; where `forbidden`, a
        query (row) does not see another.
        """
        b, q, d = tokens.shape
        assert self.in_proj.bias is not None
        dtype = tokens.dtype
        kernel = self.in_proj.kernel[...].astype(dtype)
        bias = self.in_proj.bias[...].astype(dtype).reshape(1, 1, -1)
        both = matmul_2d(tokens + positions, kernel[:, : 2 * d], dtype) + bias[..., : 2 * d]
        value = matmul_2d(tokens, kernel[:, 2 * d :], dtype) + bias[..., 2 * d :]
        query, key, value = (
            x.reshape(b, q, self.num_heads, -1) for x in (*jnp.split(both, 2, -1), value)
        )
        query = query / math.sqrt(d // self.num_heads)
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key, preferred_element_type=jnp.float32)
        if forbidden is not None:
            scores = jnp.where(forbidden[None, None], -jnp.inf, scores)
        weights = jax.nn.softmax(scores)
        attended = jnp.einsum("bnqk,bknd->bqnd", weights.astype(dtype), value)
        return self.out_proj(attended.reshape(b, q, d)), weights
