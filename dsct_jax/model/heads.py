"""Class and box heads, shared by all decoder layers or one for each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsct_jax.boxes import inverse_sigmoid
from dsct_jax.model.layers import Linear, torch_uniform

INITIAL_SIZE = -2.0  # logit of a new box's width and height: about a ninth of the image
# -log((1 - 0.01) / 0.01): every class starts at probability 0.01 (focal loss)
CLASS_PRIOR_BIAS = -4.59511985013459


def refine(
    deltas: Float[Array, "*b 4"], references: Float[Array, "*b r"], *, epsilon: float = 1e-5
) -> Float[Array, "*b 4"]:
    """References moved by logits `deltas`, as boxes (cx, cy, w, h) in [0, 1]. References are points
    (r = 2), whose size is that of the deltas alone, or boxes (r = 4); both are kept `epsilon` from
    0 and 1.
    """
    start = inverse_sigmoid(references, eps=epsilon)
    missing = [(0, 0)] * (start.ndim - 1) + [(0, 4 - start.shape[-1])]
    return jax.nn.sigmoid(deltas + jnp.pad(start, missing))


class BoxHead(nnx.Module):
    """Three dense layers: a box relative to a reference point, or to the box that it `refines`.
    Without `initial_size`, the logit of a new box's sides, the last layer starts like the others.
    """

    def __init__(
        self,
        d: int,
        *,
        refines: bool = False,
        initial_size: float | None = INITIAL_SIZE,
        rngs: nnx.Rngs,
    ):
        self.refines = refines
        start, zeros = torch_uniform(d), nnx.initializers.zeros
        self.layer0 = Linear(d, d, kernel_init=start, bias_init=start, rngs=rngs)
        self.layer1 = Linear(d, d, kernel_init=start, bias_init=start, rngs=rngs)
        size = 0.0 if refines else initial_size
        last = {"kernel_init": zeros, "bias_init": lambda *_: jnp.array([0.0, 0.0, size, size])}
        if size is None:
            last = {"kernel_init": start, "bias_init": start}
        self.layer2 = Linear(d, 4, **last, rngs=rngs)

    def deltas(self, tokens: Float[Array, "*b d"]) -> Float[Array, "*b 4"]:
        """How far each token moves its reference, as logits."""
        return self.layer2(jax.nn.relu(self.layer1(jax.nn.relu(self.layer0(tokens)))))

    def references(self, points: Float[Array, "b q 2"], num_context: int) -> Float[Array, "b q r"]:
        """What the first decoder layer refers to: the points themselves, or with refinement boxes
        of the initial size around those of the subject queries; context queries get a size of 0,
        since they never stand for a box.
        """
        if not self.refines:
            return points
        is_context = jnp.arange(points.shape[1]) < num_context
        size = jnp.where(is_context, 0.0, jax.nn.sigmoid(INITIAL_SIZE))
        return jnp.concatenate([points, jnp.broadcast_to(size[None, :, None], points.shape)], -1)


class ClassHead(Linear):
    """One dense layer to the classes and "a subject". Without a logit for the `subject` that is the
    highest of the classes.
    """

    def __init__(self, d: int, num_classes: int, *, subject: bool, rngs: nnx.Rngs):
        self.subject = subject
        super().__init__(
            *(d, num_classes + subject),
            kernel_init=torch_uniform(d),
            bias_init=nnx.initializers.constant(CLASS_PRIOR_BIAS),
            rngs=rngs,
        )

    def __call__(
        self, inputs: Float[Array, "*n d"], out_sharding: Any = None
    ) -> Float[Array, "*n k1"]:
        logits = super().__call__(inputs, out_sharding)
        if self.subject:
            return logits
        return jnp.concatenate([logits, logits.max(-1, keepdims=True)], -1)


class SharedHeads(NamedTuple):
    """One class head and one box head, for all layers."""

    classes: Sequence[Any]
    boxes: Sequence[BoxHead]


class Heads(nnx.Module):
    """A class and a box for each query: copies for all layers or one each, and for proposals."""

    def __init__(self, config: Any, *, copies: int, large: bool, rngs: nnx.Rngs):
        """`large`: the first copy starts with boxes of a ninth of the image around its points."""
        d, k, subject = config.hidden_dim, config.num_classes, config.subject_logit
        self.classes = nnx.List(
            [ClassHead(d, k, subject=subject, rngs=rngs) for _ in range(copies)]
        )
        sizes = [INITIAL_SIZE if large else 0.0] + [0.0] * (copies - 1)
        self.boxes = nnx.List([BoxHead(d, initial_size=size, rngs=rngs) for size in sizes])
