"""Deformable encoder: every token of every level is a query that samples all levels around its own
place.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.model.attention import DeformableAttention, LayerShape, SpatialShapes
from dsct_jax.model.layers import (
    DropoutNoise,
    LayerNorm,
    Linear,
    dropout,
    rematerialized,
    torch_uniform,
)


class Memory(NamedTuple):
    """What an image is to the decoder: the tokens of all levels, one after another."""

    tokens: Float[Array, "b s d"]
    padding: Bool[Array, "b s"]
    spatial_shapes: SpatialShapes  # static
    valid_ratios: Float[Array, "b l 2"]  # (width, height) of the image as a share of each map


class FeedForward(nnx.Module):
    """Two dense layers with a ReLU between them."""

    def __init__(self, shape: LayerShape, *, rngs: nnx.Rngs):
        d, d_inner, self.dropout_rate = shape.d, shape.feedforward_dim, shape.dropout
        self.linear1 = Linear(d, d_inner, bias_init=torch_uniform(d), rngs=rngs)
        self.linear2 = Linear(d_inner, d, bias_init=torch_uniform(d_inner), rngs=rngs)

    def __call__(
        self, x: Float[Array, "b s d"], noise: DropoutNoise | None
    ) -> Float[Array, "b s d"]:
        return self.linear2(dropout(jax.nn.relu(self.linear1(x)), self.dropout_rate, noise))


def token_centers(
    spatial_shapes: SpatialShapes, valid_ratios: Float[Array, "b l 2"]
) -> Float[Array, "b s 2"]:
    """(x, y) of every token in [0, 1] of its image."""
    centers = []
    for level, (h, w) in enumerate(spatial_shapes):
        y, x = np.mgrid[:h, :w].astype(np.float32) + np.float32(0.5)
        grid = np.stack([x, y], -1).reshape(1, h * w, 2)
        size = np.array([w, h], np.float32).reshape(1, 1, 2)
        centers.append(grid / (valid_ratios[:, None, level] * size))
    return jnp.concatenate(centers, 1)


class EncoderLayer(nnx.Module):
    """Deformable self-attention and a feed-forward block, each with a residual and then a norm."""

    def __init__(self, shape: LayerShape, *, rngs: nnx.Rngs):
        self.dropout_rate = shape.dropout
        self.self_attention = DeformableAttention(shape, rngs=rngs)
        self.norm1 = LayerNorm(shape.d, rngs=rngs)
        self.feedforward = FeedForward(shape, rngs=rngs)
        self.norm2 = LayerNorm(shape.d, rngs=rngs)

    def __call__(
        self,
        memory: Float[Array, "b s d"],
        positions: Float[Array, "b s d"],
        reference_points: Float[Array, "b s l 2"],
        memory_padding: Bool[Array, "b s"],
        spatial_shapes: SpatialShapes,
        *,
        noise: DropoutNoise | None,
        implementation: str | None,
    ) -> Float[Array, "b s d"]:
        attended, _ = self.self_attention(
            memory + positions,
            reference_points,
            memory,
            memory_padding,
            spatial_shapes,
            implementation=implementation,
        )
        memory = self.norm1(memory + dropout(attended, self.dropout_rate, noise))
        return self.norm2(
            memory + dropout(self.feedforward(memory, noise), self.dropout_rate, noise)
        )


class Encoder(nnx.List):
    """The encoder's layers, in order."""

    def __init__(self, shape: LayerShape, *, num_layers: int, rngs: nnx.Rngs):
        super().__init__([EncoderLayer(shape, rngs=rngs) for _ in range(num_layers)])

    def __call__(
        self, memory: Memory, positions: Float[Array, "b s d"], *, remat: str, **how: Any
    ) -> Memory:
        """`how`: `noise` and `implementation` of each layer."""
        tokens, padding, shapes, ratios = memory
        points = token_centers(shapes, ratios)[:, :, None] * ratios[:, None]  # of each level's map
        for layer in self:
            run = rematerialized(partial(layer, spatial_shapes=shapes, **how), remat)
            tokens = run(tokens, positions, points, padding)
        return memory._replace(tokens=tokens)
