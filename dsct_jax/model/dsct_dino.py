"""Ours: DSCT's decoupled subject and context queries trained by DINO's recipe (Zhang et al. 2022).
Subjects begin at the encoder's best proposals, move from layer to layer, and are denoised.

Context queries have a learned content and a learned box each, which does not move. They are seen by
all queries, and fused into subjects and noisy people alike; they do not see the noisy people, or
what these were made of would reach the subjects through them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsct_jax.config import setting
from dsct_jax.model.decoder import DeformableLayer
from dsct_jax.model.dino import Dino, DinoConfig
from dsct_jax.model.dsct import ContextConfig
from dsct_jax.model.family import for_images
from dsct_jax.model.layers import standard_normal

_SIDE = 0.1  # of a context query's box at the start


@dataclasses.dataclass(frozen=True)
class DsctDinoConfig(ContextConfig, DinoConfig):
    """The model section."""

    name: str = setting("dsct_dino", choices=("dsct_dino",))
    num_queries: int = setting(100, "subject queries, from the best proposals", low=1)
    subject_logit: bool = setting(True, 'whether "a subject" has a logit of its own')

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_context(self.num_decoder_layers)


class DsctDino(Dino):
    """DINO whose decoder fuses subject and context queries."""

    config: DsctDinoConfig

    def __init__(self, config: DsctDinoConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        m, d = config.num_context_queries, config.hidden_dim
        if m:  # no array without elements: checkpoints cannot hold one
            self.context_queries = nnx.Param(standard_normal(rngs.params(), (m, d)))
            centers = jax.random.uniform(rngs.params(), (m, 2), minval=0.05, maxval=0.95)
            boxes = jnp.concatenate([centers, jnp.full((m, 2), _SIDE)], -1)
            self.context_boxes = nnx.Param(jax.scipy.special.logit(boxes))

    def make_layer(self, number: int, rngs: nnx.Rngs) -> DeformableLayer:
        """One that fuses, where the configuration says so."""
        config = self.config
        fusion, m = config.fusion_of_layer(number), config.num_context_queries
        return self.decoder_layer(number, num_context=m, fusion=fusion, rngs=rngs)

    def with_context(
        self, tokens: jax.Array, references: jax.Array, hidden: Any
    ) -> tuple[jax.Array, jax.Array, Any, int]:
        """The context first, then noisy people, then subjects."""
        b, m = tokens.shape[0], self.config.num_context_queries
        if not m:
            return tokens, references, hidden, 0
        tokens = jnp.concatenate([for_images(self.context_queries[...], b), tokens], 1)
        boxes = for_images(jax.nn.sigmoid(self.context_boxes[...]), b)
        references = jnp.concatenate([boxes, references], 1)
        if hidden is not None:
            noisy = hidden[:, -1:]  # the last subject does not see them either
            rows = jnp.concatenate([jnp.broadcast_to(noisy, (1, m, noisy.shape[-1])), hidden], 1)
            hidden = jnp.pad(rows, ((0, 0), (0, 0), (m, 0)))  # all see the context
        return tokens, references, hidden, m
