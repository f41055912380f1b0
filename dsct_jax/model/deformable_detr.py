"""Deformable DETR (Zhu et al. 2020): plain, with box refinement, two-stage; and H-Deformable-DETR
(Jia et al. 2022), which is two-stage with further queries in training, each person's several times.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Branch, Hungarian, Predictions, Targets
from dsct_jax.config import cannot_be_used, setting
from dsct_jax.model.encoder import Memory
from dsct_jax.model.layers import DropoutNoise, Linear, standard_normal
from dsct_jax.model.position import XYWH, sine_of
from dsct_jax.model.proposals import NormedLinear, Proposals, class_zero_topk, propose
from dsct_jax.model.pyramid import Pyramid, QueryConfig
from dsct_jax.model.refining_decoder import Heads, RefiningDecoder


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
        self.decoder = RefiningDecoder(config.layer_shape, num_layers=layers, rngs=rngs)
        copies = (layers if config.box_refinement else 1) + config.two_stage
        large = not config.two_stage
        self.heads = Heads(config, copies=copies, large=large, rngs=rngs)
        num_queries, width = config.num_queries + config.num_one_to_many, 2 * d
        if config.two_stage:
            width = d
            self.proposal_features = NormedLinear(d, d, rngs=rngs)
            self.proposal_positions = NormedLinear(2 * d, 2 * d, rngs=rngs)
        else:
            self.reference_points = Linear(d, 2, rngs=rngs)
        if config.mixed_selection or not config.two_stage:
            self.query_embed = nnx.Param(standard_normal(rngs.params(), (num_queries, width)))

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
        training, q = noise is not None, config.num_queries
        proposals = index = hidden = None
        if config.two_stage:
            extra = config.num_one_to_many if training else 0
            proposals = self.propose(memory)
            index = class_zero_topk(proposals, q + extra)
            queries = self.proposed_queries(proposals.take(index))
            one_to_one = np.arange(q + extra) < q
            hidden = jnp.asarray(one_to_one != one_to_one[:, None])[None] if extra else None
        else:
            queries = self.learned_queries(memory.tokens.shape[0])
        tokens, positions, references = queries
        decoded = self.decoder(
            tokens.astype(memory.tokens.dtype),
            positions.astype(memory.tokens.dtype),
            references,
            memory,
            self.heads,
            refines=config.box_refinement,
            look_forward_twice=config.look_forward_twice,
            hidden=hidden,
            epsilon=config.sigmoid_epsilon,
            **how,
        )
        branches = self.branches(proposals, decoded.logits, decoded.boxes) if training else ()
        return Predictions(
            decoded.logits[:, :, :q],
            decoded.boxes[:, :, :q],
            decoded.details | {"proposals": proposals, "selected": index},
            branches,
        )

    def learned_queries(self, b: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What each query holds, where it is, and its reference point, for `b` images."""
        embedding = self.query_embed[...]
        positions, tokens = jnp.split(jnp.broadcast_to(embedding, (b, *embedding.shape)), 2, -1)
        return tokens, positions, jax.nn.sigmoid(self.reference_points(positions))

    def propose(self, memory: Memory) -> Proposals:
        """What each token proposes."""
        heads = self.heads
        return propose(memory, self.proposal_features, heads.classes[-1], heads.boxes[-1])

    def proposed_queries(self, chosen: Proposals) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What each query holds, where it is, and its box: that of a proposal."""
        references = jax.lax.stop_gradient(chosen.boxes)
        embedding = self.proposal_positions(
            sine_of(references, self.config.hidden_dim // 2, order=XYWH)
        )
        positions, tokens = jnp.split(embedding, 2, -1)
        if self.config.mixed_selection:
            tokens = jnp.broadcast_to(self.query_embed[: tokens.shape[1]][None], tokens.shape)
        return tokens, positions, references

    def branches(
        self, proposals: Proposals | None, logits: jax.Array, boxes: jax.Array
    ) -> tuple[Branch, ...]:
        """What training asks of the proposals and of the queries beyond the answer's."""
        if proposals is None:
            return ()
        config, q = self.config, self.config.num_queries
        first_stage = Branch(
            proposals.logits[None], proposals.boxes[None], Hungarian(), "encoder", one_class=True
        )
        if not config.num_one_to_many:
            return (first_stage,)
        rule = Hungarian(config.one_to_many_repeats)
        further = (logits[:, :, q:], boxes[:, :, q:], rule, "one_to_many")
        return first_stage, Branch(*further, weight=config.one_to_many_weight)
