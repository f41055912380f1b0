"""Anchor DETR (Wang et al. 2021): queries are points, each with several patterns; attention goes
along rows, then over them.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.config import setting
from dsct_jax.model.attention import LayerShape, MultiHeadAttention, row_column_attention
from dsct_jax.model.backbone import BACKBONES
from dsct_jax.model.encoder import FeedForward
from dsct_jax.model.family import C5Config, C5Network, for_images, plain_shape
from dsct_jax.model.heads import BoxHead, ClassHead, refine
from dsct_jax.model.layers import (
    MLP,
    DropoutNoise,
    InputProjection,
    LayerNorm,
    Linear,
    dropout,
    initializer,
    matmul_2d,
    rematerialized,
    standard_normal,
)
from dsct_jax.model.position import YX, map_coordinates, resize_mask, sine, sine_of


@dataclasses.dataclass(frozen=True)
class AnchorDetrConfig(C5Config):
    """The model section."""

    published: ClassVar = {"loss": {"weight_class": 2.0}, "optimizer": {"learning_rate": 1e-4}}

    name: str = setting("anchor_detr", "Anchor DETR", choices=("anchor_detr",))
    feedforward_dim: int = setting(1024, "width inside a feed-forward block", low=1)
    dropout: float = setting(0.0, "rate, in training", low=0, below=1, free=True)
    dilation: bool = setting(True, "True: C5 has stride 16 instead of 32 (DC5); detrex: False")
    num_queries: int = setting(300, "points", low=1)
    num_patterns: int = setting(3, "queries per point", low=1)


class RowColumnAttention(nnx.Module):
    """Row-column decoupled attention over a map, with its projections packed."""

    def __init__(self, d: int, *, num_heads: int, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.in_proj = Linear(d, 5 * d, rngs=rngs)
        self.out_proj = Linear(d, d, rngs=rngs)

    def __call__(
        self,
        row_queries: Float[Array, "b q d"],
        column_queries: Float[Array, "b q d"],
        memory: Float[Array, "b h w d"],
        in_row: Float[Array, "b w d"],
        in_column: Float[Array, "b h d"],
        padding: Bool[Array, "b h w"],
    ) -> Float[Array, "b q d"]:
        """`in_row` and `in_column` say where a token is. The keys are means, over padding too."""
        assert self.in_proj.bias is not None
        d, dtype = row_queries.shape[-1], memory.dtype
        inputs = (
            row_queries,
            column_queries,
            memory.mean(1) + in_row,
            memory.mean(2) + in_column,
            memory,
        )
        projected = []
        for i, x in enumerate(inputs):
            part = slice(i * d, (i + 1) * d)
            kernel, bias = self.in_proj.kernel[:, part], self.in_proj.bias[part]
            bias = bias.astype(dtype).reshape(*(1,) * (x.ndim - 1), d)
            projected.append(matmul_2d(x, kernel.astype(dtype), dtype) + bias)
        return self.out_proj(
            row_column_attention(*projected, num_heads=self.num_heads, padding=padding)
        )


class AnchorEncoderLayer(nnx.Module):
    """Row-column attention and a feed-forward block, each with a residual and then a norm."""

    def __init__(self, shape: LayerShape, *, rngs: nnx.Rngs):
        self.dropout_rate = shape.dropout
        self.self_attention = RowColumnAttention(shape.d, num_heads=shape.num_heads, rngs=rngs)
        self.norm1 = LayerNorm(shape.d, rngs=rngs)
        self.feedforward = FeedForward(shape, xavier=False, rngs=rngs)
        self.norm2 = LayerNorm(shape.d, rngs=rngs)

    def __call__(
        self,
        memory: Float[Array, "b h w d"],
        in_row: Float[Array, "b w d"],
        in_column: Float[Array, "b h d"],
        padding: Bool[Array, "b h w"],
        *,
        noise: DropoutNoise | None,
    ) -> Float[Array, "b h w d"]:
        drop = partial(dropout, rate=self.dropout_rate, noise=noise)
        tokens = memory.reshape(memory.shape[0], -1, memory.shape[-1])
        row_queries = (memory + in_row[:, None]).reshape(tokens.shape)
        column_queries = (memory + in_column[:, :, None]).reshape(tokens.shape)
        attended = self.self_attention(
            row_queries, column_queries, memory, in_row, in_column, padding
        )
        tokens = self.norm1(tokens + drop(attended))
        tokens = self.norm2(tokens + drop(self.feedforward(tokens, noise)))
        return tokens.reshape(memory.shape)


class AnchorDecoderLayer(nnx.Module):
    """Self-attention, row-column attention and a feed-forward block, each with a residual and then
    a norm.
    """

    def __init__(self, shape: LayerShape, *, rngs: nnx.Rngs):
        d, n, self.dropout_rate = shape.d, shape.num_heads, shape.dropout
        self.self_attention = MultiHeadAttention(d, num_heads=n, rngs=rngs)
        self.norm2 = LayerNorm(d, rngs=rngs)  # numbered as in the published weights
        self.cross_attention = RowColumnAttention(d, num_heads=n, rngs=rngs)
        self.norm1 = LayerNorm(d, rngs=rngs)
        self.feedforward = FeedForward(shape, xavier=False, rngs=rngs)
        self.norm3 = LayerNorm(d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: tuple[jax.Array, jax.Array, jax.Array],
        *memory: jax.Array,
        noise: DropoutNoise | None,
    ) -> Float[Array, "b q d"]:
        """`positions` [b q d] of the queries' points: x and y together, x, y."""
        drop = partial(dropout, rate=self.dropout_rate, noise=noise)
        both, x, y = positions
        placed = tokens + both
        attended, _ = self.self_attention(placed, placed, tokens)
        tokens = self.norm2(tokens + drop(attended))
        attended = self.cross_attention(tokens + x, tokens + y, *memory)
        tokens = self.norm1(tokens + drop(attended))
        return self.norm3(tokens + drop(self.feedforward(tokens, noise)))


