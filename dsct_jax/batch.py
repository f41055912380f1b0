"""The contract of data, networks, objectives and metrics: a batch, its targets and predictions.

Letters: b batch, h w padded image, t targets, q queries, k classes, layers decoder layers.
Everything here is a pytree. Shapes are not checked when one is made (`no_type_check`), for it may
carry shardings or ShapeDtypeStructs; functions check what they take out.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

FlatParams = dict[str, Any]  # the values of a network: path 'a/b/c' -> array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@no_type_check
class Targets:
    """The people of each image, padded to a fixed number `t`."""

    boxes: Float[Any, "b t 4"]  # (cx, cy, w, h) in [0, 1] of the image without its padding
    # multi-hot (multi-label) or one-hot (multi-class); all zero = the person carries no label
    labels: Float[Any, "b t k"]
    valid: Bool[Any, "b t"]  # True = a real person
    # valence, arousal and dominance / 10, not a number = unknown; None: nobody reads them
    ratings: Float[Any, "b t 3"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@no_type_check
class Batch:
    """Padded images as they travel to the device, their sizes, and their people."""

    images: UInt8[Any, "b h w 3"]  # RGB, padded with 0 at the right and at the bottom
    sizes: Int[Any, "b 2"]  # (height, width) of each image inside the padded canvas
    targets: Targets
    image_ids: Int[Any, " b"]  # index of the record in its data set
    original_sizes: Int[Any, "b 2"]  # (height, width) of the image on disk
    real: Bool[Any, " b"]  # False = filler that completes the last batch; never counted
    # two-stage networks: each person cut out, t = 1; `images` are their contexts
    subjects: UInt8[Any, "b s s 3"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hungarian:
    """Queries and people are paired so that the sum of costs is least; each person `repeats` times
    (more than once: one-to-many).
    """

    repeats: int = dataclasses.field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@no_type_check
class Known:
    """The network itself made these queries of the people (denoising), each person `repeats` times.

    `targets` is the person of each query, -1 = nobody, which the query then has to say. A query of
    a person that is not `Targets.valid` takes no part in the loss.
    """

    targets: Int[Any, "b q"]
    repeats: int = dataclasses.field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@no_type_check
class Overlap:
    """Queries answer for the people that their anchors overlap (DETA, Ouyang-Zhang et al. 2022).

    An anchor is positive for the person it overlaps most if their IoU is at least `min_iou` or no
    anchor overlaps somebody more. A person with n positives is answered for by the min(n,
    `repeats`) anchors that overlap it most.
    """

    anchors: Float[Any, "b q 4"]  # of the queries, one for all layers
    min_iou: float = dataclasses.field(default=0.6, metadata={"static": True})
    repeats: int = dataclasses.field(default=4, metadata={"static": True})
    # more positives than this: as many of them, scattered over the anchors
    max_positives: int = dataclasses.field(default=128, metadata={"static": True})


Assignment = Hungarian | Known | Overlap  # how the queries of a branch find their people


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@no_type_check
class Branch:
    """Further predictions of a training step, with a loss of their own: `weight` times that of the
    answer, logged as `name`/...
    """

    logits: Float[Any, "layers b q k+1"]
    boxes: Float[Any, "layers b q 4"]
    assignment: Assignment
    name: str = dataclasses.field(metadata={"static": True})
    weight: float = dataclasses.field(default=1.0, metadata={"static": True})
    # True: everybody's only label is class 0, a person (first stage of a two-stage network)
    one_class: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@no_type_check
class Predictions:
    """What a network says. The last layer is the answer, the others are the auxiliary outputs."""

    # the last logit is "a subject" (multi-label) or unused (multi-class), as released
    logits: Float[Any, "layers b q k+1"]
    boxes: Float[Any, "layers b q 4"]  # (cx, cy, w, h) in [0, 1] of the image without its padding
    details: Any = None  # attention weights, sampling locations ... per layer, when asked for
    branches: tuple[Branch, ...] = ()  # in training only
    assignment: Assignment = Hungarian()  # of the answer
    # "b 3": valence, arousal, dominance of the person, where the network says them; of 10
    ratings: Any = None


def padding_mask(sizes: Int[Array, "b 2"], height: int, width: int) -> Bool[Array, "b h w"]:
    """True where a pixel of the padded `height` x `width` canvas lies outside its image."""
    rows = jnp.arange(height)[None, :, None] >= sizes[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] >= sizes[:, 1, None, None]
    return rows | columns
