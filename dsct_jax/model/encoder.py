"""Encoders. Deformable: every token of every level is a query that samples all levels around its
own place. Plain: every token of one level attends all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.model.attention import (
    DeformableAttention,
    LayerShape,
    MultiHeadAttention,
    SpatialShapes,
)
from dsct_jax.model.layers import MLP, DropoutNoise, LayerNorm, dropout, rematerialized


class Memory(NamedTuple):
    """What an image is to the decoder: the tokens of all levels, one after another."""

    tokens: Float[Array, "b s d"]
    padding: Bool[Array, "b s"]
    spatial_shapes: SpatialShapes  # static
    valid_ratios: Float[Array, "b l 2"]  # (width, height) of the image as a share of each map


class FeedForward(nnx.Module):
    """Two dense layers with a ReLU between them, or a ReLU with a trained slope below 0
    (`leaky`).
    """

    def __init__(
        self, shape: LayerShape, *, leaky: bool = False, xavier: bool = True, rngs: nnx.Rngs
    ):
        d, d_inner, self.dropout_rate = shape.d, shape.feedforward_dim, shape.dropout
        self.linear1, self.linear2 = (
            MLP(a, b, xavier=xavier, rngs=rngs)[0] for a, b in ((d, d_inner), (d_inner, d))
        )
        self.slope = nnx.Param(jnp.full(1, 0.25)) if leaky else None

    def __call__(
        self, x: Float[Array, "b s d"], noise: DropoutNoise | None
    ) -> Float[Array, "b s d"]:
        x = self.linear1(x)
        if self.slope is None:
            x = jax.nn.relu(x)
        else:
            x = jnp.where(x >= 0, x, x * self.slope[...].astype(x.dtype).reshape(1, 1, 1))
        return self.linear2(dropout(x, self.dropout_rate, noise))


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
        where = (reference_points, memory, memory_padding, spatial_shapes)
        attended, _ = self.self_attention(memory + positions, *where, implementation=implementation)
        memory = self.norm1(memory + dropout(attended, self.dropout_rate, noise))
        inner = dropout(self.feedforward(memory, noise), self.dropout_rate, noise)
        return self.norm2(memory + inner)


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


class PlainEncoderLayer(nnx.Module):
    """Self-attention and a feed-forward block, each with a residual and then a norm."""

    def __init__(self, shape: LayerShape, *, leaky: bool, rngs: nnx.Rngs):
        self.dropout_rate = shape.dropout
        self.self_attention = MultiHeadAttention(shape.d, num_heads=shape.num_heads, rngs=rngs)
        self.norm1 = LayerNorm(shape.d, rngs=rngs)
        self.feedforward = FeedForward(shape, leaky=leaky, rngs=rngs)
        self.norm2 = LayerNorm(shape.d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b s d"],
        positions: Float[Array, "b s d"],
        padding: Bool[Array, "b s"],
        *,
        noise: DropoutNoise | None,
    ) -> Float[Array, "b s d"]:
        placed = tokens + positions
        attended, _ = self.self_attention(placed, placed, tokens, hidden=padding[:, None])
        tokens = self.norm1(tokens + dropout(attended, self.dropout_rate, noise))
        return self.norm2(
            tokens + dropout(self.feedforward(tokens, noise), self.dropout_rate, noise)
        )


class PlainEncoder(nnx.List):
    """The plain encoder's layers, in order."""

    def __init__(self, shape: LayerShape, *, num_layers: int, leaky: bool = False, rngs: nnx.Rngs):
        super().__init__(
            [PlainEncoderLayer(shape, leaky=leaky, rngs=rngs) for _ in range(num_layers)]
        )

    def __call__(
        self,
        tokens: Float[Array, "b s d"],
        positions: Float[Array, "b s d"],
        padding: Bool[Array, "b s"],
        *,
        position_scale: Callable[[jax.Array], jax.Array] | None = None,
        noise: DropoutNoise | None,
        remat: str,
    ) -> Float[Array, "b s d"]:
        """With `position_scale` each layer multiplies the positions by what it makes of the
        tokens.
        """
        for layer in self:
            placed = positions if position_scale is None else positions * position_scale(tokens)
            tokens = rematerialized(partial(layer, noise=noise), remat)(tokens, placed, padding)
        return tokens