class AnchorDETR(C5Network):
    """Every pattern at every point is a query."""

    def __init__(self, config: AnchorDetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        shape, d = plain_shape(config), config.hidden_dim
        channels = BACKBONES[config.backbone].channels[-1]
        self.input_proj = InputProjection(channels, d, strided=False, rngs=rngs)
        self.encoder = nnx.List(
            [AnchorEncoderLayer(shape, rngs=rngs) for _ in range(config.num_encoder_layers)]
        )
        self.points = nnx.Param(
            initializer(lambda g, size: g.uniform(0, 1, size))(
                rngs.params(), (config.num_queries, 2)
            )
        )
        self.patterns = nnx.Param(standard_normal(rngs.params(), (config.num_patterns, d)))
        self.embed_one = MLP(d, d, d, xavier=False, rngs=rngs)  # of x, or of y
        self.embed_both = MLP(d, d, d, xavier=False, rngs=rngs)
        self.decoder = nnx.List(
            [AnchorDecoderLayer(shape, rngs=rngs) for _ in range(config.num_decoder_layers)]
        )
        self.class_head = ClassHead(d, config.num_classes, subject=config.subject_logit, rngs=rngs)
        self.box_head = BoxHead(d, rngs=rngs)

    def detect(
        self,
        features: Float[Array, "b h w c"],
        padding_mask: Bool[Array, "b h2 w2"],
        *,
        people: Targets | None = None,
        noise: DropoutNoise | None = None,
        return_details: bool = False,
    ) -> Predictions:
        """C5 -> predictions."""
        del people
        config = self.config
        x = self.input_proj(features)
        mask = resize_mask(padding_mask, *x.shape[1:3])
        where = map_coordinates(mask, offset=0.5, epsilon=0.0)
        in_row, in_column = (
            self.embed_one(sine(u, config.hidden_dim)).astype(x.dtype)
            for u in (where[:, 0, :, 0], where[:, :, 0, 1])
        )
        with jax.named_scope("encoder"):
            for layer in self.encoder:
                run = rematerialized(partial(layer, noise=noise), config.remat)
                x = run(x, in_row, in_column, mask)
        points = jnp.tile(self.points[...], (config.num_patterns, 1))
        positions = tuple(
            for_images(position, x.shape[0]).astype(x.dtype)
            for position in (
                self.embed_both(sine_of(points, config.hidden_dim // 2, order=YX)),
                self.embed_one(sine(points[:, 0], config.hidden_dim)),
                self.embed_one(sine(points[:, 1], config.hidden_dim)),
            )
        )
        patterns = self.patterns[np.arange(config.num_patterns).repeat(config.num_queries)]
        tokens, states = for_images(patterns, x.shape[0]).astype(x.dtype), []
        with jax.named_scope("decoder"):
            for layer in self.decoder:
                run = rematerialized(partial(layer, noise=noise), config.remat)
                tokens = run(tokens, positions, x, in_row, in_column, mask)
                states.append(tokens)
        with jax.named_scope("heads"):
            exact = jnp.stack(states).astype(jnp.float32)
            deltas = self.box_head.deltas(exact)
            references = jnp.broadcast_to(points, (*deltas.shape[:-1], 2))
            boxes = refine(deltas, references, epsilon=config.sigmoid_epsilon)
            logits = self.class_head(exact)
        details = {
            "memory": x.reshape(x.shape[0], -1, x.shape[-1]),
            "states": exact,
            "reference_points": references[0],
        }
        return Predictions(logits, boxes, details if return_details else None)
