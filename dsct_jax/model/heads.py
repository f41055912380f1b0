"""Class and box heads, shared by all decoder layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsct_jax.boxes import inverse_sigmoid
from dsct_jax.model.layers import linear, torch_uniform

CLASS_PRIOR_BIAS = -4.59511985013459  # -log((1 - 0.01) / 0.01): every class starts at probability 0.01 (focal loss)


class BoxHead(nnx.Module):
    """Three dense layers that predict a box relative to the query's reference point."""

    def __init__(self, d: int, *, rngs: nnx.Rngs):
        self.layer0 = linear(d, d, kernel_init=torch_uniform(d), bias_init=torch_uniform(d), rngs=rngs)
        self.layer1 = linear(d, d, kernel_init=torch_uniform(d), bias_init=torch_uniform(d), rngs=rngs)
        start = lambda *_: jnp.array([0.0, 0.0, -2.0, -2.0])  # noqa: E731  a box of about a ninth of the image at the reference point
        self.layer2 = linear(d, 4, kernel_init=nnx.initializers.zeros, bias_init=start, rngs=rngs)

    def __call__(self, tokens: Float[Array, "*b d"], reference_points: Float[Array, "*b 2"]) -> Float[Array, "*b 4"]:
        """Boxes (cx, cy, w, h) in [0, 1] of the image without padding; reference points likewise."""
        deltas = self.layer2(jax.nn.relu(self.layer1(jax.nn.relu(self.layer0(tokens)))))
        centre = inverse_sigmoid(reference_points)
        return jax.nn.sigmoid(deltas + jnp.concatenate([centre, jnp.zeros_like(centre)], -1))


def class_head(d: int, num_logits: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """One dense layer; `num_logits` is the number of classes plus the released extra logit."""
    return linear(d, num_logits, kernel_init=torch_uniform(d), bias_init=nnx.initializers.constant(CLASS_PRIOR_BIAS), rngs=rngs)
