"""Conditional DETR (Meng et al. 2021): cross-attention looks for content and for position apart."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions
from dsct_jax.config import setting
from dsct_jax.model.attention import (
    Attended,
    LayerShape,
    Memory,
    attend,
    attention_weights,
    split_heads,
)
from dsct_jax.model.decoder import Decoder
from dsct_jax.model.encoder import Layer
from dsct_jax.model.family import C5Config, C5Network, for_images
from dsct_jax.model.layers import (
    MLP,
    LayerNorm,
    Linear,
    standard_normal,
    torch_uniform,
)
from dsct_jax.model.position import YX, sine_of


@dataclasses.dataclass(frozen=True)
class ConditionalDetrConfig(C5Config):
    """The model section."""

    published: ClassVar = {"loss": {"weight_class": 2.0}, "optimizer": {"learning_rate": 1e-4}}

    name: str = setting("conditional_detr", "Conditional DETR", choices=("conditional_detr",))


class ConditionalAttention(nnx.Module):
    """Projections of their own for content and position. Among the queries themselves positions are
    added; to the memory the scores are those of the contents plus those of the positions, which
    each head sees side by side: the query's are the waves of its reference. In the `first` layer,
    where contents say nothing yet, they hold positions too.
    """

    def __init__(
        self, shape: LayerShape, *, cross: bool = False, first: bool = False, rngs: nnx.Rngs
    ):
        d, self.num_heads = shape.d, shape.num_heads
        dense = partial(Linear, d, d, bias_init=torch_uniform(d), rngs=rngs)
        self.query_content, self.key_content, self.key_position = dense(), dense(), dense()
        self.query_waves = dense() if cross else None
        self.query_position = dense() if first or not cross else None
        self.value = dense()
        self.out_proj = Linear(d, d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        hidden: Bool[Array, "#b #q s"] | None = None,
        waves: Float[Array, "b q d"] | None = None,
        memory: Memory | None = None,
    ) -> Attended:
        """To the memory, with `waves`, or without one to the tokens themselves."""
        source, place = (memory.tokens, memory.positions) if memory else (tokens, positions)
        query, key = self.query_content(tokens), self.key_content(source)
        key_position = self.key_position(place)
        if self.query_position is not None:
            query, key = query + self.query_position(positions), key + key_position
        split = partial(split_heads, num_heads=self.num_heads)
        query, key, value = split(query), split(key), split(self.value(source))
        if self.query_waves is not None and waves is not None:
            query = jnp.concatenate([query, split(self.query_waves(waves))], -1)
            key = jnp.concatenate([key, split(key_position)], -1)
        weights = attention_weights(query, key, hidden)
        return self.out_proj(attend(weights, value)), {"attention_weights": weights}


def conditional_decoder(config: C5Config, *, leaky: bool = False, rngs: nnx.Rngs) -> Any:
    """Layers of both attentions."""
    cross = partial(ConditionalAttention, cross=True)
    make = partial(Layer, config.layer_shape, ConditionalAttention, norms=(1, 2, 3), rngs=rngs)
    return Decoder(
        lambda i: make(partial(cross, first=i == 0), leaky=leaky), config.num_decoder_layers
    )


class ConditionalDETR(C5Network):
    """Each query has a point, at which its waves let it look; layers scale the waves by what the
    query has found so far.
    """

    def __init__(self, config: ConditionalDetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.decoder_norm = LayerNorm(config.hidden_dim, rngs=rngs)
        d = config.hidden_dim
        self.queries = nnx.Param(standard_normal(rngs.params(), (config.num_queries, d)))
        self.query_points = MLP(d, d, 2, rngs=rngs)
        self.query_scale = MLP(d, d, d, rngs=rngs)
        self.decoder = conditional_decoder(config, rngs=rngs)

    def decode(self, memory: Memory, people: Any, noise: Any) -> Predictions:
        """Memory -> predictions."""
        queries, b = self.queries[...], memory.tokens.shape[0]
        points = for_images(jax.nn.sigmoid(self.query_points(queries)), b)
        positions = for_images(queries, b).astype(memory.tokens.dtype)
        waves = sine_of(points, queries.shape[-1] // 2, order=YX).astype(positions.dtype)

        def look(layer: int, tokens: jax.Array, _: jax.Array) -> tuple[tuple, tuple]:
            scaled = waves * self.query_scale(tokens) if layer else waves
            return (positions,), (positions, memory.padding[:, None], scaled, memory)

        return self.run(jnp.zeros_like(positions), points, memory, look, noise)
