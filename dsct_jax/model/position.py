"""Where a token lies: sine embedding, padding mask and valid part of each level."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def resize_mask(mask: Bool[Array, "b h w"], height: int, width: int) -> Bool[Array, "b h2 w2"]:
    """Nearest-neighbour resize with PyTorch's index floor(i * in / out), in integers."""
    rows = (np.arange(height) * mask.shape[1]) // height
    columns = (np.arange(width) * mask.shape[2]) // width
    return mask[:, rows][:, :, columns]


def valid_ratio(mask: Bool[Array, "b h w"]) -> Float[Array, "b 2"]:
    """(width, height) of the image as a share of the padded map, along its first row and column."""
    height = jnp.sum(~mask[:, :, 0], 1) / mask.shape[1]
    width = jnp.sum(~mask[:, 0, :], 1) / mask.shape[2]
    return jnp.stack([width, height], -1)


def sine_position(
    mask: Bool[Array, "b h w"], d: int, *, temperature: float = 10000.0
) -> Float[Array, "b h w d"]:
    """Sine embedding of pixel centers in [0, 2 pi] of the valid part: first half y, second half x
    (DETR, with Deformable DETR's -0.5).
    """
    valid = (~mask).astype(jnp.float32)
    y, x = jnp.cumsum(valid, axis=1), jnp.cumsum(valid, axis=2)
    y = (y - 0.5) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (x - 0.5) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    power = 2 * (np.arange(d // 2) // 2) / (d // 2)
    period = (temperature**power).astype(np.float32).reshape(1, 1, 1, -1)

    def embed(position):
        phase = position[..., None] / period
        waves = jnp.stack([jnp.sin(phase[..., 0::2]), jnp.cos(phase[..., 1::2])], -1)
        return waves.reshape(*phase.shape)

    return jnp.concatenate([embed(y), embed(x)], -1)
