"""The objective of networks whose people were given: one answer a person, nothing to match."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Batch, Predictions
from dsct_jax.config import cannot_be_used
from dsct_jax.training.config import GIVEN_LOSSES, LossConfig, MatcherConfig
from dsct_jax.training.losses import LossSums, count_correct, require_classes

_ABSENT = 1e-4  # dynamic weight of a class without a person in the batch (EMO-Net)
_RATING_SCALE = 10.0  # the loss counts ratings from 0 to 10


@dataclasses.dataclass(frozen=True)
class Classification:
    """Class loss of each person, and that of valence, arousal and dominance where both the network
    and the data have them. `matcher` is not read.
    """

    loss: LossConfig
    matcher: MatcherConfig
    multi_label: bool

    def __post_init__(self) -> None:
        if self.loss.class_loss not in GIVEN_LOSSES:
            wanted = f"{' or '.join(GIVEN_LOSSES)} for a network whose people are given"
            raise cannot_be_used("loss.class_loss", self.loss.class_loss, wanted)

    @property
    def host_half(self) -> Callable[[Any], Any] | None:
        """Nothing: a step is one program."""
        return None

    def totals(self, batch: Batch) -> dict[str, Array]:
        """`num_people`, at least 1; the weight of each class."""
        counted, labels = _counted(batch), batch.targets.labels[:, 0]
        require_classes(self.loss, labels.shape[-1])
        people = jnp.where(counted[:, None], labels, 0)
        weights = class_weights(people, self.loss)
        return {"num_people": jnp.maximum(counted.sum(), 1).astype(jnp.float32)} | {
            "class_weights": weights
        }

    def prepare(self, predictions: Predictions, batch: Batch) -> Any:
        """Nothing."""
        del predictions, batch

    def loss_sums(
        self, predictions: Predictions, batch: Batch, prepared: Any, totals: dict[str, Any]
    ) -> LossSums:
        """`loss_class` and `loss_ratings`, and their weighted total."""
        del prepared
        logits, labels = predictions.logits[-1, :, 0, :-1], batch.targets.labels[:, 0]
        counted, weights = _counted(batch), totals["class_weights"]
        if self.loss.class_loss == "squared":
            each = weights * jnp.square(logits - labels)
            loss = jnp.where(counted[:, None], each, 0).sum()
        else:
            smoothing = self.loss.label_smoothing
            level = smoothing * (0.5 if self.multi_label else 1 / labels.shape[-1])
            smoothed = labels * (1 - smoothing) + level
            if self.multi_label:
                yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
                each = -(smoothed * yes + (1 - smoothed) * no) * weights / labels.shape[-1]
            else:
                log_p = jax.nn.log_softmax(logits)
                each = -smoothed * log_p * (labels * weights).sum(-1, keepdims=True)
            loss = jnp.where(counted[:, None], each, 0).sum() / totals["num_people"]
        terms = {"total": self.loss.weight_class * loss, "loss_class": loss}
        ratings = batch.targets.ratings
        if predictions.ratings is not None and ratings is not None:
            errors = rating_losses(predictions.ratings, ratings[:, 0], self.loss.ratings_loss)
            rated = batch.real[:, None] & jnp.isfinite(ratings[:, 0])
            terms["loss_ratings"] = jnp.where(rated, errors, 0).sum()
            terms["total"] += self.loss.weight_ratings * terms["loss_ratings"]
        if self.multi_label:
            return LossSums(terms)
        right = count_correct(logits[:, None], labels[:, None], counted[:, None])
        return LossSums(terms, {"class_accuracy": right})


def _counted(batch: Batch) -> Bool[Array, " b"]:
    """Whose class loss counts: a person with a label, not a filler."""
    targets = batch.targets
    return batch.real & targets.valid[:, 0] & targets.labels[:, 0].any(-1)


def class_weights(labels: Float[Array, "b k"], config: LossConfig) -> Float[Array, " k"]:
    """The weight of each class, given the labels of a batch."""
    k = labels.shape[-1]
    if config.class_loss == "squared" and config.squared_weights == "dynamic":
        counts = labels.sum(0)
        return jnp.where(counts > 0, 1 / jnp.log(1.2 + counts), _ABSENT)
    if config.class_loss == "squared" and config.squared_weights == "mean":
        return jnp.full(k, 1 / k)
    return jnp.asarray(config.class_weights or (1.0,) * k, jnp.float32)


def rating_losses(
    ratings: Float[Array, "b 3"], targets: Float[Array, "b 3"], kind: str
) -> Float[Array, "b 3"]:
    """Of each rating / 10; a target that is not finite costs nothing and has no gradient."""
    targets = jnp.where(jnp.isfinite(targets), targets, jax.lax.stop_gradient(ratings))
    errors = _RATING_SCALE * (ratings - targets)
    squares, distance = jnp.square(errors), jnp.abs(errors)
    if kind == "l2":  # small errors are forgiven
        return jnp.where(distance < 1, 0, squares)
    return jnp.where(distance <= 1, squares / 2, distance - 0.5)
