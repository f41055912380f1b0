"""Frozen networks beside the backbone (paper Table 13): the scene (a ResNet of Places365),
semantics (DeepLabv3's) and instances (Mask R-CNN's, with its feature pyramid) of the same images.

The paper says only that their multi-scale features were integrated: here each level gets a
projection of its own and is added to the network's level, or is put beside the backbone's channels.
DeepLabv3's dilated maps at every second and fourth cell are those of the network without dilation.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.layers import Conv, InputProjection, NormStatistic

MODALITIES = ("scene", "semantic", "instance")
PREFIX = "modalities/"  # of the frozen values
_PYRAMID_DIM = 256


def _nearest(x: Float[Array, "b h w c"], like: Float[Array, "b h2 w2 c"]) -> jax.Array:
    """torch's nearest upsampling to a size, which need not be a multiple."""
    rows, columns = (
        np.arange(wide) * narrow // wide
        for wide, narrow in zip(like.shape[1:3], x.shape[1:3], strict=True)
    )
    return x[:, rows][:, :, columns]


class FeaturePyramid(nnx.Module):
    """C3, C4, C5 -> P3, P4, P5, P6 (Lin et al. 2017, torchvision's names and order); P2 is not
    used.
    """

    def __init__(self, channels: Sequence[int], *, rngs: nnx.Rngs):
        d = _PYRAMID_DIM
        self.inner = nnx.List([Conv(c, d, 1, use_bias=True, rngs=rngs) for c in channels])
        self.outer = nnx.List([Conv(d, d, 3, use_bias=True, rngs=rngs) for _ in channels])

    def __call__(self, features: Sequence[jax.Array]) -> list[Float[Array, "b _ _ d"]]:
        lateral = [inner(x) for inner, x in zip(self.inner, features, strict=True)]
        for i in (1, 0):
            lateral[i] = lateral[i] + _nearest(lateral[i + 1], lateral[i])
        maps = [outer(x) for outer, x in zip(self.outer, lateral, strict=True)]
        return [*maps, maps[-1][:, ::2, ::2]]


class Modality(nnx.Module):
    """One of MODALITIES: normalized images -> its maps, without gradient. Its values are kept with
    those of frozen norms: not trained, averaged or decayed.
    """

    def __init__(self, name: str, backbone: str, *, pyramid: bool, rngs: nnx.Rngs):
        config = BACKBONES[backbone]
        self.body = ResNet(config, norm="frozen_batch", rngs=rngs)
        self.channels: tuple[int, ...] = config.channels
        has_pyramid = name == "instance" and pyramid
        self.pyramid = FeaturePyramid(config.channels, rngs=rngs) if has_pyramid else None
        if has_pyramid:
            self.channels = (_PYRAMID_DIM,) * 4
        for _, module in nnx.iter_modules(self):
            for field, value in list(vars(module).items()):
                if isinstance(value, nnx.Param):
                    setattr(module, field, NormStatistic(value[...]))

    def __call__(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ c"]]:
        """Maps at strides 8, 16, 32, and 64 with a feature pyramid."""
        maps = self.body(images)
        return jax.lax.stop_gradient(maps if self.pyramid is None else self.pyramid(maps))


def level_projections(
    channels: Sequence[int], d: int, levels: int, *, scale: float = 1.0, rngs: nnx.Rngs
) -> Any:
    """Of maps with these channels to `levels` levels of size d; those beyond the maps are strided
    convolutions of the last one, then of each other. `scale`: of their norms, at the start.
    """
    widths = [*channels, channels[-1], *[d] * (levels - len(channels) - 1)]
    projections = [
        InputProjection(widths[i], d, strided=i >= len(channels), rngs=rngs) for i in range(levels)
    ]
    if scale != 1.0:
        for projection in projections:
            projection.norm.scale = nnx.Param(projection.norm.scale[...] * scale)
    return nnx.List(projections)


def project_levels(
    projections: Sequence[nnx.Module], maps: Sequence[jax.Array]
) -> list[Float[Array, "b _ _ d"]]:
    """The maps as levels, as `level_projections` says."""
    levels = [project(x) for project, x in zip(projections, maps, strict=False)]
    source = maps[-1]
    for project in projections[len(maps) :]:
        source = project(source)
        levels.append(source)
    return levels
