"""Boxes that move from decoder layer to decoder layer (Zhu et al. 2020; "look forward twice": Zhang
et al. 2022).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsct_jax.boxes import inverse_sigmoid


def refine(
    delta: Float[Array, "*b 4"], reference: Float[Array, "*b r"], *, eps: float = 1e-5
) -> Float[Array, "*b 4"]:
    """A box moved by `delta`, which is added before the sigmoid; of a reference point (r = 2) there
    is no size to add to.
    """
    start = inverse_sigmoid(reference, eps=eps)
    missing = [(0, 0)] * (start.ndim - 1) + [(0, 4 - start.shape[-1])]
    return jax.nn.sigmoid(delta + jnp.pad(start, missing))


class References(NamedTuple):
    """Where a decoder layer stands."""

    seen: Float[Array, "b q r"]  # where it samples
    start: Float[Array, "b q r"]  # the same values: what its predicted boxes are relative to

    def move(
        self, delta: Float[Array, "b q 4"], *, eps: float, look_forward_twice: bool
    ) -> "References":
        """Those of the next layer. No gradient of it comes back through what it sees; through the
        start of its boxes it does if `look_forward_twice`, as far as `delta`.
        """
        moved = refine(delta, self.seen, eps=eps)
        seen = jax.lax.stop_gradient(moved)
        return References(seen, moved if look_forward_twice else seen)


def in_each_map(
    references: Float[Array, "b q r"], valid_ratios: Float[Array, "b l 2"]
) -> list[Float[Array, "b q l 2"]]:
    """Points, or points and sizes, of the image -> of each level's padded map."""
    parts = references.shape[-1] // 2
    scaled = references[:, :, None] * jnp.tile(valid_ratios, parts)[:, None]
    return jnp.split(scaled, parts, -1)
