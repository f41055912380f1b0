"""Anchor DETR (Wang et al. 2021): queries are points, each with several patterns; attention goes
along rows, then over them.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions
from dsct_jax.config import setting
from dsct_jax.model.attention import (
    Attended,
    LayerShape,
    Memory,
    MultiHeadAttention,
    attention_weights,
    split_heads,
)
from dsct_jax.model.decoder import Decoder
from dsct_jax.model.encoder import Layer, MemoryLook
from dsct_jax.model.family import C5Config, C5Network, for_images
from dsct_jax.model.heads import BoxHead
from dsct_jax.model.layers import (
    MLP,
    InputProjection,
    Linear,
    initializer,
    matmul_2d,
    standard_normal,
)
from dsct_jax.model.position import YX, map_coordinates, sine, sine_of


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
    """Attention along each row of a map, then over the rows: two small sets of weights instead of
    one of the whole map, from one key per column and one per row, which are means, over padding
    too. Positions are that in the row, then that in the column.
    """

    def __init__(self, shape: LayerShape, *, rngs: nnx.Rngs):
        self.num_heads = shape.num_heads
        self.in_proj = Linear(shape.d, 5 * shape.d, rngs=rngs)
        self.out_proj = Linear(shape.d, shape.d, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "b q d"], positions: Float[Array, "b q d2"], memory: Memory
    ) -> Attended:
        """Looked at: row_weights [b n q w] and column_weights [b n q h]."""
        assert self.in_proj.bias is not None
        (b, _, d), dtype = tokens.shape, memory.tokens.dtype
        h, w = memory.spatial_shapes[0]
        value, place, padding = (
            x.reshape(b, h, w, *x.shape[2:])
            for x in (memory.tokens, memory.positions, memory.padding)
        )
        in_row, in_column = place[:, 0, :, :d], place[:, :, 0, d:]
        queries = tokens + positions[..., :d], tokens + positions[..., d:]
        projected = []
        for i, x in enumerate((*queries, value.mean(1) + in_row, value.mean(2) + in_column, value)):
            part = slice(i * d, (i + 1) * d)
            kernel, bias = self.in_proj.kernel[:, part], self.in_proj.bias[part]
            bias = bias.astype(dtype).reshape(*(1,) * (x.ndim - 1), d)
            projected.append(
                split_heads(matmul_2d(x, kernel.astype(dtype), dtype) + bias, self.num_heads)
            )
        row_query, column_query, row_key, column_key, value = projected
        along_row = attention_weights(row_query, row_key, padding[:, :1])
        over_rows = attention_weights(column_query, column_key, padding[:, None, :, 0])
        gathered = jnp.einsum("bnqw,bhwnc->bnqhc", along_row.astype(dtype), value)
        attended = jnp.einsum("bnqh,bnqhc->bqnc", over_rows.astype(dtype), gathered)
        seen = {"row_weights": along_row, "column_weights": over_rows}
        return self.out_proj(attended.reshape(tokens.shape)), seen


class AnchorDETR(C5Network):
    """Every pattern at every point is a query."""

    def __init__(self, config: AnchorDetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, attention=RowColumnAttention, xavier=False, rngs=rngs)
        d, uniform = config.hidden_dim, initializer(lambda g, size: g.uniform(0, 1, size))
        self.input_proj = InputProjection(self.channels, d, strided=False, rngs=rngs)
        self.points = nnx.Param(uniform(rngs.params(), (config.num_queries, 2)))
        self.patterns = nnx.Param(standard_normal(rngs.params(), (config.num_patterns, d)))
        self.embed_one = MLP(d, d, d, xavier=False, rngs=rngs)  # of x, or of y
        self.embed_both = MLP(d, d, d, xavier=False, rngs=rngs)
        kinds = MultiHeadAttention, RowColumnAttention  # norms are numbered as in their weights
        layer = partial(Layer, config.layer_shape, *kinds, norms=(2, 1, 3), xavier=False, rngs=rngs)
        self.decoder = Decoder(lambda _: layer(), config.num_decoder_layers)
        self.box_head = BoxHead(d, rngs=rngs)

    def grid_position(self, mask: Bool[Array, "b h w"]) -> Float[Array, "b h w e"]:
        """Where a token is in its row, and where in its column."""
        where = map_coordinates(mask, offset=0.5, epsilon=0.0)
        in_row = self.embed(where[:, 0, :, 0])[:, None]
        in_column = self.embed(where[:, :, 0, 1])[:, :, None]
        shape = *mask.shape, self.config.hidden_dim
        return jnp.concatenate([jnp.broadcast_to(x, shape) for x in (in_row, in_column)], -1)

    def embed(self, u: Float[Array, "*n"]) -> Float[Array, "*n d"]:
        """One coordinate in [0, 1]."""
        return self.embed_one(sine(u, self.config.hidden_dim))

    def look(self, memory: Memory) -> MemoryLook:
        """The row and the column of each token."""
        return lambda memory: (memory.positions, memory)

    def decode(self, memory: Memory, people: Any, noise: Any) -> Predictions:
        """Memory -> predictions."""
        config, (b, _, d), dtype = self.config, memory.tokens.shape, memory.tokens.dtype
        points = jnp.tile(self.points[...], (config.num_patterns, 1))
        apart = jnp.concatenate([self.embed(points[:, 0]), self.embed(points[:, 1])], -1)
        both = self.embed_both(sine_of(points, d // 2, order=YX))
        both, apart = (for_images(x, b).astype(dtype) for x in (both, apart))
        patterns = self.patterns[np.arange(config.num_patterns).repeat(config.num_queries)]
        looks = (both,), (apart, memory)
        queries = for_images(patterns, b), for_images(points, b)
        return self.run(*queries, memory, lambda *_: looks, noise)
