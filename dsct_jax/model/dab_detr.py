"""DAB-DETR (Liu et al. 2022): queries are boxes, which every layer reads and refines; and DN-DETR
(Li et al. 2022), which adds denoising.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.config import setting
from dsct_jax.model.attention import Memory
from dsct_jax.model.conditional_detr import conditional_decoder
from dsct_jax.model.denoising import Queries, denoising_queries, move_center_and_size, split_known
from dsct_jax.model.encoder import MemoryLook
from dsct_jax.model.family import C5Config, C5Network, for_images
from dsct_jax.model.layers import MLP, DropoutNoise, LayerNorm, standard_normal
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


class DabDETR(C5Network):
    """A query looks at its box: the waves of its centre, scaled by its width and height."""

    def __init__(self, config: DabDetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config, leaky=True, rngs=rngs)
        self.decoder_norm = LayerNorm(config.hidden_dim, rngs=rngs)
        d, k = config.hidden_dim, config.num_classes
        self.position_scale = MLP(d, d, d, rngs=rngs)
        self.anchors = nnx.Param(standard_normal(rngs.params(), (config.num_queries, 4)))
        if config.denoising_groups:  # the last row is "no label yet", the last number "denoising"
            self.label_embed = nnx.Param(standard_normal(rngs.params(), (k + 1, d - 1)))
        self.box_positions = MLP(2 * d, d, d, rngs=rngs)
        self.query_scale = MLP(d, d, d, rngs=rngs)
        self.size_scale = MLP(d, d, 2, rngs=rngs)
        self.decoder = conditional_decoder(config, leaky=True, rngs=rngs)

    def look(self, memory: Memory) -> MemoryLook:
        """All tokens but padding; where they are is scaled by what they hold."""
        return lambda memory: (
            memory.positions * self.position_scale(memory.tokens),
            memory.padding[:, None],
        )

    def decode(self, memory: Memory, people: Any, noise: Any) -> Predictions:
        """Memory -> predictions; with `noise` the `people` are denoised."""
        queries = self.queries(memory.tokens.shape[0], people, noise)

        def look(layer: int, tokens: jax.Array, boxes: jax.Array) -> tuple[tuple, tuple]:
            positions, waves = self.look_at(boxes, tokens, first=layer == 0)
            cross = (positions, memory.padding[:, None], waves, memory)
            return (positions, queries.hidden), cross

        how = {"refines": True, "look_forward_twice": True}
        boxes = jax.nn.sigmoid(queries.box_logits)
        found = self.run(queries.tokens, boxes, memory, look, noise, **how)
        return split_known(found, queries.known)

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

    def queries(self, b: Any, people: Targets | None, noise: DropoutNoise | None) -> Queries:
        """Those of `b` images: an int, or a symbolic size (jax.export)."""
        config, anchors = self.config, for_images(self.anchors[...], b)
        content = jnp.zeros(config.hidden_dim)
        if config.denoising_groups:
            content = jnp.pad(self.label_embed[-1], (0, 1))
        tokens = jnp.broadcast_to(content, (*anchors.shape[:-1], config.hidden_dim))
        groups = config.denoising_groups
        if not (groups and people is not None and noise is not None and people.valid.shape[1]):
            return Queries(tokens, anchors)
        made = denoising_queries(
            people,
            noise,
            jnp.pad(self.label_embed[...], ((0, 0), (0, 1)), constant_values=1),
            num_groups=groups,
            num_queries=config.num_queries,
            epsilon=config.sigmoid_epsilon,
            label_noise=config.label_noise,
            box_noise=config.box_noise,
            move=move_center_and_size,
        )
        tokens = jnp.concatenate([made.tokens, tokens], 1)
        anchors = jnp.concatenate([made.box_logits, anchors], 1)
        return Queries(tokens, anchors, made.hidden, made.known)
