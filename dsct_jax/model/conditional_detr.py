"""Conditional DETR (Meng et al. 2021): cross-attention looks for content and for position apart."""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.config import setting
from dsct_jax.model.attention import (
    LayerShape,
    attend,
    attention_weights,
    conditional_attention,
    split_heads,
)
from dsct_jax.model.encoder import FeedForward, PlainEncoder
from dsct_jax.model.family import C5Config, C5Network, PlainMemory, for_images, plain_shape
from dsct_jax.model.heads import BoxHead, ClassHead, refine
from dsct_jax.model.layers import (
    MLP,
    DropoutNoise,
    LayerNorm,
    Linear,
    dropout,
    rematerialized,
    standard_normal,
    torch_uniform,
)
from dsct_jax.model.position import YX, sine_of


@dataclasses.dataclass(frozen=True)
class ConditionalDetrConfig(C5Config):
    """The model section."""

    published: ClassVar = {"loss": {"weight_class": 2.0}, "optimizer": {"learning_rate": 1e-4}}

    name: str = setting("conditional_detr", "Conditional DETR", choices=("conditional_detr",))


class ConditionalSelfAttention(nnx.Module):
    """Self-attention with projections of their own for content and position."""

    def __init__(self, d: int, *, num_heads: int, rngs: nnx.Rngs):
        self.num_heads = num_heads
        dense = partial(Linear, d, d, bias_init=torch_uniform(d), rngs=rngs)
        self.query_content, self.query_position = dense(), dense()
        self.key_content, self.key_position = dense(), dense()
        self.value = dense()
        self.out_proj = Linear(d, d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        hidden: Bool[Array, "#b q q"] | None,
    ) -> Float[Array, "b q d"]:
        query = self.query_content(tokens) + self.query_position(positions)
        key = self.key_content(tokens) + self.key_position(positions)
        query, key, value = (
            split_heads(x, self.num_heads) for x in (query, key, self.value(tokens))
        )
        return self.out_proj(attend(attention_weights(query, key, hidden), value))


class ConditionalCrossAttention(nnx.Module):
    """Scores of content plus scores of position: the query's are the waves of its reference. In the
    `first` layer, where contents say nothing yet, they hold positions too.
    """

    def __init__(self, d: int, *, num_heads: int, first: bool, rngs: nnx.Rngs):
        self.num_heads = num_heads
        dense = partial(Linear, d, d, bias_init=torch_uniform(d), rngs=rngs)
        self.query_content, self.query_waves = dense(), dense()
        self.query_position = dense() if first else None
        self.key_content, self.key_position = dense(), dense()
        self.value = dense()
        self.out_proj = Linear(d, d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        waves: Float[Array, "b q d"],
        memory: PlainMemory,
    ) -> Float[Array, "b q d"]:
        query, key = self.query_content(tokens), self.key_content(memory.tokens)
        key_position = self.key_position(memory.positions)
        if self.query_position is not None:
            query, key = query + self.query_position(positions), key + key_position
        attended = conditional_attention(
            (query, self.query_waves(waves)),
            (key, key_position),
            self.value(memory.tokens),
            num_heads=self.num_heads,
            hidden=memory.padding[:, None],
        )
        return self.out_proj(attended)


class ConditionalDecoderLayer(nnx.Module):
    """Self-attention, cross-attention and a feed-forward block, each with a residual and then a
    norm.
    """

    def __init__(self, shape: LayerShape, *, first: bool, leaky: bool = False, rngs: nnx.Rngs):
        d, n, self.dropout_rate = shape.d, shape.num_heads, shape.dropout
        self.self_attention = ConditionalSelfAttention(d, num_heads=n, rngs=rngs)
        self.norm1 = LayerNorm(d, rngs=rngs)
        self.cross_attention = ConditionalCrossAttention(d, num_heads=n, first=first, rngs=rngs)
        self.norm2 = LayerNorm(d, rngs=rngs)
        self.feedforward = FeedForward(shape, leaky=leaky, rngs=rngs)
        self.norm3 = LayerNorm(d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        waves: Float[Array, "b q d"],
        memory: PlainMemory,
        hidden: Bool[Array, "#b q q"] | None = None,
        *,
        noise: DropoutNoise | None,
    ) -> Float[Array, "b q d"]:
        drop = partial(dropout, rate=self.dropout_rate, noise=noise)
        tokens = self.norm1(tokens + drop(self.self_attention(tokens, positions, hidden)))
        attended = self.cross_attention(tokens, positions, waves, memory)
        tokens = self.norm2(tokens + drop(attended))
        return self.norm3(tokens + drop(self.feedforward(tokens, noise)))


class ConditionalDETR(C5Network):
    """Each query has a point, at which its waves let it look; layers scale the waves by what the
    query has found so far.
    """

    def __init__(self, config: ConditionalDetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        shape, d = plain_shape(config), config.hidden_dim
        self.encoder = PlainEncoder(shape, num_layers=config.num_encoder_layers, rngs=rngs)
        self.queries = nnx.Param(standard_normal(rngs.params(), (config.num_queries, d)))
        self.query_points = MLP(d, d, 2, rngs=rngs)
        self.query_scale = MLP(d, d, d, rngs=rngs)
        self.decoder = nnx.List(
            [
                ConditionalDecoderLayer(shape, first=i == 0, rngs=rngs)
                for i in range(config.num_decoder_layers)
            ]
        )
        self.decoder_norm = LayerNorm(d, rngs=rngs)
        self.class_head = ClassHead(d, config.num_classes, subject=config.subject_logit, rngs=rngs)
        self.box_head = BoxHead(d, initial_size=0.0, rngs=rngs)

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
        with jax.named_scope("encoder"):
            memory = self.encode(features, padding_mask, noise=noise)
        queries = self.queries[...]
        points = for_images(jax.nn.sigmoid(self.query_points(queries)), features.shape[0])
        positions = for_images(queries, features.shape[0]).astype(features.dtype)
        waves = sine_of(points, positions.shape[-1] // 2, order=YX)
        tokens, waves = jnp.zeros_like(positions), waves.astype(positions.dtype)
        states: list[jax.Array] = []
        with jax.named_scope("decoder"):
            for layer in self.decoder:
                run = rematerialized(partial(layer, noise=noise), self.config.remat)
                scale = self.query_scale(tokens) if states else 1
                tokens = run(tokens, positions, waves * scale, memory)
                states.append(tokens)
        with jax.named_scope("heads"):
            x = self.decoder_norm(jnp.stack(states)).astype(jnp.float32)
            deltas = self.box_head.deltas(x)
            boxes = refine(
                deltas,
                jnp.broadcast_to(points, (*deltas.shape[:-1], 2)),
                epsilon=self.config.sigmoid_epsilon,
            )
            logits = self.class_head(x)
        details = {
            "memory": memory.tokens,
            "states": jnp.stack(states),
            "reference_points": points,
        }
        return Predictions(logits, boxes, details if return_details else None)
