"""Deformable DETR (Zhu et al. 2020): plain, with box refinement, two-stage; and H-Deformable-DETR
(Jia et al. 2022), which is two-stage with further queries in training, each person's several times.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsct_jax.batch import Branch, Hungarian, Predictions
from dsct_jax.config import cannot_be_used, setting
from dsct_jax.model.attention import Memory
from dsct_jax.model.decoder import Decoder, deformable_look
from dsct_jax.model.family import Pyramid, QueryConfig, for_images
from dsct_jax.model.heads import Heads
from dsct_jax.model.layers import Linear, standard_normal
from dsct_jax.model.position import XYWH, sine_of
from dsct_jax.model.proposals import NormedLinear, best_tokens, propose


@dataclasses.dataclass(frozen=True)
class DeformableDetrConfig(QueryConfig):
    """The model section. H-Deformable-DETR has feedforward_dim 2048, dropout 0, everything below
    on, and 1500 one-to-many queries, for 12 epochs.
    """

    published: ClassVar = {"loss": {"weight_class": 2.0}}

    name: str = setting("deformable_detr", choices=("deformable_detr",))
    box_refinement: bool = setting(
        False, "each layer samples inside the box of the one before and refines it"
    )
    two_stage: bool = setting(False, "the best proposals of the encoder are the queries' boxes")
    mixed_selection: bool = setting(
        False, "with two_stage: what the queries hold is learned, only where they are is proposed"
    )
    look_forward_twice: bool = setting(
        False, "with box_refinement: a layer's boxes train the layer before too"
    )
    num_one_to_many: int = setting(0, "with two_stage: further queries in training", low=0)
    one_to_many_repeats: int = setting(6, "of them, how many answer for each person", low=1)
    one_to_many_weight: float = setting(1.0, "of their losses", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = [
            ("two_stage", self.two_stage, "box_refinement", self.box_refinement),
            ("look_forward_twice", self.look_forward_twice, "box_refinement", self.box_refinement),
            ("mixed_selection", self.mixed_selection, "two_stage", self.two_stage),
            ("num_one_to_many", self.num_one_to_many, "two_stage", self.two_stage),
        ]
        for field, value, other, given in needs:
            if value and not given:
                raise cannot_be_used(f"model.{other}", given, f"True with config.model.{field}")


class DeformableDetr(Pyramid):
    """Learned queries, or proposals of the encoder, look at a few points of every level."""

    config: DeformableDetrConfig

    def __init__(self, config: DeformableDetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, layers = config.hidden_dim, config.num_decoder_layers
        self.decoder = Decoder(lambda i: self.decoder_layer(i, rngs=rngs), layers)
        copies = (layers if config.box_refinement else 1) + config.two_stage
        self.heads = Heads(config, copies=copies, large=not config.two_stage, rngs=rngs)
        if config.two_stage:
            self.proposal_features = NormedLinear(d, d, rngs=rngs)
            self.proposal_positions = NormedLinear(2 * d, 2 * d, rngs=rngs)
        else:
            self.reference_points = Linear(d, 2, rngs=rngs)
        if config.mixed_selection or not config.two_stage:
            size = config.num_queries + config.num_one_to_many, d if config.two_stage else 2 * d
            self.query_embed = nnx.Param(standard_normal(rngs.params(), size))

    def decode(self, memory: Memory, people: Any, noise: Any) -> Predictions:
        """Memory -> predictions."""
        config, q = self.config, self.config.num_queries
        extra = config.num_one_to_many if noise is not None else 0
        first_stage: dict[str, Any] = {}
        branches: tuple[Branch, ...] = ()
        hidden = None
        if config.two_stage:
            proposals = propose(memory, self.proposal_features, self.heads)
            index = best_tokens(proposals.logits[..., 0], q + extra)
            first_stage = {"proposals": proposals, "selected": index}
            references = jax.lax.stop_gradient(proposals.take(index).boxes)
            embedding = self.proposal_positions(
                sine_of(references, config.hidden_dim // 2, order=XYWH)
            )
            of_all = (proposals.logits[None], proposals.boxes[None])
            branches = (Branch(*of_all, Hungarian(), "encoder", one_class=True),)
            if extra:
                one_to_one = np.arange(q + extra) < q
                hidden = jnp.asarray(one_to_one != one_to_one[:, None])[None]
        else:
            embedding = for_images(self.query_embed[...], memory.tokens.shape[0])
        positions, tokens = jnp.split(embedding, 2, -1)
        if config.mixed_selection:
            tokens = jnp.broadcast_to(self.query_embed[: q + extra][None], tokens.shape)
        if not config.two_stage:
            references = jax.nn.sigmoid(self.reference_points(positions))
        look = deformable_look(memory, positions, hidden)
        how = {"refines": config.box_refinement, "look_forward_twice": config.look_forward_twice}
        found = self.run(tokens, references, memory, look, noise, **how)
        if extra:
            rule, weight = Hungarian(config.one_to_many_repeats), config.one_to_many_weight
            further = found.logits[:, :, q:], found.boxes[:, :, q:]
            branches += (Branch(*further, rule, "one_to_many", weight=weight),)
        return Predictions(
            found.logits[:, :, :q],
            found.boxes[:, :, :q],
            found.details | first_stage,
            branches if noise is not None else (),
        )
