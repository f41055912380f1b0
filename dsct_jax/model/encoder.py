"""The layer of all encoders and decoders, and the encoder: tokens of the memory attend the memory,
in one of the ways of `attention`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsct_jax.model.attention import LayerShape, Memory, SpatialShapes
from dsct_jax.model.layers import MLP, DropoutNoise, LayerNorm, dropout, rematerialized


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


class Layer(nnx.Module):
    """One or two attentions, to the tokens themselves and to the memory, and a feed-forward block,
    each with a residual and then a norm.
    """

    def __init__(
        self,
        shape: LayerShape,
        *attentions: Callable[..., nnx.Module],
        norms: tuple[int, ...],
        rngs: nnx.Rngs,
        **feedforward: bool,
    ):
        """`norms`: the number of each part's in the published weights."""
        self.dropout_rate, self.norms = shape.dropout, norms
        names = ("self_attention", "cross_attention")[: len(attentions)]
        for name, make, number in zip(names, attentions, norms, strict=False):
            setattr(self, name, make(shape, rngs=rngs))
            setattr(self, f"norm{number}", LayerNorm(shape.d, rngs=rngs))
        self.make_fusion(shape, rngs)
        self.feedforward = FeedForward(shape, rngs=rngs, **feedforward)
        setattr(self, f"norm{norms[-1]}", LayerNorm(shape.d, rngs=rngs))

    def make_fusion(self, shape: LayerShape, rngs: nnx.Rngs) -> None:
        """What `fuse` has of its own."""

    def fuse(
        self, tokens: Float[Array, "b q d"], looks: tuple[Any, ...], noise: DropoutNoise | None
    ) -> tuple[Float[Array, "b q d"], dict[str, jax.Array]]:
        """What happens between attention and the feed-forward block: here nothing."""
        return tokens, {}

    def __call__(
        self, tokens: Float[Array, "b q d"], *looks: tuple[Any, ...], noise: DropoutNoise | None
    ) -> tuple[Float[Array, "b q d"], dict[str, jax.Array]]:
        """Returns the tokens and what the layer looked at; `looks` is what each attention takes
        beside the tokens.
        """
        details: dict[str, jax.Array] = {}
        for attention, prefix, number, look in zip(
            ("self_attention", "cross_attention"), ("self_", ""), self.norms, looks, strict=False
        ):
            attended, seen = getattr(self, attention)(tokens, *look)
            tokens = self._add(number, tokens, attended, noise)
            details |= {f"{prefix}{name}": value for name, value in seen.items()}
        tokens, fused = self.fuse(tokens, looks, noise)
        tokens = self._add(self.norms[-1], tokens, self.feedforward(tokens, noise), noise)
        return tokens, details | fused

    def _add(self, norm: int, tokens: jax.Array, x: jax.Array, noise: Any) -> jax.Array:
        return getattr(self, f"norm{norm}")(tokens + dropout(x, self.dropout_rate, noise))


# memory -> what the attention of an encoder layer takes beside the tokens
MemoryLook = Callable[[Memory], tuple[Any, ...]]


class Encoder(nnx.List):
    """The encoder's layers, in order."""

    def __init__(self, *layer: Any, num_layers: int, **options: Any):
        super().__init__([Layer(*layer, norms=(1, 2), **options) for _ in range(num_layers)])

    def __call__(
        self,
        memory: Memory,
        look: MemoryLook,
        *,
        remat: str,
        noise: DropoutNoise | None,
    ) -> Memory:
        """The memory, encoded."""
        for layer in self:

            def run(memory: Memory, layer: Layer = layer) -> jax.Array:
                return layer(memory.tokens, look(memory), noise=noise)[0]

            tokens = rematerialized(run, remat)(memory)
            memory = dataclasses.replace(memory, tokens=tokens)
        return memory
