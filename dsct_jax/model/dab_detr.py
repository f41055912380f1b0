"""DAB-DETR (Liu et al. 2022): queries are boxes, which every layer reads and refines; and DN-DETR
(Li et al. 2022), which adds denoising.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Branch, Known, Predictions, Targets
from dsct_jax.config import setting
from dsct_jax.model.conditional_detr import ConditionalDecoderLayer
from dsct_jax.model.denoising import (
    embed_labels,
    hidden_queries,
    move_center_and_size,
    noisy_people,
    query_logits,
)
from dsct_jax.model.encoder import PlainEncoder
from dsct_jax.model.family import C5Config, C5Network, for_images, plain_shape
from dsct_jax.model.heads import BoxHead, ClassHead, refine
from dsct_jax.model.layers import MLP, DropoutNoise, LayerNorm, rematerialized, standard_normal
from dsct_jax.model.position import YXWH, sine_of


@dataclasses.dataclass(frozen=True)
class DabDetrConfig(C5Config):
    """The model section. DN-DETR is `denoising_groups=5`."""

    published: ClassVar = {
        "loss": {"weight_class": 1.0, "giou_epsilon": 1e-6},
        "optimizer": {"learning_rate": 1e-4},
    }

    name: str = setting("dab_detr", "DAB-DETR, DN-DETR", choices=("dab_detr",))
    dropout: float = setting(0.0, "rate, in training", low=0, below=1, free=True)
    sigmoid_epsilon: float = setting(
        1e-3, "references are kept this far from 0 and 1", above=0, below=0.5
    )
    temperature: float = setting(20.0, "of the sine embedding of maps", above=0)
    denoising_groups: int = setting(0, "noisy copies of everybody in training; 0 = off", low=0)
    label_noise: float = setting(0.2, "share of the copies with other labels", low=0, high=1)
    box_noise: float = setting(0.4, "by how much of its size a copy's box is moved", low=0)


class _Queries(NamedTuple):
    """The denoising queries, which `branch` answers for, then those that have to find somebody."""

    tokens: Float[Array, "b q d"]
    box_logits: Float[Array, "b q 4"]
    hidden: Bool[Array, "1 q q"] | None = None
    denoising: Known | None = None


class DabDETR(C5Network):
    """A query looks at its box: the waves of its centre, scaled by its width and height."""

    def __init__(self, config: DabDetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        shape, d = plain_shape(config), config.hidden_dim
        self.encoder = PlainEncoder(
            shape, num_layers=config.num_encoder_layers, leaky=True, rngs=rngs
        )
        self.position_scale = MLP(d, d, d, rngs=rngs)
        self.anchors = nnx.Param(standard_normal(rngs.params(), (config.num_queries, 4)))
        if config.denoising_groups:  # the last row is "no label yet", the last number "denoising"
            self.label_embed = nnx.Param(
                standard_normal(rngs.params(), (config.num_classes + 1, d - 1))
            )
        self.box_positions = MLP(2 * d, d, d, rngs=rngs)
        self.query_scale = MLP(d, d, d, rngs=rngs)
        self.size_scale = MLP(d, d, 2, rngs=rngs)
        self.decoder = nnx.List(
            [
                ConditionalDecoderLayer(shape, first=i == 0, leaky=True, rngs=rngs)
                for i in range(config.num_decoder_layers)
            ]
        )
        self.decoder_norm = LayerNorm(d, rngs=rngs)
        self.class_head = ClassHead(d, config.num_classes, subject=config.subject_logit, rngs=rngs)
        self.box_head = BoxHead(d, initial_size=0.0, rngs=rngs)

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
        with jax.named_scope("encoder"):
            memory = self.encode(
                features,
                padding_mask,
                noise=noise,
                temperature=self.config.temperature,
                position_scale=self.position_scale,
            )
        queries = self.queries(features.shape[0], people, noise)
        move = partial(refine, epsilon=self.config.sigmoid_epsilon)
        tokens = queries.tokens.astype(features.dtype)
        references = [jax.nn.sigmoid(queries.box_logits)]
        states: list[jax.Array] = []
        boxes: list[jax.Array] = []
        for layer in self.decoder:
            run = rematerialized(partial(layer, noise=noise), self.config.remat)
            # A layer's box learns from the next prediction too, but not through the next layer.
            start = jax.lax.stop_gradient(references[-1]) if states else references[-1]
            with jax.named_scope("decoder"):
                positions, waves = self.look_at(start, tokens, first=not states)
                tokens = run(tokens, positions, waves, memory, queries.hidden)
            with jax.named_scope("heads"):
                exact = tokens.astype(jnp.float32)
                boxes.append(move(self.box_head.deltas(self.decoder_norm(exact)), references[-1]))
                references.append(move(self.box_head.deltas(exact), start))
            states.append(tokens)
        with jax.named_scope("heads"):
            logits = self.class_head(self.decoder_norm(jnp.stack(states)).astype(jnp.float32))
        details = {
            "memory": memory.tokens,
            "states": jnp.stack(states),
            "reference_points": jnp.stack(references[:-1]),
        }
        n, answers = tokens.shape[1] - self.config.num_queries, (logits, jnp.stack(boxes))
        known, found = ([x[:, :, part] for x in answers] for part in (slice(n), slice(n, None)))
        branches: tuple[Branch, ...] = ()
        if queries.denoising is not None:
            branches = (Branch(known[0], known[1], queries.denoising, name="denoising"),)
        return Predictions(found[0], found[1], details if return_details else None, branches)

    def look_at(
        self, boxes: Float[Array, "b q 4"], tokens: Float[Array, "b q d"], *, first: bool
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b q d"]]:
        """Positions of the queries, and the waves by which they look: a query that expects a person
        wider than its box looks more closely along x.
        """
        d = tokens.shape[-1]
        waves = sine_of(boxes, d // 2, order=YXWH).astype(tokens.dtype)
        expected = jax.nn.sigmoid(self.size_scale(tokens))
        width, height = jnp.split(expected / boxes[..., 2:].astype(tokens.dtype), 2, -1)
        scale = 1 if first else self.query_scale(tokens)
        sides = jnp.concatenate(
            [jnp.broadcast_to(x, (*x.shape[:-1], d // 2)) for x in (height, width)], -1
        )
        return self.box_positions(waves), waves[..., :d] * scale * sides

    def queries(self, b: Any, people: Targets | None, noise: DropoutNoise | None) -> _Queries:
        """Those of `b` images: an int, or a symbolic size (jax.export)."""
        config, anchors = self.config, for_images(self.anchors[...], b)
        if not config.denoising_groups:
            return _Queries(jnp.zeros((*anchors.shape[:-1], config.hidden_dim)), anchors)
        embeddings = self.label_embed[...]
        content = for_images(jnp.pad(embeddings[-1:], ((0, 0), (0, 1))), b)
        tokens = jnp.broadcast_to(content, (*anchors.shape[:-1], config.hidden_dim))
        if people is None or noise is None or not people.valid.shape[1]:
            return _Queries(tokens, anchors)
        groups = config.denoising_groups
        noisy = noisy_people(
            people,
            noise,
            num_groups=groups,
            label_noise=config.label_noise,
            box_noise=config.box_noise,
            move=move_center_and_size,
        )
        labels = jnp.pad(
            embed_labels(embeddings, noisy.labels), ((0, 0),) * 2 + ((0, 1),), constant_values=1
        )
        labels = jnp.where(noisy.exists[..., None], labels, 0)
        box_logits = query_logits(noisy, epsilon=config.sigmoid_epsilon)
        hidden = hidden_queries(groups, people.valid.shape[1], config.num_queries)
        return _Queries(
            jnp.concatenate([labels, tokens], 1),
            jnp.concatenate([box_logits, anchors], 1),
            jnp.asarray(hidden)[None],
            Known(noisy.people, repeats=groups),
        )
