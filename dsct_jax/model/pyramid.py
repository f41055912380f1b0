"""What every network with multi-scale deformable attention has in common: the fields of its
configuration, and the way from an image to the tokens that its decoder reads.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.config import setting
from dsct_jax.model.attention import LayerShape
from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.encoder import Encoder, Memory
from dsct_jax.model.family import DetrFamilyConfig, TransformerConfig
from dsct_jax.model.layers import DropoutNoise, InputProjection, standard_normal
from dsct_jax.model.position import resize_mask, sine_position, valid_ratio


@dataclasses.dataclass(frozen=True)
class PyramidConfig(TransformerConfig):
    """Settings of every network that reads several levels."""

    feedforward_dim: int = setting(1024, "width inside a feed-forward block", low=1)
    num_points: int = setting(4, "p, sampling points per head and level", low=1)
    num_levels: int = setting(4, "l: C3, C4, C5 and stride-2 convolutions, from C5 on", low=3)

    @property
    def layer_shape(self) -> LayerShape:
        """The sizes of the layers of encoder and decoder."""
        return LayerShape(
            self.hidden_dim,
            self.num_heads,
            self.num_levels,
            self.num_points,
            self.feedforward_dim,
            self.dropout,
        )


# the authors' learning rates where only the backbone has one of its own
BACKBONE_SLOWER = (
    (r"backbone/(stem|layer1)/.*", 0.0),
    (r"backbone/layer[234]/.*", 0.1),
    (r"(?!backbone/).*", 1.0),
)


@dataclasses.dataclass(frozen=True)
class QueryConfig(PyramidConfig, DetrFamilyConfig):
    """Settings of the DETR family's networks that read several levels."""


class Pyramid(nnx.Module):
    """Backbone, projections to one map per level, and the deformable encoder."""

    def __init__(self, config: PyramidConfig, *, rngs: nnx.Rngs):
        d = config.hidden_dim
        self.config = config
        resnet = BACKBONES[config.backbone]
        self.backbone = ResNet(resnet, norm=config.norm, rngs=rngs)
        widths = [*resnet.channels, resnet.channels[-1], *[d] * (config.num_levels - 4)]
        self.input_proj = nnx.List(
            [
                InputProjection(widths[i], d, strided=i >= 3, rngs=rngs)
                for i in range(config.num_levels)
            ]
        )
        self.level_embed = nnx.Param(standard_normal(rngs.params(), (config.num_levels, d)))
        self.encoder = Encoder(config.layer_shape, num_layers=config.num_encoder_layers, rngs=rngs)

    detect: (
        Any  # (maps, padding_mask, *, people, noise, implementation) -> Predictions: each its own
    )

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        padding_mask: Bool[Array, "b h w"],
        *,
        people: Targets | None = None,
        noise: DropoutNoise | None = None,
        return_details: bool = False,
        implementation: str | None = None,
    ) -> Predictions:
        """Normalized images and their padding (True) -> predictions of every decoder layer.

        `noise` turns dropout on, which means training, and denoising of `people` where a network
        has it; `implementation` names one of deformable attention's. With `return_details` the
        predictions carry maps, memory, states, reference points, and of each decoder layer
        everything it looked at.
        """
        # The scopes are what a profile calls the parts.
        with jax.named_scope("backbone"):
            levels = self.features(images)
        found = self.detect(
            levels, padding_mask, people=people, noise=noise, implementation=implementation
        )
        details = found.details | {"features": levels} if return_details else None
        return dataclasses.replace(found, details=details)

    def grid_position(self, mask: Bool[Array, "b h w"]) -> Float[Array, "b h w d"]:
        """Where the tokens of one level lie."""
        return sine_position(mask, self.config.hidden_dim)

    def features(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ d"]]:
        """Normalized images -> one map per level, in the type that the model computes in."""
        images = images.astype(self.config.compute_dtype)
        return self.project(self.backbone(images, remat=self.config.remat))

    def encode(
        self,
        features: list[Float[Array, "b _ _ d"]],
        padding_mask: Bool[Array, "b h w"],
        *,
        noise: DropoutNoise | None = None,
        implementation: str | None = None,
    ) -> Memory:
        """One map per level -> what the decoder reads."""
        with jax.named_scope("encoder"):
            memory, positions = self.flatten(features, padding_mask)
            how: dict[str, Any] = {"noise": noise, "implementation": implementation}
            return self.encoder(memory, positions, remat=self.config.remat, **how)

    def project(self, features: list[jax.Array]) -> list[Float[Array, "b _ _ d"]]:
        """C3, C4, C5 -> one map of hidden size per level; the levels beyond C5 are strided
        convolutions of C5, then of each other.
        """
        levels = [project(x) for project, x in zip(self.input_proj, features, strict=False)]
        source = features[-1]
        for project in self.input_proj[len(features) :]:
            source = project(source)
            levels.append(source)
        return levels

    def flatten(
        self, features: list[Float[Array, "b _ _ d"]], padding_mask: Bool[Array, "b h w"]
    ) -> tuple[Memory, Float[Array, "b s d"]]:
        """Maps -> their tokens, and the positions of these."""
        tokens, positions, paddings, ratios = [], [], [], []
        for level, x in enumerate(features):
            b, h, w, d = x.shape
            mask = resize_mask(padding_mask, h, w)
            position = self.grid_position(mask) + self.level_embed[level].reshape(1, 1, 1, d)
            tokens.append(x.reshape(b, h * w, d))
            positions.append(position.astype(x.dtype).reshape(b, h * w, d))
            paddings.append(mask.reshape(b, h * w))
            ratios.append(valid_ratio(mask))
        shapes = tuple((x.shape[1], x.shape[2]) for x in features)
        joined, padding = jnp.concatenate(tokens, 1), jnp.concatenate(paddings, 1)
        memory = Memory(joined, padding, shapes, jnp.stack(ratios, 1))
        return memory, jnp.concatenate(positions, 1)
