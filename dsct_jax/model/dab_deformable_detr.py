"""DAB-Deformable-DETR (Liu et al. 2022): Deformable DETR whose queries are boxes, learned and then
refined; where a query is, is computed from its box anew in every layer.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.config import setting
from dsct_jax.model.layers import MLP, DropoutNoise, standard_normal
from dsct_jax.model.pyramid import BACKBONE_SLOWER, Pyramid, QueryConfig
from dsct_jax.model.refining_decoder import Heads, RefiningDecoder, box_waves


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
        self.decoder = RefiningDecoder(config.layer_shape, num_layers=layers, rngs=rngs)
        self.heads = Heads(config, copies=layers, large=True, rngs=rngs)
        self.content_embed = nnx.Param(standard_normal(rngs.params(), (q, d)))
        self.box_embed = nnx.Param(standard_normal(rngs.params(), (q, 4)))
        self.position_head = MLP(2 * d, d, d, rngs=rngs)
        self.position_scale = MLP(d, d, d, rngs=rngs)

    def detect(
        self,
        levels: list[Float[Array, "b _ _ d"]],
        padding_mask: Bool[Array, "b h w"],
        *,
        people: Targets | None = None,
        noise: DropoutNoise | None = None,
        implementation: str | None = None,
    ) -> Predictions:
        """One map per level -> predictions."""
        del people
        config = self.config
        how: dict[str, Any] = {"noise": noise, "implementation": implementation}
        memory = self.encode(levels, padding_mask, **how)
        how["remat"] = config.remat
        dtype, b = memory.tokens.dtype, memory.tokens.shape[0]
        tokens = jnp.broadcast_to(self.content_embed[...], (b, *self.content_embed.shape))
        boxes = jnp.broadcast_to(jax.nn.sigmoid(self.box_embed[...]), (b, *self.box_embed.shape))

        def positions(layer: int, tokens: jax.Array, references: jax.Array) -> jax.Array:
            position = self.position_head(box_waves(references, memory))
            if layer > 0:
                position = position * self.position_scale(tokens.astype(jnp.float32))
            return position.astype(dtype)

        decoded = self.decoder(
            tokens.astype(dtype),
            positions,
            boxes,
            memory,
            self.heads,
            epsilon=config.sigmoid_epsilon,
            **how,
        )
        details = decoded.details
        return Predictions(decoded.logits, decoded.boxes, details)
