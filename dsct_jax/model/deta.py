"""DETA (Ouyang-Zhang et al. 2022): two-stage Deformable DETR that is trained like a classical
detector, by overlaps with anchors, several queries per person, and freed from duplicates by
suppression.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dsct_jax.batch import Branch, Overlap, Predictions
from dsct_jax.config import setting
from dsct_jax.model.attention import Memory
from dsct_jax.model.decoder import Decoder, deformable_look
from dsct_jax.model.family import Pyramid, QueryConfig
from dsct_jax.model.heads import Heads
from dsct_jax.model.position import XYWH, sine_of
from dsct_jax.model.proposals import NormedLinear, per_level_nms, propose


@dataclasses.dataclass(frozen=True)
class DetaConfig(QueryConfig):
    """The model section."""

    published: ClassVar = {
        "loss": {"weight_class": 1.0},
        "optimizer": {"drop_at": 10 / 12},
        "train": {"epochs": 12.0},
    }

    name: str = setting("deta", choices=("deta",))
    num_levels: int = setting(5, "l: C3, C4, C5 and stride-2 convolutions", low=3)
    feedforward_dim: int = setting(2048, "width inside a feed-forward block", low=1)
    dropout: float = setting(0.0, "rate, in training", low=0, below=1, free=True)
    num_queries: int = setting(900, "how many people it can find", low=1)
    num_candidates: int = setting(1000, "tokens per level that enter suppression", low=1)
    proposal_iou: float = setting(0.9, "a proposal with more is a duplicate", low=0, high=1)
    first_stage_iou: float = setting(0.7, "from which an anchor is a person's", low=0, high=1)
    second_stage_iou: float = setting(0.6, "from which a query is a person's", low=0, high=1)
    num_positives: int = setting(128, "anchors of an image that count for people", low=1)
    repeats: int = setting(4, "anchors, and queries, per person", low=1)


class Deta(Pyramid):
    """Proposals without duplicates are the queries; what they hold is what was seen there."""

    config: DetaConfig

    def __init__(self, config: DetaConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, layers = config.hidden_dim, config.num_decoder_layers
        self.decoder = Decoder(lambda i: self.decoder_layer(i, rngs=rngs), layers)
        self.heads = Heads(config, copies=layers + 1, large=False, rngs=rngs)
        self.proposal_features = NormedLinear(d, d, rngs=rngs)
        self.proposal_positions = NormedLinear(2 * d, 2 * d, rngs=rngs)
        self.proposal_contents = NormedLinear(d, d, rngs=rngs)

    def decode(self, memory: Memory, people: Any, noise: Any) -> Predictions:
        """Memory -> predictions."""
        config, k, q = self.config, self.config.repeats, self.config.num_queries
        proposals = propose(memory, self.proposal_features, self.heads)
        index = per_level_nms(
            proposals,
            q,
            spatial_shapes=memory.spatial_shapes,
            num_candidates=config.num_candidates,
            threshold=config.proposal_iou,
        )
        chosen = jax.lax.stop_gradient(proposals.take(index))
        waves = sine_of(chosen.boxes, config.hidden_dim // 2, order=XYWH)
        positions, tokens = jnp.split(self.proposal_positions(waves), 2, -1)
        tokens = tokens + self.proposal_contents(chosen.features)
        look = deformable_look(memory, positions)
        found = self.run(tokens, chosen.boxes, memory, look, noise, refines=True)
        anchors = jax.lax.stop_gradient(proposals.anchors)
        first_stage = Overlap(anchors, config.first_stage_iou, k, config.num_positives)
        of_all = (proposals.logits[None], proposals.boxes[None])
        branch = Branch(*of_all, first_stage, "encoder", one_class=True)
        return dataclasses.replace(
            found,
            details=found.details | {"proposals": proposals, "selected": index},
            branches=(branch,) if noise is not None else (),
            assignment=Overlap(chosen.boxes, config.second_stage_iou, k, q // 4),
        )
