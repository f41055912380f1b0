"""What a box holds, read cell by cell (RoIAlign, He et al. 2017) inside the decoder: ours, for
faces that have to be read from few photographs.

Deformable attention adds up what it samples, so the order of a face's parts has to be learned.
Cells keep it: the last decoder layer reads those of the box that the layer before has found, and
what they say is added to the query that stands there.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsct_jax.model.backbone import Block, ResNetConfig
from dsct_jax.model.layers import DropoutNoise, LayerNorm, Linear, dropout

MARGIN = 1.1  # of the box: what is read is a little larger
_BASIC = ResNetConfig(False, (1, 1, 1, 1))


def roi_align(
    features: Float[Array, "b h w c"],
    centers: Float[Array, "b q 2"],
    sizes: Float[Array, "b q 2"],
    cells: int,
) -> Float[Array, "b q cells cells c"]:
    """Means of the map over the cells of boxes, in [0, 1] of the map; outside it is zero.

    A cell is read with a triangle as wide as itself, at least one pixel, so that large boxes are
    averaged instead of sampled. Rows and columns are matrix products: no gather, on any device.
    """
    _, h, w, _ = features.shape
    steps = (jnp.arange(cells) + 0.5) / cells - 0.5

    def weights(center: jax.Array, size: jax.Array, length: int) -> Float[Array, "b q cells n"]:
        at = (center[..., None] + steps * size[..., None]) * length - 0.5
        reach = jnp.maximum(size * (length / cells), 1.0)[..., None, None]
        distance = jnp.abs(at[..., None] - jnp.arange(length)) / reach
        return (jnp.maximum(1 - distance, 0) / reach).astype(features.dtype)

    rows = weights(centers[..., 1], sizes[..., 1], h)
    columns = weights(centers[..., 0], sizes[..., 0], w)
    read = jnp.einsum("bqih,bhwc->bqiwc", rows, features)
    return jnp.einsum("bqjw,bqiwc->bqijc", columns, read)


class RoIReading(nnx.Module):
    """Cells of a box -> two residual blocks -> one dense layer that knows which cell is which."""

    def __init__(self, channels: int, cells: int, d: int, *, dropout_rate: float, rngs: nnx.Rngs):
        self.cells, self.dropout_rate = cells, dropout_rate
        self.blocks = nnx.List(
            [
                Block(channels, d, 2, _BASIC, "group", rngs),
                Block(d, d, 1, _BASIC, "group", rngs),
            ]
        )
        self.linear = Linear(d * (-(-cells // 2)) ** 2, d, rngs=rngs)
        self.norm = LayerNorm(d, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        features: Float[Array, "b h w c"],
        centers: Float[Array, "b q 2"],
        sizes: Float[Array, "b q 2"],
        noise: DropoutNoise | None,
    ) -> Float[Array, "b q d"]:
        """The tokens with what their boxes hold."""
        b, q, _ = tokens.shape
        x = roi_align(features, centers, sizes * MARGIN, self.cells)
        x = x.reshape(b * q, *x.shape[2:])
        for block in self.blocks:
            x = block(x)
        x = dropout(x.reshape(b, q, -1), self.dropout_rate, noise)
        return self.norm(tokens + self.linear(x))
