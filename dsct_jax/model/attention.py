"""Attention: multi-scale deformable (Eq. 9), plain, conditional, and along rows and columns.

Every layer of attention is called with tokens, where they are and what it looks at, and returns
what is attended and, by name, what it looked at.
"""

import dataclasses
import math
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from dsct_jax.model.layers import SAVED, Linear, linear_in_float32, matmul_2d
from pallas_kernels.deformable_attention import deformable_attention_from_offsets

SpatialShapes = tuple[tuple[int, int], ...]
Attended = tuple[Float[Array, "b q d"], dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@no_type_check
class Memory:
    """What an image is to the decoder: the tokens of all levels, one after another."""

    tokens: Float[Any, "b s d"]
    positions: Float[Any, "b s e"]  # as waves or what a network makes of them
    padding: Bool[Any, "b s"]
    valid_ratios: Float[Any, "b l 2"]  # (width, height) of the image as a share of each map
    spatial_shapes: SpatialShapes = dataclasses.field(metadata={"static": True})
    # of deformable attention, by which this memory is sampled; None = chosen when traced
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})
    fine: Float[Any, "b h w c"] | None = None  # C2, where boxes are read cell by cell


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
        samples, zeros = math.prod(self.shape), nnx.initializers.zeros
        start = {"bias_init": lambda *_: jnp.asarray(initial_offsets(*self.shape)).reshape(-1)}
        self.sampling_offsets = Linear(d, samples * 2, kernel_init=zeros, **start, rngs=rngs)
        self.attention_weights = Linear(d, samples, kernel_init=zeros, rngs=rngs)
        self.value_proj = Linear(d, d, rngs=rngs)
        self.output_proj = Linear(d, d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        reference_points: Float[Array, "b q l 2"],
        memory: Memory,
        boxes: Float[Array, "b q l 2"] | None = None,
    ) -> Attended:
        """Sampled were sampling_locations [b q n l p 2] in [0, 1], attention_weights [b q n l p].

        `boxes` are widths and heights in [0, 1] of the padded canvas: sampling offsets then count
        in half boxes instead of pixels, the farthest initial point on the border (Zhu et al. 2020,
        iterative bounding box refinement). A width of 0 keeps a query's offsets in pixels.
        """
        queries, spatial_shapes = tokens + positions, memory.spatial_shapes
        b, q, d = queries.shape
        n, l, p = self.shape
        value = jnp.where(memory.padding[..., None], 0, self.value_proj(memory.tokens))
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
            attended = deformable_attention_from_offsets(
                *where, implementation=memory.implementation
            )
        attended = checkpoint_name(attended, SAVED)
        weights = jax.nn.softmax(logits.reshape(b, q, n, l * p)).reshape(logits.shape)
        sampled = {  # dead code under jit unless the caller keeps it
            "sampling_locations": reference_points[:, :, None, :, None, :] + offsets / sizes,
            "attention_weights": weights,
        }
        return self.output_proj(attended), sampled


def attention_weights(
    query: Float[Array, "b q n c"],
    key: Float[Array, "b s n c"],
    hidden: Bool[Array, "#b #q s"] | None = None,
) -> Float[Array, "b n q s"]:
    """Scaled dot-product attention of each head, float32. `hidden` keys are not seen by a query;
    where all are, all count alike.
    """
    query = query / math.sqrt(query.shape[-1])
    scores = jnp.einsum("bqnc,bsnc->bnqs", query, key, preferred_element_type=jnp.float32)
    if hidden is not None:
        scores = jnp.where(hidden[:, None], jnp.finfo(jnp.float32).min, scores)
    return jax.nn.softmax(scores)


def attend(
    weights: Float[Array, "b n q s"], value: Float[Array, "b s n c"]
) -> Float[Array, "b q d"]:
    """The values that each head attends, heads joined."""
    attended = jnp.einsum("bnqs,bsnc->bqnc", weights.astype(value.dtype), value)
    return attended.reshape(*attended.shape[:2], -1)


def split_heads(x: Float[Array, "*b d"], num_heads: int) -> Float[Array, "*b n c"]:
    """The channels of each head."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


class MultiHeadAttention(nnx.Module):
    """Multi-head attention; the projections of queries, keys and values are packed as in
    torch.nn.MultiheadAttention.
    """

    def __init__(self, shape: LayerShape, *, rngs: nnx.Rngs):
        self.num_heads = shape.num_heads
        self.in_proj = Linear(shape.d, 3 * shape.d, rngs=rngs)
        self.out_proj = Linear(shape.d, shape.d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        hidden: Bool[Array, "#b #q s"] | None = None,
        memory: Memory | None = None,
    ) -> Attended:
        """Attends the memory, without one the tokens themselves, of which a query does not see the
        `hidden` ones. Looked at: attention_weights [b n q s].
        """
        assert self.in_proj.bias is not None
        queries, d, dtype = tokens + positions, tokens.shape[-1], tokens.dtype
        kernel = self.in_proj.kernel[...].astype(dtype)
        bias = self.in_proj.bias[...].astype(dtype).reshape(1, 1, -1)

        def project(x, part):
            return matmul_2d(x, kernel[:, part], dtype) + bias[..., part]

        if memory is None:  # one product instead of two
            query, key = jnp.split(project(queries, slice(2 * d)), 2, -1)
        else:
            query = project(queries, slice(d))
            key = project(memory.tokens + memory.positions, slice(d, 2 * d))
        value = project(tokens if memory is None else memory.tokens, slice(2 * d, 3 * d))
        query, key, value = (split_heads(x, self.num_heads) for x in (query, key, value))
        weights = attention_weights(query, key, hidden)
        return self.out_proj(attend(weights, value)), {"attention_weights": weights}
