"""Where things lie, as sine waves: tokens of a padded map, reference points and boxes; also a map's
padding mask and its valid part.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Which coordinates an embedding of (x, y) or (cx, cy, w, h) holds, in which order.
YX, YXWH, XYWH = (1, 0), (1, 0, 2, 3), (0, 1, 2, 3)


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


def sine(u: Float[Array, "*n"], width: int, temperature: float = 10000.0) -> Float[Array, "*n m"]:
    """A number in [0, 1] as `width` waves: sine and cosine in turn, from one period down to
    1 / `temperature` of one.
    """
    power = 2 * (np.arange(width) // 2) / width
    periods = (temperature**power).astype(np.float32).reshape(*(1,) * u.ndim, -1)
    phase = (u * (2 * math.pi))[..., None] / periods
    waves = jnp.stack([jnp.sin(phase[..., 0::2]), jnp.cos(phase[..., 1::2])], -1)
    return waves.reshape(*phase.shape)


def sine_of(
    coordinates: Float[Array, "*n r"],
    width: int,
    *,
    order: tuple[int, ...],
    temperature: float = 10000.0,
) -> Float[Array, "*n e"]:
    """`sine` of each coordinate, joined in `order`; `width` each."""
    waves = sine(coordinates[..., np.array(order)], width, temperature)
    return waves.reshape(*waves.shape[:-2], -1)


def map_coordinates(
    mask: Bool[Array, "b h w"], *, offset: float, epsilon: float = 1e-6
) -> Float[Array, "b h w 2"]:
    """(x, y) of each token in [0, 1] of the valid part: its number from 1, less `offset`, over the
    number of valid ones.
    """
    valid = (~mask).astype(jnp.float32)
    y, x = jnp.cumsum(valid, axis=1), jnp.cumsum(valid, axis=2)
    y = (y - offset) / (y[:, -1:, :] + epsilon)
    x = (x - offset) / (x[:, :, -1:] + epsilon)
    return jnp.stack([x, y], -1)


def sine_position(
    mask: Bool[Array, "b h w"], d: int, *, temperature: float = 10000.0, offset: float = 0.5
) -> Float[Array, "b h w d"]:
    """Sine embedding of the tokens of a map: first half y, second half x. Deformable DETR's has the
    `offset` 0.5, DETR's 0.
    """
    coordinates = map_coordinates(mask, offset=offset)
    return sine_of(coordinates, d // 2, order=YX, temperature=temperature)
