"""DINO (Zhang et al. 2022): proposals with learned contents as queries, boxes that look forward
twice, and contrastive denoising: queries made of people have to say who, those next to people that
there is nobody.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Branch, Hungarian, Known, Predictions, Targets
from dsct_jax.config import setting
from dsct_jax.model.denoising import (
    embed_labels,
    hidden_queries,
    move_corners,
    noisy_people,
    query_logits,
)
from dsct_jax.model.layers import MLP, DropoutNoise, LayerNorm, standard_normal, xavier_uniform
from dsct_jax.model.position import sine_position
from dsct_jax.model.proposals import NormedLinear, max_topk, propose
from dsct_jax.model.pyramid import BACKBONE_SLOWER, Pyramid, QueryConfig
from dsct_jax.model.refining_decoder import Heads, RefiningDecoder, box_waves


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


class Denoising(NamedTuple):
    """Queries made of people."""

    tokens: Float[Array, "b q d"]
    box_logits: Float[Array, "b q 4"]
    hidden: Bool[Array, "1 q2 q2"]  # of these queries and the others
    known: Known


class Dino(Pyramid):
    """DETR with improved denoising anchor boxes."""

    config: DinoConfig

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, k, layers = config.hidden_dim, config.num_classes, config.num_decoder_layers
        self.decoder = RefiningDecoder(config.layer_shape, num_layers=layers, rngs=rngs)
        self.decoder_norm = LayerNorm(d, rngs=rngs)
        self.heads = Heads(config, copies=1, large=False, rngs=rngs)
        self.proposal_heads = Heads(config, copies=1, large=False, rngs=rngs)
        self.proposal_features = NormedLinear(d, d, rngs=rngs)
        self.position_head = MLP(2 * d, d, d, rngs=rngs)
        self.content_embed = nnx.Param(xavier_uniform(rngs.params(), (config.num_queries, d)))
        self.label_embed = nnx.Param(standard_normal(rngs.params(), (k + 1, d)))

    def grid_position(self, mask: Bool[Array, "b h w"]) -> Float[Array, "b h w d"]:
        """Where the tokens of one level lie."""
        config = self.config
        return sine_position(
            mask,
            config.hidden_dim,
            temperature=config.position_temperature,
            offset=config.position_offset,
        )

    def detect(
        self,
        levels: list[Float[Array, "b _ _ d"]],
        padding_mask: Bool[Array, "b h w"],
        *,
        people: Targets | None = None,
        noise: DropoutNoise | None = None,
        implementation: str | None = None,
    ) -> Predictions:
        """One map per level -> predictions; with `noise` the `people` are denoised."""
        config = self.config
        how: dict[str, Any] = {"noise": noise, "implementation": implementation}
        memory = self.encode(levels, padding_mask, **how)
        how["remat"] = config.remat
        heads = self.proposal_heads
        proposals = propose(memory, self.proposal_features, heads.classes[0], heads.boxes[0])
        index = max_topk(proposals, config.num_queries)
        chosen = proposals.take(index)
        references = jax.lax.stop_gradient(chosen.boxes)
        tokens = jnp.broadcast_to(
            self.content_embed[...], (memory.tokens.shape[0], *self.content_embed.shape)
        )
        denoising = None
        extra = 0  # denoising queries, which come first
        if people is not None and noise is not None and config.num_denoising:
            denoising = self.denoising_queries(people, noise)
            extra = denoising.tokens.shape[1]
            tokens = jnp.concatenate([denoising.tokens, tokens], 1)
            references = jnp.concatenate([jax.nn.sigmoid(denoising.box_logits), references], 1)

        def positions(layer: int, tokens: jax.Array, references: jax.Array) -> jax.Array:
            return self.position_head(box_waves(references, memory)).astype(tokens.dtype)

        decoded = self.decoder(
            tokens.astype(memory.tokens.dtype),
            positions,
            references,
            memory,
            self.heads,
            look_forward_twice=True,
            epsilon=config.sigmoid_epsilon,
            norm=self.decoder_norm,
            hidden=denoising.hidden if denoising else None,
            **how,
        )
        branches = [Branch(chosen.logits[None], chosen.boxes[None], Hungarian(), "encoder")]
        if denoising:
            noised = (decoded.logits[:, :, :extra], decoded.boxes[:, :, :extra])
            branches.append(Branch(*noised, denoising.known, "denoising"))
        details = {"proposals": proposals, "selected": index, "denoising": denoising}
        return Predictions(
            decoded.logits[:, :, extra:],
            decoded.boxes[:, :, extra:],
            details | decoded.details,
            tuple(branches) if noise is not None else (),
        )

    def denoising_queries(self, people: Targets, noise: DropoutNoise) -> Denoising:
        """Positives and negatives of everybody, about `num_denoising` of each."""
        config = self.config
        groups = num_groups(config.num_denoising, people.valid.shape[-1])
        noisy = noisy_people(
            people,
            noise,
            num_groups=groups,
            label_noise=config.label_noise / 2,
            box_noise=config.box_noise,
            move=move_corners,
            negatives=True,
        )
        size = noisy.exists.shape[1] // groups
        tokens = embed_labels(self.label_embed[...], noisy.labels)
        real = noisy.exists & ~noisy.negative  # the others say that nobody is there
        return Denoising(
            jnp.where(noisy.exists[..., None], tokens, 0),
            query_logits(noisy, epsilon=config.sigmoid_epsilon),
            jnp.asarray(hidden_queries(groups, size, config.num_queries))[None],
            Known(jnp.where(real, noisy.people, -1), groups),
        )


def num_groups(number: int, t: int) -> int:
    """How many denoising groups of `t` people, as the authors count: a `number` below 50 is that of
    positives and negatives per person instead of per image.
    """
    if t == 0:
        return 1
    return 2 * number if number < 50 else max(1, number // t)
