"""DSCT: one network from a image to the boxes and emotions of its people (paper Fig. 3)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.errors import UserError
from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.decoder import DecoderLayer, FusionConfig
from dsct_jax.model.encoder import EncoderLayer, encoder_reference_points
from dsct_jax.model.heads import BoxHead, class_head
from dsct_jax.model.layers import (
    REMAT,
    Conv,
    DropoutNoise,
    GroupNorm,
    linear,
    rematerialized,
    standard_normal,
    xavier_uniform,
)
from dsct_jax.model.position import resize_mask, sine_position, valid_ratio


@dataclasses.dataclass(frozen=True)
class DSCTConfig:
    """The model section of a configuration, and the number of classes; configs/base.py explains
    each field and its source.
    """

    num_classes: int
    backbone: str = "resnet50"
    norm: str = "frozen_batch"
    hidden_dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    num_levels: int = 4
    feedforward_dim: int = 1024
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dropout: float = 0.1
    num_subject_queries: int = 4
    num_context_queries: int = 300
    num_spatial_neighbors: int = 100
    num_semantic_neighbors: int = 50
    fusion: str = "paper"
    semantic_selection: str = "smallest"
    reweighting: str = "semantic"
    fusion_layers: tuple[int, ...] = ()
    box_refinement: bool = False
    compute_dtype: str = "float32"
    remat: str = "light"

    def __post_init__(self):
        choices = {
            "backbone": tuple(BACKBONES),
            "norm": ("frozen_batch", "group"),
            "fusion": ("paper", "released"),
            "semantic_selection": ("smallest", "largest"),
            "reweighting": ("semantic", "equal", "spatial", "attentive"),
            "compute_dtype": ("float32", "bfloat16"),
            "remat": REMAT,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"model.{field}: {getattr(self, field)!r} is none of {', '.join(allowed)}"
                )
        if self.hidden_dim % self.num_heads or self.hidden_dim % 4:
            raise UserError(
                f"model.hidden_dim: {self.hidden_dim} must divide by model.num_heads "
                f"({self.num_heads}) and by 4"
            )
        if self.num_levels < 3:
            raise UserError(
                f"model.num_levels: {self.num_levels}, but C3, C4 and C5 already make 3"
            )
        for field in ("num_spatial_neighbors", "num_semantic_neighbors"):
            if (
                self.num_context_queries
                and not 0 <= getattr(self, field) <= self.num_context_queries
            ):
                raise UserError(
                    f"model.{field}: {getattr(self, field)} is more than "
                    f"model.num_context_queries ({self.num_context_queries})"
                )
        if not set(self.fusion_layers) <= set(range(self.num_decoder_layers)):
            raise UserError(
                f"model.fusion_layers: {self.fusion_layers} names a layer outside 0 to "
                f"{self.num_decoder_layers - 1}"
            )

    def fusion_of_layer(self, layer: int) -> FusionConfig | None:
        """How decoder layer `layer` fuses, None where it does not."""
        chosen = not self.fusion_layers or layer in self.fusion_layers
        neighbors = self.num_spatial_neighbors + self.num_semantic_neighbors
        if not (chosen and neighbors and self.num_context_queries):
            return None
        return FusionConfig(
            self.fusion,
            self.semantic_selection,
            self.num_spatial_neighbors,
            self.num_semantic_neighbors,
            self.reweighting,
        )


class InputProjection(nnx.Module):
    """Convolution to the hidden size and group normalisation over 32 groups: 1x1 for C3 to C5, 3x3
    with stride 2 for further levels.
    """

    def __init__(self, d_in: int, d: int, *, size: int, stride: int, rngs: nnx.Rngs):
        self.conv = Conv(
            d_in, d, size, stride=stride, use_bias=True, kernel_init=xavier_uniform, rngs=rngs
        )
        self.norm = GroupNorm(d, num_groups=32)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return self.norm(self.conv(x))


class DSCT(nnx.Module):
    """Decoupled Subject-Context Transformer."""

    def __init__(self, config: DSCTConfig, *, rngs: nnx.Rngs):
        d = config.hidden_dim
        self.config = config
        resnet = BACKBONES[config.backbone]
        self.backbone = ResNet(resnet, norm=config.norm, rngs=rngs)
        widths = list(resnet.channels) + [resnet.channels[-1]] + [d] * (config.num_levels - 4)
        shapes = [(1, 1)] * 3 + [(3, 2)] * (config.num_levels - 3)
        self.input_proj = nnx.List(
            [
                InputProjection(c, d, size=k, stride=s, rngs=rngs)
                for c, (k, s) in zip(widths, shapes, strict=False)
            ]
        )
        self.level_embed = nnx.Param(standard_normal(rngs.params(), (config.num_levels, d)))
        common: dict[str, Any] = {
            "num_heads": config.num_heads,
            "num_levels": config.num_levels,
            "num_points": config.num_points,
            "feedforward_dim": config.feedforward_dim,
            "dropout_rate": config.dropout,
            "rngs": rngs,
        }
        self.encoder = nnx.List(
            [EncoderLayer(d, **common) for _ in range(config.num_encoder_layers)]
        )
        if config.num_context_queries:  # no array without elements: checkpoints cannot hold one
            self.context_queries = nnx.Param(
                standard_normal(rngs.params(), (config.num_context_queries, 2 * d))
            )
        self.subject_queries = nnx.Param(
            standard_normal(rngs.params(), (config.num_subject_queries, 2 * d))
        )
        self.reference_points = linear(d, 2, rngs=rngs)
        self.decoder = nnx.List(
            [
                DecoderLayer(
                    d,
                    num_context=config.num_context_queries,
                    fusion=config.fusion_of_layer(i),
                    **common,
                )
                for i in range(config.num_decoder_layers)
            ]
        )
        self.class_head = class_head(d, config.num_classes + 1, rngs=rngs)
        self.box_head = BoxHead(d, refines=config.box_refinement, rngs=rngs)

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
        """Normalised images and their padding (True) -> predictions of every decoder layer.

        `noise` turns dropout on, which means training; `people` are for networks that learn to
        denoise them, and not read here; `implementation` names one of deformable
        attention's. With `return_details` the predictions carry reference points, memory and,
        stacked over decoder layers, everything the layers looked at.
        """
        del people
        remat = "none" if return_details else self.config.remat
        # The scopes are what a profile calls the parts.
        with jax.named_scope("backbone"):
            features = self.features(images, remat=remat)
        with jax.named_scope("encoder"):
            memory, padding, spatial_shapes, ratios = self.encode(
                features, padding_mask, noise=noise, implementation=implementation, remat=remat
            )
        tokens, query_positions, reference_points = self.queries(images.shape[0])
        references = self.box_head.references(reference_points, self.config.num_context_queries)
        states, predicted, details = [], [], []
        for decoder_layer in self.decoder:
            layer_references = (
                references[:, :, None] * jnp.tile(ratios, references.shape[-1] // 2)[:, None]
            )
            points, *sizes = jnp.split(layer_references, references.shape[-1] // 2, -1)
            run = partial(
                decoder_layer,
                spatial_shapes=spatial_shapes,
                noise=noise,
                implementation=implementation,
            )
            with jax.named_scope("decoder"):
                tokens, seen = rematerialized(run, remat)(
                    tokens,
                    query_positions,
                    points,
                    memory,
                    padding,
                    boxes=sizes[0] if sizes else None,
                )
            context, subject = jnp.split(references, [self.config.num_context_queries], 1)
            with jax.named_scope("heads"):
                predicted.append(
                    self.box_head(
                        tokens[:, self.config.num_context_queries :].astype(jnp.float32), subject
                    )
                )
            if self.config.box_refinement:
                references = jnp.concatenate([context, jax.lax.stop_gradient(predicted[-1])], 1)
            states.append(tokens)
            details.append(seen)
        subjects = jnp.stack(states)[:, :, self.config.num_context_queries :].astype(jnp.float32)
        with jax.named_scope("heads"):
            logits, boxes = self.class_head(subjects), jnp.stack(predicted)
        if not return_details:
            return Predictions(logits, boxes)
        shared = {
            "reference_points": reference_points,
            "valid_ratios": ratios,
            "memory": memory,
            "features": features,
            "states": jnp.stack(states),
        }
        return Predictions(logits, boxes, {**shared, "layers": details})

    def features(self, images: Float[Array, "b h w 3"], *, remat: str = "none") -> list[jax.Array]:
        """Normalised images -> one map [b h w d] of each level, in the type that the model computes
        in.
        """
        return self.project(self.backbone(images.astype(self.config.compute_dtype), remat=remat))

    def encode(
        self,
        features: list[jax.Array],
        padding_mask: Bool[Array, "b h w"],
        *,
        noise: DropoutNoise | None = None,
        implementation: str | None = None,
        remat: str = "none",
    ):
        """Maps -> memory [b s d] and its padding [b s], the static level shapes and the valid
        ratios [b l 2].
        """
        memory, positions, padding, spatial_shapes, ratios = self.flatten(features, padding_mask)
        points = encoder_reference_points(spatial_shapes, ratios)
        for layer in self.encoder:
            run = partial(
                layer, spatial_shapes=spatial_shapes, noise=noise, implementation=implementation
            )
            memory = rematerialized(run, remat)(memory, positions, points, padding)
        return memory, padding, spatial_shapes, ratios

    def project(self, features: list[jax.Array]) -> list[jax.Array]:
        """C3, C4, C5 -> one map of hidden size a level; the levels beyond C5 are strided
        convolutions of C5, then of each other.
        """
        levels = [project(x) for project, x in zip(self.input_proj, features, strict=False)]
        source = features[-1]
        for project in self.input_proj[len(features) :]:
            source = project(source)
            levels.append(source)
        return levels

    def flatten(self, features: list[jax.Array], padding_mask: Bool[Array, "b h w"]):
        """Maps -> tokens [b s d], their positions [b s d] and padding [b s], the static level
        shapes and the valid ratios [b l 2].
        """
        tokens, positions, paddings, ratios = [], [], [], []
        for level, x in enumerate(features):
            b, h, w, d = x.shape
            mask = resize_mask(padding_mask, h, w)
            position = (
                sine_position(mask, d) + self.level_embed[level].reshape(1, 1, 1, d)
            ).astype(x.dtype)
            tokens.append(x.reshape(b, h * w, d))
            positions.append(position.reshape(b, h * w, d))
            paddings.append(mask.reshape(b, h * w))
            ratios.append(valid_ratio(mask))
        shapes = tuple((x.shape[1], x.shape[2]) for x in features)
        return (
            jnp.concatenate(tokens, 1),
            jnp.concatenate(positions, 1),
            jnp.concatenate(paddings, 1),
            shapes,
            jnp.stack(ratios, 1),
        )

    def queries(self, b: Any):
        """Context queries, then subject queries: tokens [b q d], positions [b q d] and reference
        points [b q 2] in [0, 1] of the image.

        `b` is an int, or a symbolic size under jax.export.
        """
        context = [self.context_queries[...]] if self.config.num_context_queries else []
        embedding = jnp.concatenate([*context, self.subject_queries[...]])
        positions, tokens = jnp.split(jnp.broadcast_to(embedding, (b, *embedding.shape)), 2, -1)
        dtype = self.config.compute_dtype
        return (
            tokens.astype(dtype),
            positions.astype(dtype),
            jax.nn.sigmoid(self.reference_points(positions)),
        )
