"""DAB-Deformable-DETR (Liu et al. 2022): Deformable DETR whose queries are boxes, learned and then
refined; where a query is, is computed from its box anew in every layer.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dsct_jax.batch import Predictions
from dsct_jax.config import setting
from dsct_jax.model.attention import Memory
from dsct_jax.model.decoder import Decoder, box_waves, deformable_look
from dsct_jax.model.family import BACKBONE_SLOWER, Pyramid, QueryConfig, for_images
from dsct_jax.model.heads import Heads
from dsct_jax.model.layers import MLP, standard_normal


@dataclasses.dataclass(frozen=True)
class DabDeformableDetrConfig(QueryConfig):
    """The model section."""

    published: ClassVar = {
        "loss": {"weight_class": 1.0, "giou_epsilon": 1e-6},
        "optimizer": {"learning_rate": 1e-4, "rules": BACKBONE_SLOWER},
    }

    name: str = setting("dab_deformable_detr", choices=("dab_deformable_detr",))
    feedforward_dim: int = setting(2048, "width inside a feed-forward block", low=1)
    dropout: float = setting(0.0, "rate, in training", low=0, below=1, free=True)
    sigmoid_epsilon: float = setting(1e-3, "references are kept this far from 0 and 1", above=0)


class DabDeformableDetr(Pyramid):
    """Learned boxes, and what each of them holds."""

    config: DabDeformableDetrConfig

    def __init__(self, config: DabDeformableDetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, q, layers = config.hidden_dim, config.num_queries, config.num_decoder_layers
        self.decoder = Decoder(lambda i: self.decoder_layer(i, rngs=rngs), layers)
        self.heads = Heads(config, copies=layers, large=True, rngs=rngs)
        self.content_embed = nnx.Param(standard_normal(rngs.params(), (q, d)))
        self.box_embed = nnx.Param(standard_normal(rngs.params(), (q, 4)))
        self.position_head = MLP(2 * d, d, d, rngs=rngs)
        self.position_scale = MLP(d, d, d, rngs=rngs)

    def decode(self, memory: Memory, people: Any, noise: Any) -> Predictions:
        """Memory -> predictions."""
        b = memory.tokens.shape[0]
        tokens, boxes = (for_images(x[...], b) for x in (self.content_embed, self.box_embed))

        def positions(layer: int, tokens: jax.Array, boxes: jax.Array) -> jax.Array:
            position = self.position_head(box_waves(boxes, memory))
            scale = self.position_scale(tokens.astype(jnp.float32)) if layer else 1
            return position * scale

        look = deformable_look(memory, positions)
        return self.run(tokens, jax.nn.sigmoid(boxes), memory, look, noise, refines=True)
