"""What the networks have in common: settings, and the way from an image to the encoded C5."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.config import cannot_be_used, check_settings, setting
from dsct_jax.model.attention import LayerShape
from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.layers import REMAT, Conv, DropoutNoise, torch_uniform
from dsct_jax.model.position import resize_mask, sine_position


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


class PlainMemory(NamedTuple):
    """What an image is to the decoder: the tokens of one level, and where they are."""

    tokens: Float[Array, "b s d"]
    positions: Float[Array, "b s d"]
    padding: Bool[Array, "b s"]


class C5Network(nnx.Module):
    """A network that reads C5 alone; `detect` is what each has of its own."""

    detect: Any  # (C5, padding_mask, *, people, noise, return_details) -> Predictions
    config: Any
    input_proj: Any
    encoder: Any

    def __init__(self, config: C5Config, *, rngs: nnx.Rngs):
        self.config = config
        resnet = BACKBONES[config.backbone]
        self.backbone = ResNet(resnet, norm=config.norm, dilated=config.dilation, rngs=rngs)
        start = torch_uniform(resnet.channels[-1])
        self.input_proj = Conv(
            *(resnet.channels[-1], config.hidden_dim, 1),
            use_bias=True,
            kernel_init=start,
            bias_init=start,
            rngs=rngs,
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
        has it. `implementation` is not read. With `return_details` the predictions carry memory,
        states and reference points.
        """
        del implementation
        with jax.named_scope("backbone"):
            images = images.astype(self.config.compute_dtype)
            features = self.backbone(images, remat=self.config.remat)[-1]
        return self.detect(
            features, padding_mask, people=people, noise=noise, return_details=return_details
        )

    def encode(
        self,
        features: Float[Array, "b h w c"],
        padding_mask: Bool[Array, "b h2 w2"],
        *,
        noise: DropoutNoise | None,
        temperature: float = 10000.0,
        position_scale: Any = None,
    ) -> PlainMemory:
        """C5 -> what the decoder reads."""
        x = self.input_proj(features)
        b, h, w, d = x.shape
        mask = resize_mask(padding_mask, h, w)
        positions = sine_position(mask, d, temperature=temperature, offset=0.0)
        positions, padding = positions.astype(x.dtype).reshape(b, -1, d), mask.reshape(b, -1)
        tokens = self.encoder(
            x.reshape(b, -1, d),
            positions,
            padding,
            position_scale=position_scale,
            noise=noise,
            remat=self.config.remat,
        )
        return PlainMemory(tokens, positions, padding)


def plain_shape(config: C5Config) -> LayerShape:
    """The sizes of layers without deformable attention."""
    return LayerShape(
        d=config.hidden_dim,
        num_heads=config.num_heads,
        num_levels=1,
        num_points=1,
        feedforward_dim=config.feedforward_dim,
        dropout=config.dropout,
    )


def for_images(rows: Float[Array, "q r"], b: Any) -> Float[Array, "b q r"]:
    """The same rows for each of `b` images: an int, or a symbolic size (jax.export)."""
    return jnp.broadcast_to(rows, (b, *rows.shape))
