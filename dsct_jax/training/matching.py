"""Which subject query answers for which person: the matching cost and its optimal assignment (paper
Section 3.2, Eq. 1-2).

The cost is computed on the device for all decoder layers at once. The assignment is solved on the
host by SciPy, between the two jitted halves of a step, or on the device by optax. Both find the
optimum; where several assignments cost the same, each may return another of them, and costs that
differ by less than about 1e-5 are the same to the device, which computes in float32 where SciPy
uses float64.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from optax.assignment import hungarian_algorithm
from scipy.optimize import linear_sum_assignment

from dsct_jax.batch import Targets
from dsct_jax.boxes import AnyArray, cxcywh_to_xyxy, iou_and_giou
from dsct_jax.training.config import LossConfig, MatcherConfig

# The released matcher fixes these two, whatever the focal loss uses, and adds _LOG_OFFSET inside
# the logarithms.
_ALPHA = 0.25
_GAMMA = 2.0
_LOG_OFFSET = 1e-8
_DEFAULT_LOSS = LossConfig()


def matching_cost(
    logits: Float[Array, "*lead b q c"],
    boxes: Float[Array, "*lead b q 4"],
    targets: Targets,
    *,
    config: MatcherConfig,
    multi_label: bool,
    loss: LossConfig = _DEFAULT_LOSS,
) -> Float[Array, "*lead b q t"]:
    """Cost of answering for target t with query q; `lead` is usually the decoder layers, c = k + 1
    (the last logit plays no part but in the class cost of class_loss="no_object").

    boxes are (cx, cy, w, h) in [0, 1]. Rows of targets that are not `targets.valid` hold finite but
    meaningless numbers. The class cost of a target without any label is 0. Source: the released
    matcher.py:60-100.
    """
    query_boxes, target_boxes = _pairs(boxes, targets)
    if loss.class_loss == "no_object":  # minus the probability, as DETR
        found = jax.nn.sigmoid(logits[..., -1:])
        per_class = -jax.nn.softmax(logits[..., :-1], axis=-1) * found
    else:
        per_class = _focal_class_cost(logits[..., :-1])
    if multi_label:  # the released mean over all classes, of which only the positive ones count
        per_class = per_class / per_class.shape[-1]
    labels = jnp.broadcast_to(targets.labels, (*logits.shape[:-3], *targets.labels.shape))
    class_cost = jnp.einsum(
        "...qk,...tk->...qt", per_class, labels, precision=jax.lax.Precision.HIGHEST
    )
    bbox_cost = jnp.abs(query_boxes - target_boxes).sum(-1)
    corners = cxcywh_to_xyxy(query_boxes), cxcywh_to_xyxy(target_boxes)
    giou = iou_and_giou(*corners, epsilon=loss.giou_epsilon)[1]
    return config.cost_class * class_cost + config.cost_bbox * bbox_cost - config.cost_giou * giou


def _pairs(
    boxes: Float[Array, "*lead b q 4"], targets: Targets
) -> tuple[Float[Array, "*lead b q t 4"], Float[Array, "*lead b q t 4"]]:
    """The boxes of each query with each target."""
    query_boxes, target_boxes = jnp.broadcast_arrays(
        boxes[..., :, None, :], targets.boxes[..., None, :, :]
    )
    return query_boxes, target_boxes


def _focal_class_cost(logits: Float[Array, "*n k"]) -> Float[Array, "*n k"]:
    """Focal loss of calling the class positive minus that of calling it negative."""
    probability = jax.nn.sigmoid(logits)
    negative = (1 - _ALPHA) * probability**_GAMMA * -jnp.log(1 - probability + _LOG_OFFSET)
    positive = _ALPHA * (1 - probability) ** _GAMMA * -jnp.log(probability + _LOG_OFFSET)
    return positive - negative


def assign_on_host(
    cost: Float[np.ndarray, "layers b q t"],
    valid: Bool[np.ndarray, "b t"],
    *,
    image_ids: Sequence[int] | None = None,
) -> Int[np.ndarray, "layers b q"]:
    """Index of the target that each query is matched to, int32, -1 = none; the optimum of every
    layer and image (SciPy).

    With more valid targets than queries the targets that would cost most stay without a query.
    `image_ids` [b] only improve the message.

    Raises:
        FloatingPointError: a cost of a valid target is not finite; names the decoder layer and the
            image.
    """
    wrong = ~np.isfinite(cost) & valid[None, :, None, :]
    if wrong.any():
        layer, image = (int(i) for i in np.argwhere(wrong)[0, :2])
        which = "" if image_ids is None else f" (id {image_ids[image]})"
        raise FloatingPointError(
            f"the matching cost of decoder layer {layer}, image {image} of the batch{which}, is "
            "not finite: the logits, boxes or targets hold NaN or infinity"
        )
    assignment = np.full(cost.shape[:3], -1, np.int32)
    for image in range(cost.shape[1]):
        people = np.flatnonzero(valid[image])
        if people.size == 0:
            continue
        for layer in range(cost.shape[0]):
            queries, matched = linear_sum_assignment(cost[layer, image][:, people])
            assignment[layer, image, queries] = people[matched]
    return assignment


def assign_on_device(
    cost: Float[Array, "layers b q t"], valid: Bool[Array, "b t"]
) -> Int[Array, "layers b q"]:
    """`assign_on_host` as jax operations: target of each query, int32, -1 = none. Costs that are
    not finite count as 0.

    Targets that are not valid become real columns of the problem, so expensive that no valid one
    is passed over for them.
    """
    num_queries, num_targets = cost.shape[-2:]
    cost = jnp.where(valid[:, None, :], jnp.nan_to_num(cost, nan=0.0, posinf=0.0, neginf=0.0), 0.0)
    # Taking one more valid target may change every other pair by the whole range of costs. No
    # higher than needed: float32 has 24 bits.
    peak = jnp.abs(cost).max((-1, -2), keepdims=True, initial=0.0)
    padding = 2 * (num_queries + 1) * peak + 1 if num_queries < num_targets else 0.0
    cost = jnp.where(valid[:, None, :], cost, padding)

    def solve(cost, valid):
        queries, targets = hungarian_algorithm(cost)
        return (
            jnp.full(num_queries, -1, jnp.int32)
            .at[queries]
            .set(jnp.where(valid[targets], targets, -1).astype(jnp.int32))
        )

    if num_targets == 0:
        return jnp.full(cost.shape[:3], -1, jnp.int32)
    return jax.vmap(jax.vmap(solve), in_axes=(0, None))(cost, valid)


def assign_repeatedly(
    cost: AnyArray, valid: AnyArray, repeats: int, *, solve: Callable[..., AnyArray]
) -> AnyArray:
    """Each target for up to `repeats` queries: what `solve`, one of the two above, finds of targets
    that are repeated.
    """
    if repeats == 1:
        return solve(cost, valid)
    namespace = np if isinstance(cost, np.ndarray) else jnp
    found = solve(namespace.tile(cost, repeats), namespace.tile(valid, repeats))
    return namespace.where(found < 0, -1, found % max(valid.shape[-1], 1))
