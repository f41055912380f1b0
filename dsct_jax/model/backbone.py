"""ResNet and Wide-ResNet: image -> feature maps C3, C4, C5 at strides 8, 16, 32 (He et al. 2015,
Zagoruyko & Komodakis 2016). Layout and strides are torchvision's, so its weights load one to one.
"""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from dsct_jax.model.layers import BatchNorm, BatchNormKind, Conv, FrozenBatchNorm, GroupNorm


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Shape of a residual network."""

    bottleneck: bool
    blocks: tuple[int, int, int, int]  # blocks of layer1 .. layer4
    width: int = 64  # channels of the stem and planes of layer1; doubles from layer to layer
    wide: int = 1  # factor on the 3x3 convolution of a bottleneck (Wide-ResNet: 2)

    @property
    def expansion(self) -> int:
        """Channels of a block's result per plane."""
        return 4 if self.bottleneck else 1

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of C3, C4, C5."""
        c2 = self.width * self.expansion
        return 2 * c2, 4 * c2, 8 * c2


BACKBONES = {
    "resnet18": ResNetConfig(False, (2, 2, 2, 2)),
    "resnet34": ResNetConfig(False, (3, 4, 6, 3)),
    "resnet50": ResNetConfig(True, (3, 4, 6, 3)),
    "resnet101": ResNetConfig(True, (3, 4, 23, 3)),
    "resnet152": ResNetConfig(True, (3, 8, 36, 3)),
    "wide_resnet50": ResNetConfig(True, (3, 4, 6, 3), wide=2),
    "wide_resnet101": ResNetConfig(True, (3, 4, 23, 3), wide=2),
    "tiny": ResNetConfig(True, (1, 2, 2, 1), width=8),  # the size of the golden numbers: tests
    "small": ResNetConfig(False, (1, 1, 1, 1), width=16),  # for runs from scratch on a CPU
}


Norm = str | BatchNormKind  # "frozen_batch" or "group", as TransformerConfig.norm explains


def _norm(kind: Norm, channels: int) -> FrozenBatchNorm | GroupNorm | BatchNorm:
    if isinstance(kind, BatchNormKind):
        return BatchNorm(channels, kind)
    if kind == "frozen_batch":
        return FrozenBatchNorm(channels)
    return GroupNorm(channels, num_groups=max(1, min(32, channels // 8)))


class Stem(nnx.Module):
    """7x7 convolution with stride 2, normalization, ReLU and 3x3 max pooling with stride 2."""

    def __init__(self, width: int, *, norm: Norm, rngs: nnx.Rngs):
        self.conv = Conv(3, width, 7, stride=2, rngs=rngs)
        self.norm = _norm(norm, width)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h4 w4 c"]:
        x = jax.nn.relu(self.norm(self.conv(images)))
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class Block(nnx.Module):
    """Two 3x3 convolutions, or 1x1 - 3x3 - 1x1 if `bottleneck`; the stride is on the first 3x3, the
    dilation on each.
    """

    def __init__(
        self,
        d_in: int,
        planes: int,
        stride: int,
        config: ResNetConfig,
        norm: Norm,
        rngs: nnx.Rngs,
        dilation: int = 1,
    ):
        d_out = planes * config.expansion
        # (channels in, channels out, size, stride) of each convolution
        shapes = [(d_in, d_out, 3, stride), (d_out, d_out, 3, 1)]
        if config.bottleneck:
            inner = planes * config.wide
            shapes = [(d_in, inner, 1, 1), (inner, inner, 3, stride), (inner, d_out, 1, 1)]
        self.convs = nnx.List(
            [Conv(a, b, size, stride=s, dilation=dilation, rngs=rngs) for a, b, size, s in shapes]
        )
        self.norms = nnx.List([_norm(norm, b) for _, b, _, _ in shapes])
        projects = stride != 1 or d_in != d_out
        self.shortcut_conv = Conv(d_in, d_out, 1, stride=stride, rngs=rngs) if projects else None
        self.shortcut_norm = _norm(norm, d_out) if projects else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        shortcut = x
        if self.shortcut_conv is not None and self.shortcut_norm is not None:
            shortcut = self.shortcut_norm(self.shortcut_conv(x))
        *inner, (last_conv, last_norm) = zip(self.convs, self.norms, strict=True)
        for conv, norm in inner:
            x = jax.nn.relu(norm(conv(x)))
        return jax.nn.relu(last_norm(last_conv(x)) + shortcut)


class ResNet(nnx.Module):
    """images [b h w 3] -> (C3, C4, C5), from C2 on if that is the `finest`. `dilated`: C5 at stride
    16, with the reach of stride 32 (DC5).
    """

    def __init__(
        self,
        config: ResNetConfig,
        *,
        norm: Norm,
        dilated: bool = False,
        finest: int = 3,
        rngs: nnx.Rngs,
    ):
        self.finest = finest
        self.stem = Stem(config.width, norm=norm, rngs=rngs)
        layers, d_in = [], config.width
        for i, count in enumerate(config.blocks):
            blocks: list[Block] = []
            for j in range(count):
                planes, stride = config.width * 2**i, 2 if i > 0 and j == 0 else 1
                dilation = 1
                if dilated and i == 3:  # torchvision's first block keeps the dilation before it
                    stride, dilation = 1, 2 if j else 1
                blocks.append(Block(d_in, planes, stride, config, norm, rngs, dilation))
                d_in = planes * config.expansion
            layers.append(nnx.List(blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers

    def __call__(self, images: Float[Array, "b h w 3"], *, remat: str = "none") -> list[jax.Array]:
        """With `remat="all"` the backward pass keeps only what enters each block."""
        x, features = self.stem(images), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = (jax.checkpoint(block) if remat == "all" else block)(x)
            features.append(x)
        return features[self.finest - 2 :]
