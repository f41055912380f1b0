"""DINO (Zhang et al. 2022): proposals with learned contents as queries, boxes that look forward
twice, and contrastive denoising: queries made of people have to say who, those next to people that
there is nobody.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Branch, Hungarian, Predictions, Targets
from dsct_jax.config import setting
from dsct_jax.model.attention import Memory
from dsct_jax.model.decoder import Decoder, DeformableLayer, box_waves, deformable_look
from dsct_jax.model.denoising import Queries, denoising_queries, move_corners, split_known
from dsct_jax.model.family import BACKBONE_SLOWER, Pyramid, QueryConfig, for_images
from dsct_jax.model.heads import Heads
from dsct_jax.model.layers import MLP, DropoutNoise, LayerNorm, standard_normal, xavier_uniform
from dsct_jax.model.position import sine_position
from dsct_jax.model.proposals import NormedLinear, best_tokens, propose


@dataclasses.dataclass(frozen=True)
class DinoConfig(QueryConfig):
    """The model section."""

    published: ClassVar = {
        "loss": {"weight_class": 1.0, "giou_epsilon": 1e-6},
        "optimizer": {"learning_rate": 1e-4, "drop_at": 11 / 12, "rules": BACKBONE_SLOWER},
        "train": {"epochs": 12.0},
    }

    name: str = setting("dino", choices=("dino",))
    feedforward_dim: int = setting(2048, "width inside a feed-forward block", low=1)
    dropout: float = setting(0.0, "rate, in training", low=0, below=1, free=True)
    num_queries: int = setting(900, "how many people it can find", low=1)
    sigmoid_epsilon: float = setting(1e-3, "references are kept this far from 0 and 1", above=0)
    position_temperature: float = setting(20.0, "of the features' positions", above=0)
    position_offset: float = setting(0.0, "of the first pixel's position", low=0, high=1)
    num_denoising: int = setting(100, "pairs of denoising queries, about; 0 = off", low=0)
    label_noise: float = setting(0.5, "twice the share of random labels", low=0, high=1)
    box_noise: float = setting(0.4, "of half a box, how far its corners move at most", low=0)


class Dino(Pyramid):
    """DETR with improved denoising anchor boxes."""

    config: DinoConfig

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, k, layers = config.hidden_dim, config.num_classes, config.num_decoder_layers
        self.decoder = Decoder(lambda i: self.make_layer(i, rngs), layers)
        self.decoder_norm = LayerNorm(d, rngs=rngs)
        self.heads = Heads(config, copies=1, large=False, rngs=rngs)
        self.proposal_heads = Heads(config, copies=1, large=False, rngs=rngs)
        self.proposal_features = NormedLinear(d, d, rngs=rngs)
        self.position_head = MLP(2 * d, d, d, rngs=rngs)
        self.content_embed = nnx.Param(xavier_uniform(rngs.params(), (config.num_queries, d)))
        self.label_embed = nnx.Param(standard_normal(rngs.params(), (k + 1, d)))

    def grid_position(self, mask: Bool[Array, "b h w"]) -> Float[Array, "b h w e"]:
        """Where the tokens of one level lie."""
        config = self.config
        temperature, offset = config.position_temperature, config.position_offset
        return sine_position(mask, config.hidden_dim, temperature=temperature, offset=offset)

    def make_layer(self, number: int, rngs: nnx.Rngs) -> DeformableLayer:
        """One of the decoder."""
        return self.decoder_layer(number, rngs=rngs)

    def with_context(
        self, tokens: jax.Array, references: jax.Array, hidden: Any
    ) -> tuple[jax.Array, jax.Array, Any, int]:
        """Contents and boxes of all queries, who does not see whom, and how many of the first are
        context: here none.
        """
        return tokens, references, hidden, 0

    def decode(self, memory: Memory, people: Any, noise: Any) -> Predictions:
        """Memory -> predictions; with `noise` the `people` are denoised."""
        proposals = propose(memory, self.proposal_features, self.proposal_heads)
        index = best_tokens(proposals.logits[..., -1], self.config.num_queries)
        chosen = proposals.take(index)
        references = jax.lax.stop_gradient(chosen.boxes)
        tokens = for_images(self.content_embed[...], references.shape[0])
        denoising = None
        if people is not None and noise is not None and self.config.num_denoising:
            denoising = self.denoising_queries(people, noise)
            tokens = jnp.concatenate([denoising.tokens, tokens], 1)
            references = jnp.concatenate([jax.nn.sigmoid(denoising.box_logits), references], 1)

        def positions(layer: int, tokens: jax.Array, boxes: jax.Array) -> jax.Array:
            return self.position_head(box_waves(boxes, memory))

        tokens, references, hidden, m = self.with_context(
            tokens, references, denoising and denoising.hidden
        )
        look = deformable_look(memory, positions, hidden)
        how = {"refines": True, "look_forward_twice": True, "num_context": m}
        found = self.run(tokens, references, memory, look, noise, **how)
        first_stage = Branch(chosen.logits[None], chosen.boxes[None], Hungarian(), "encoder")
        details = {"proposals": proposals, "selected": index, "denoising": denoising}
        found = dataclasses.replace(
            found,
            details=found.details | details,
            branches=(first_stage,) if noise is not None else (),
        )
        return split_known(found, denoising and denoising.known)

    def denoising_queries(self, people: Targets, noise: DropoutNoise) -> Queries:
        """Positives and negatives of everybody, about `num_denoising` of each."""
        config = self.config
        return denoising_queries(
            people,
            noise,
            self.label_embed[...],
            num_groups=num_groups(config.num_denoising, people.valid.shape[-1]),
            num_queries=config.num_queries,
            epsilon=config.sigmoid_epsilon,
            negatives=True,
            label_noise=config.label_noise / 2,
            box_noise=config.box_noise,
            move=move_corners,
        )


def num_groups(number: int, t: int) -> int:
    """How many denoising groups of `t` people, as the authors count: a `number` below 50 is that of
    positives and negatives per person instead of per image.
    """
    if t == 0:
        return 1
    return 2 * number if number < 50 else max(1, number // t)
