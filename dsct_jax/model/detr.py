"""DETR (Carion et al. 2020): a transformer from C5 to a set of boxes."""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.config import setting
from dsct_jax.model.attention import LayerShape, MultiHeadAttention
from dsct_jax.model.encoder import FeedForward, PlainEncoder
from dsct_jax.model.family import C5Config, C5Network, PlainMemory, for_images, plain_shape
from dsct_jax.model.heads import BoxHead
from dsct_jax.model.layers import (
    DropoutNoise,
    LayerNorm,
    Linear,
    dropout,
    rematerialized,
    standard_normal,
    torch_uniform,
)


@dataclasses.dataclass(frozen=True)
class DetrConfig(C5Config):
    """The model section."""

    published: ClassVar = {
        "loss": {"weight_class": 1.0, "class_loss": "no_object"},
        "matcher": {"cost_class": 1.0},
        "optimizer": {"learning_rate": 1e-4, "drop_at": 2 / 3},
        "train": {"epochs": 300.0},
    }

    name: str = setting("detr", "DETR", choices=("detr",))
    num_queries: int = setting(100, "how many people it can find", low=1)


class DetrDecoderLayer(nnx.Module):
    """Self-attention, cross-attention and a feed-forward block, each with a residual and then a
    norm.
    """

    def __init__(self, shape: LayerShape, *, rngs: nnx.Rngs):
        d, self.dropout_rate = shape.d, shape.dropout
        self.self_attention = MultiHeadAttention(d, num_heads=shape.num_heads, rngs=rngs)
        self.norm1 = LayerNorm(d, rngs=rngs)
        self.cross_attention = MultiHeadAttention(d, num_heads=shape.num_heads, rngs=rngs)
        self.norm2 = LayerNorm(d, rngs=rngs)
        self.feedforward = FeedForward(shape, rngs=rngs)
        self.norm3 = LayerNorm(d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        memory: PlainMemory,
        *,
        noise: DropoutNoise | None,
    ) -> Float[Array, "b q d"]:
        drop = partial(dropout, rate=self.dropout_rate, noise=noise)
        placed = tokens + positions
        attended, _ = self.self_attention(placed, placed, tokens)
        tokens = self.norm1(tokens + drop(attended))
        attended, _ = self.cross_attention(
            tokens + positions,
            memory.tokens + memory.positions,
            memory.tokens,
            hidden=memory.padding[:, None],
        )
        tokens = self.norm2(tokens + drop(attended))
        return self.norm3(tokens + drop(self.feedforward(tokens, noise)))


class DETR(C5Network):
    """Learned positional queries, whose content starts at zero."""

    def __init__(self, config: DetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        shape, d = plain_shape(config), config.hidden_dim
        self.encoder = PlainEncoder(shape, num_layers=config.num_encoder_layers, rngs=rngs)
        self.queries = nnx.Param(standard_normal(rngs.params(), (config.num_queries, d)))
        self.decoder = nnx.List(
            [DetrDecoderLayer(shape, rngs=rngs) for _ in range(config.num_decoder_layers)]
        )
        self.decoder_norm = LayerNorm(d, rngs=rngs)
        start = torch_uniform(d)
        self.class_head = Linear(
            d, config.num_classes + 1, kernel_init=start, bias_init=start, rngs=rngs
        )
        self.box_head = BoxHead(d, initial_size=None, rngs=rngs)

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
        positions = for_images(self.queries[...], features.shape[0]).astype(features.dtype)
        tokens, states = jnp.zeros_like(positions), []
        with jax.named_scope("decoder"):
            for layer in self.decoder:
                run = rematerialized(partial(layer, noise=noise), self.config.remat)
                tokens = run(tokens, positions, memory)
                states.append(tokens)
        with jax.named_scope("heads"):
            x = self.decoder_norm(jnp.stack(states)).astype(jnp.float32)
            classes, nobody = jnp.split(self.class_head(x), [self.config.num_classes], -1)
            # Softmax over the classes and "no object" is softmax over the classes, and beside it a
            # sigmoid of this: the last logit that our predictions have (batch.Predictions).
            subject = jax.nn.logsumexp(classes, -1, keepdims=True) - nobody
            logits = jnp.concatenate([classes, subject], -1)
            boxes = jax.nn.sigmoid(self.box_head.deltas(x))
        details = {"memory": memory.tokens, "states": jnp.stack(states)}
        return Predictions(logits, boxes, details if return_details else None)
