"""The contract between data, model, losses and metrics: what one batch, its targets and its
predictions hold.

Letters: b batch, h w padded image, t targets, q subject queries, k classes, layers decoder layers.
Everything here is a pytree, so a batch can be sharded, donated or mapped over as one value. Fields
are described in comments rather than as checked annotations because the same containers also carry
shardings and ShapeDtypeStructs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """The people of each image, padded to a fixed number `t`."""

    boxes: Any  # float32 [b t 4], (cx, cy, w, h) in [0, 1] of the image without its padding
    # float32 [b t k], multi-hot (multi-label) or one-hot (multi-class); all zero = the person
    # carries no label
    labels: Any
    valid: Any  # bool [b t], True = a real person


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded images as they travel to the device, their sizes, and their people."""

    images: Any  # uint8 [b h w 3] RGB, padded with 0 at the right and at the bottom
    sizes: Any  # int32 [b 2], (height, width) of each image inside the padded canvas
    targets: Targets
    image_ids: Any  # int32 [b], index of the record in its data set
    original_sizes: Any  # int32 [b 2], (height, width) of the image on disk
    real: Any  # bool [b], False = filler that completes the last evaluation batch; never counted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the model says. The last layer is the answer, the others are the auxiliary outputs."""

    # float32 [layers b q k+1]; the last logit is "a subject" (multi-label) or unused (multi-class),
    # as released
    logits: Any
    boxes: Any  # float32 [layers b q 4], (cx, cy, w, h) in [0, 1] of the image without its padding
    details: Any = None  # attention weights, sampling locations ... per layer, when asked for


def padding_mask(sizes: Int[Array, "b 2"], height: int, width: int) -> Bool[Array, "b h w"]:
    """True where a pixel of the padded `height` x `width` canvas lies outside its image."""
    rows = jnp.arange(height)[None, :, None] >= sizes[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] >= sizes[:, 1, None, None]
    return rows | columns
