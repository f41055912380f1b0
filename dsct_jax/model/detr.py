"""DETR (Carion et al. 2020): a transformer from C5 to a set of boxes."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsct_jax.batch import Predictions
from dsct_jax.config import setting
from dsct_jax.model.attention import Memory, MultiHeadAttention
from dsct_jax.model.decoder import Decoder
from dsct_jax.model.encoder import Layer
from dsct_jax.model.family import C5Config, C5Network, for_images
from dsct_jax.model.heads import BoxHead
from dsct_jax.model.layers import LayerNorm, Linear, standard_normal, torch_uniform


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


class NoObjectHead(Linear):
    """Softmax over the classes and "no object": that over the classes, and beside it a sigmoid of
    the last logit that our predictions have (batch.Predictions).
    """

    def __call__(
        self, inputs: Float[Array, "*n d"], out_sharding: Any = None
    ) -> Float[Array, "*n k1"]:
        logits = super().__call__(inputs, out_sharding)
        classes, nobody = jnp.split(logits, [logits.shape[-1] - 1], -1)
        subject = jax.nn.logsumexp(classes, -1, keepdims=True) - nobody
        return jnp.concatenate([classes, subject], -1)


class DETR(C5Network):
    """Learned positional queries, whose content starts at zero."""

    def __init__(self, config: DetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.decoder_norm = LayerNorm(config.hidden_dim, rngs=rngs)
        d, attentions = config.hidden_dim, (MultiHeadAttention,) * 2
        self.queries = nnx.Param(standard_normal(rngs.params(), (config.num_queries, d)))
        layer = partial(Layer, config.layer_shape, *attentions, norms=(1, 2, 3), rngs=rngs)
        self.decoder = Decoder(lambda _: layer(), config.num_decoder_layers)
        start = torch_uniform(d)
        self.class_head = NoObjectHead(
            d, config.num_classes + 1, kernel_init=start, bias_init=start, rngs=rngs
        )
        self.box_head = BoxHead(d, initial_size=None, rngs=rngs)

    def decode(self, memory: Memory, people: Any, noise: Any) -> Predictions:
        """Memory -> predictions."""
        positions = for_images(self.queries[...], memory.tokens.shape[0])
        positions = positions.astype(memory.tokens.dtype)
        looks = (positions,), (positions, memory.padding[:, None], memory)
        # boxes are relative to the image's centre
        points = jnp.full((*positions.shape[:2], 2), 0.5)
        return self.run(jnp.zeros_like(positions), points, memory, lambda *_: looks, noise)
