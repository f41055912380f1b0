"""What all networks have in common: settings, and the way from an image to the tokens that the
decoder reads. Networks of deformable attention read several levels, the others C5 alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.config import cannot_be_used, check_settings, setting
from dsct_jax.model.attention import DeformableAttention, LayerShape, Memory, MultiHeadAttention
from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.decoder import Decoder, DeformableLayer
from dsct_jax.model.encoder import Encoder, MemoryLook, token_centers
from dsct_jax.model.heads import BoxHead, ClassHead, SharedHeads
from dsct_jax.model.layers import (
    REMAT,
    Conv,
    DropoutNoise,
    LayerNorm,
    standard_normal,
    torch_uniform,
)
from dsct_jax.model.modalities import MODALITIES, Modality, level_projections, project_levels
from dsct_jax.model.position import resize_mask, sine_position, valid_ratio
from dsct_jax.model.roi import RoIReading


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Settings of every network."""

    # how the authors train it: what differs from the defaults of the other sections
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    num_classes: int = setting(doc="k", shared=True, low=1)
    name: str = setting("", "a name of dsct_jax.model.build.NETWORKS")
    backbone: str = setting("resnet50", "a name of model.backbone.BACKBONES", choices=BACKBONES)
    norm: str = setting(
        "frozen_batch",
        "frozen_batch: statistics and scale fixed, for pretrained weights; group: trainable, for "
        "training from scratch",
        choices=("frozen_batch", "group"),
    )
    hidden_dim: int = setting(256, "d", low=1)
    num_heads: int = setting(8, "n", low=1)
    feedforward_dim: int = setting(2048, "width inside a feed-forward block", low=1)
    num_encoder_layers: int = setting(6, "0 = the decoder reads the backbone's maps", low=0)
    num_decoder_layers: int = setting(6, "each predicts, the last one is the answer", low=1)
    dropout: float = setting(0.1, "rate, in training", low=0, below=1, free=True)
    compute_dtype: str = setting(
        "float32",
        "parameters, sampling locations, softmax, fusion, heads and losses are float32 in any case",
        choices=("float32", "bfloat16"),
        free=True,
    )
    remat: str = setting(
        "light",
        "what training computes twice to save memory. none; light: in encoder and decoder all but "
        "matrix products, sampled attention and dropout's bits; layers: the matrix products too; "
        "all: residual blocks too. docs/training_step.md has what each saves and costs",
        choices=REMAT,
        free=True,
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")
        if self.hidden_dim % self.num_heads or self.hidden_dim % 32:
            wanted = f"divisible by config.model.num_heads ({self.num_heads}) and by 32"
            raise cannot_be_used("model.hidden_dim", self.hidden_dim, wanted)

    @property
    def layer_shape(self) -> LayerShape:
        """The sizes of the layers of encoder and decoder."""
        samples = getattr(self, "num_levels", 1), getattr(self, "num_points", 1)
        shape = LayerShape(self.hidden_dim, self.num_heads, *samples, self.feedforward_dim, 0.0)
        return shape._replace(dropout=self.dropout)


@dataclasses.dataclass(frozen=True)
class DetrFamilyConfig(TransformerConfig):
    """Settings of the DETR family; the defaults are those of the authors of each."""

    num_queries: int = setting(300, "how many people it can find", low=1)
    sigmoid_epsilon: float = setting(
        1e-5, "references are kept this far from 0 and 1 (detrex: 1e-3)", above=0, below=0.5
    )
    subject_logit: bool = setting(
        False,
        'True: "a subject" has a logit of its own; False, as published: it is the highest logit of '
        "the classes",
    )


@dataclasses.dataclass(frozen=True)
class C5Config(DetrFamilyConfig):
    """Settings of the networks that read C5 alone."""

    dilation: bool = setting(False, "True: C5 has stride 16 instead of 32 (DC5)")


@dataclasses.dataclass(frozen=True)
class PyramidConfig(TransformerConfig):
    """Settings of the networks that read several levels."""

    feedforward_dim: int = setting(1024, "width inside a feed-forward block", low=1)
    num_points: int = setting(4, "p, sampling points per head and level", low=1)
    num_levels: int = setting(4, "l: C3, C4, C5 and stride-2 convolutions, from C5 on", low=3)
    roi_size: int = setting(
        0,
        "cells per side of a box that the last decoder layer reads one by one from C2 (RoIAlign); "
        "0 = off. Ours, for faces from few photographs",
        low=0,
    )
    modalities: tuple[str, ...] = setting(
        (), "frozen networks beside the backbone (Table 13)", choices=MODALITIES
    )
    modality_weights: tuple[str, ...] = setting(
        (), "the published file of each modality; random = none, for tests", free=True
    )
    modality_fusion: str = setting(
        "sum",
        "sum: each level has a projection of its own, added to the backbone's; concat: one "
        "projection of the channels of all",
        choices=("sum", "concat"),
    )
    modality_scale: float = setting(
        1.0, "of the added projections' norms at the start; 0 = as without modalities", low=0
    )
    modality_backbone: str = setting("resnet50", "of each modality", choices=BACKBONES)
    modality_pyramid: bool = setting(True, "instance: its feature pyramid; False: C3, C4, C5")
    modality_dtype: str = setting(
        "float32", "what they compute in", choices=("float32", "bfloat16"), free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.roi_size and not getattr(self, "box_refinement", True):
            wanted = "0 unless config.model.box_refinement=True: points have no cells"
            raise cannot_be_used("model.roi_size", self.roi_size, wanted)


@dataclasses.dataclass(frozen=True)
class QueryConfig(PyramidConfig, DetrFamilyConfig):
    """Settings of the DETR family's networks that read several levels."""


# the authors' learning rates where only the backbone has one of its own
BACKBONE_SLOWER = (
    (r"backbone/(stem|layer1)/.*", 0.0),
    (r"backbone/layer[234]/.*", 0.1),
    (r"(?!backbone/).*", 1.0),
)


class SetNetwork(nnx.Module):
    """A network whose queries find people; `decode` is what each has of its own."""

    config: Any
    encoder: Encoder
    level_embed: Any = None
    project: Any  # (C3, C4, C5) -> maps, one per level
    look: Any  # (memory) -> MemoryLook
    # (memory, people, noise) -> Predictions, in training with `noise`; it may denoise the people
    decode: Any
    decoder: Decoder
    decoder_norm: LayerNorm | None = None
    class_head: Any
    box_head: Any

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.config, resnet = config, BACKBONES[config.backbone]
        dilated = getattr(config, "dilation", False)
        finest = 2 if getattr(config, "roi_size", 0) else 3
        how = {"norm": config.norm, "dilated": dilated, "finest": finest}
        self.backbone = ResNet(resnet, **how, rngs=rngs)

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
            maps = self.features(images)
        found = self.detect(
            maps, padding_mask, people=people, noise=noise, implementation=implementation
        )
        levels = maps[-getattr(self.config, "num_levels", 1) :]  # without what is read beside them
        details = found.details | {"features": levels} if return_details else None
        return dataclasses.replace(found, details=details)

    def features(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ d"]]:
        """Normalized images -> one map per level, in the type that the model computes in."""
        images = images.astype(self.config.compute_dtype)
        return self.project(self.backbone(images, remat=self.config.remat))

    def detect(
        self,
        maps: list[Float[Array, "b _ _ d"]],
        padding_mask: Bool[Array, "b h w"],
        *,
        people: Targets | None = None,
        noise: DropoutNoise | None = None,
        implementation: str | None = None,
    ) -> Predictions:
        """One map per level -> predictions with all details."""
        memory = self.encode(maps, padding_mask, noise=noise, implementation=implementation)
        return self.decode(memory, people, noise)

    def encode(
        self,
        maps: list[Float[Array, "b _ _ d"]],
        padding_mask: Bool[Array, "b h w"],
        *,
        noise: DropoutNoise | None = None,
        implementation: str | None = None,
    ) -> Memory:
        """One map per level -> what the decoder reads."""
        with jax.named_scope("encoder"):
            memory = self.flatten(maps, padding_mask, implementation)
            return self.encoder(memory, self.look(memory), remat=self.config.remat, noise=noise)

    def flatten(
        self,
        maps: list[Float[Array, "b _ _ d"]],
        padding_mask: Bool[Array, "b h w"],
        implementation: str | None = None,
    ) -> Memory:
        """The tokens of the maps, and where they are."""
        tokens, positions, paddings, ratios = [], [], [], []
        for level, x in enumerate(maps):
            b, h, w, d = x.shape
            mask = resize_mask(padding_mask, h, w)
            position = self.grid_position(mask)
            if self.level_embed is not None:
                position = position + self.level_embed[level].reshape(1, 1, 1, d)
            tokens.append(x.reshape(b, h * w, d))
            positions.append(position.astype(x.dtype).reshape(b, h * w, -1))
            paddings.append(mask.reshape(b, h * w))
            ratios.append(valid_ratio(mask))
        shapes = tuple((x.shape[1], x.shape[2]) for x in maps)
        return Memory(
            jnp.concatenate(tokens, 1),
            jnp.concatenate(positions, 1),
            jnp.concatenate(paddings, 1),
            jnp.stack(ratios, 1),
            shapes,
            implementation,
        )

    def grid_position(self, mask: Bool[Array, "b h w"]) -> Float[Array, "b h w e"]:
        """Where the tokens of one level lie."""
        return sine_position(mask, self.config.hidden_dim)

    def run(self, *queries: Any, **how: Any) -> Predictions:
        """The decoder's predictions: `queries` and `how` as it takes them."""
        config = self.config
        heads = getattr(self, "heads", None)
        return self.decoder(
            *queries,
            heads=heads or SharedHeads([self.class_head], [self.box_head]),
            norm=self.decoder_norm,
            epsilon=getattr(config, "sigmoid_epsilon", 1e-5),
            remat=config.remat,
            **how,
        )


class C5Network(SetNetwork):
    """A network that reads C5 alone; one head answers for the queries of all decoder layers."""

    def __init__(
        self, config: C5Config, *, attention: Any = MultiHeadAttention, rngs: nnx.Rngs, **how: bool
    ):
        """`how`: of the feed-forward blocks."""
        super().__init__(config, rngs=rngs)
        d, self.channels = config.hidden_dim, BACKBONES[config.backbone].channels[-1]
        start = torch_uniform(self.channels)
        self.input_proj: Any = Conv(
            *(self.channels, d, 1), use_bias=True, kernel_init=start, bias_init=start, rngs=rngs
        )
        self.encoder = Encoder(
            *(config.layer_shape, attention), num_layers=config.num_encoder_layers, rngs=rngs, **how
        )
        self.class_head: Any = ClassHead(
            d, config.num_classes, subject=config.subject_logit, rngs=rngs
        )
        self.box_head = BoxHead(d, initial_size=0.0, rngs=rngs)

    def project(self, features: Sequence[jax.Array]) -> list[Float[Array, "b _ _ d"]]:
        """C5 -> the one map."""
        return [self.input_proj(features[-1])]

    def grid_position(self, mask: Bool[Array, "b h w"]) -> Float[Array, "b h w e"]:
        """Where the tokens lie, as DETR says it."""
        temperature = getattr(self.config, "temperature", 10000.0)
        return sine_position(mask, self.config.hidden_dim, temperature=temperature, offset=0.0)

    def look(self, memory: Memory) -> MemoryLook:
        """All tokens but padding."""
        return lambda memory: (memory.positions, memory.padding[:, None])


class Pyramid(SetNetwork):
    """A network of deformable attention over several levels."""

    def __init__(self, config: PyramidConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, levels = config.hidden_dim, config.num_levels
        channels = BACKBONES[config.backbone].channels
        kind, pyramid = config.modality_backbone, config.modality_pyramid
        self.modalities = nnx.Dict(
            {name: Modality(name, kind, pyramid=pyramid, rngs=rngs) for name in config.modalities}
        )
        if self.modalities and config.modality_fusion == "concat":
            beside = zip(
                channels, *(one.channels for one in self.modalities.values()), strict=False
            )
            channels = tuple(sum(level) for level in beside)
        self.input_proj = level_projections(channels, d, levels, rngs=rngs)
        self.level_embed = nnx.Param(standard_normal(rngs.params(), (levels, d)))
        layer = (config.layer_shape, DeformableAttention)
        self.encoder = Encoder(*layer, num_layers=config.num_encoder_layers, rngs=rngs)
        if self.modalities and config.modality_fusion == "sum":
            scale = config.modality_scale
            self.modality_proj = nnx.Dict(
                {
                    name: level_projections(one.channels, d, levels, scale=scale, rngs=rngs)
                    for name, one in self.modalities.items()
                }
            )

    def project(self, features: Sequence[jax.Array]) -> list[Float[Array, "b _ _ d"]]:
        """C3, C4, C5 -> one map of hidden size per level; the levels beyond C5 are strided
        convolutions of C5, then of each other.
        """
        return project_levels(self.input_proj, features)

    def features(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ d"]]:
        """Normalized images -> one map per level, with what the modalities add to it."""
        config = self.config
        images = images.astype(config.compute_dtype)
        maps = self.backbone(images, remat=config.remat)
        fine = [maps.pop(0)] if config.roi_size else []
        more = {
            name: [x.astype(images.dtype) for x in one(images.astype(config.modality_dtype))]
            for name, one in self.modalities.items()
        }
        if config.modality_fusion == "concat":
            maps = [jnp.concatenate(x, -1) for x in zip(maps, *more.values(), strict=False)]
        levels = self.project(maps)
        if config.modality_fusion == "sum":
            for name, seen in more.items():
                added = project_levels(self.modality_proj[name], seen)
                levels = [x + y for x, y in zip(levels, added, strict=True)]
        return [*fine, *levels]

    def encode(self, maps: list[Float[Array, "b _ _ _"]], *mask: Any, **how: Any) -> Memory:
        """One map per level, and C2 before them where it is read -> what the decoder reads."""
        fine, levels = (maps[0], maps[1:]) if self.config.roi_size else (None, maps)
        return dataclasses.replace(super().encode(levels, *mask, **how), fine=fine)

    def decoder_layer(self, number: int, *, rngs: nnx.Rngs, **fusion: Any) -> DeformableLayer:
        """Number `number` of the decoder; `fusion` as DeformableLayer takes it."""
        config, reading = self.config, None
        if config.roi_size and number == config.num_decoder_layers - 1:
            channels = BACKBONES[config.backbone].channels[0] // 2  # of C2
            sizes = channels, config.roi_size, config.hidden_dim
            reading = RoIReading(*sizes, dropout_rate=config.dropout, rngs=rngs)
        return DeformableLayer(config.layer_shape, **fusion, reading=reading, rngs=rngs)

    def look(self, memory: Memory) -> MemoryLook:
        """All levels, around each token's own place."""
        ratios = memory.valid_ratios
        points = token_centers(memory.spatial_shapes, ratios)[:, :, None] * ratios[:, None]
        return lambda memory: (memory.positions, points, memory)


def for_images(rows: Float[Array, "q r"], b: Any) -> Float[Array, "b q r"]:
    """The same rows for each of `b` images: an int, or a symbolic size (jax.export)."""
    return jnp.broadcast_to(rows, (b, *rows.shape))
