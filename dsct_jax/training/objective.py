"""What a training step minimizes. `SetPrediction` serves every network whose queries have to find
their people: DSCT and the DETR family. A network whose outputs need no matching has another one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsct_jax.batch import Batch, Branch, Hungarian, Known, Overlap, Predictions, Targets
from dsct_jax.training.assignment import assign_by_overlap
from dsct_jax.training.classification import Classification
from dsct_jax.training.config import LossConfig, MatcherConfig
from dsct_jax.training.losses import LossSums, count_boxes, loss_sums, no_object_total
from dsct_jax.training.matching import (
    assign_on_device,
    assign_on_host,
    assign_repeatedly,
    matching_cost,
)


@runtime_checkable
class Objective(Protocol):
    """What a step needs to know of a loss. Everything but `totals` sees the images of one device,
    or of a part of them.
    """

    @property
    def host_half(self) -> Callable[[Any], Any] | None:
        """What the host makes of `prepare`'s NumPy arrays for `loss_sums`; None = nothing, which
        makes a step one program.
        """

    def totals(self, batch: Batch) -> dict[str, Any]:
        """Numbers of the whole batch by which losses are divided; they are logged too."""

    def prepare(self, predictions: Any, batch: Batch) -> Any:
        """What `loss_sums` takes as `prepared`, or what `host_half` makes it of. Not
        differentiated.
        """

    def loss_sums(
        self, predictions: Any, batch: Batch, prepared: Any, totals: dict[str, Any]
    ) -> LossSums:
        """Sums over these images; the gradient is that of their term `total`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatchingProblem:
    """All that the matching of a step needs: cost [layers b q t] and repeats of each branch, None
    where it needs no cost, and which targets are real [b t].
    """

    costs: list[Any]
    valid: Any
    repeats: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def solve(self, solver: Callable[..., Any]) -> list[Any]:
        """Assignment [layers b q] of each branch, None where there is no cost."""
        return [
            None if cost is None else assign_repeatedly(cost, self.valid, repeats, solve=solver)
            for cost, repeats in zip(self.costs, self.repeats, strict=True)
        ]


def match_on_host(problem: MatchingProblem) -> list[np.ndarray | None]:
    """The assignments of all branches and layers, by SciPy."""
    return problem.solve(assign_on_host)


@dataclasses.dataclass(frozen=True)
class SetPrediction:
    """Class and box losses of every layer of the answer and of each branch, whose queries find
    their people as the branch says. The terms of a branch are named `<branch>/loss_class` ...
    """

    loss: LossConfig
    matcher: MatcherConfig
    multi_label: bool

    @property
    def host_half(self) -> Callable[[Any], Any] | None:
        """SciPy's matching, where the configuration asks for it."""
        return match_on_host if self.matcher.implementation == "scipy" else None

    def totals(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """`num_boxes`, the people of the batch; what else the class loss needs to be a mean."""
        targets = batch.targets
        totals = {"num_boxes": count_boxes(targets.valid)}
        if self.loss.class_loss == "no_object":
            weights = jnp.asarray(self.loss.class_weights or (1.0,), jnp.float32)
            totals["num_images"] = batch.real.sum().astype(jnp.float32)
            totals["num_people"] = targets.valid.sum().astype(jnp.float32)
            totals["label_weight"] = jnp.where(
                targets.valid, (targets.labels * weights).sum(-1), 0
            ).sum()
        return totals

    def prepare(self, predictions: Predictions, batch: Batch) -> Any:
        """The matching problem for the host, or its solution by the device."""
        branches = _all_branches(predictions)
        costs = [
            matching_cost(
                branch.logits,
                branch.boxes,
                _people(branch, batch.targets),
                config=self.matcher,
                multi_label=self.multi_label,
                loss=self.loss,
            )
            if isinstance(branch.assignment, Hungarian)
            else None
            for branch in branches
        ]
        repeats = tuple(branch.assignment.repeats for branch in branches)
        problem = MatchingProblem(costs, batch.targets.valid, repeats)
        return problem if self.host_half else problem.solve(assign_on_device)

    def loss_sums(
        self,
        predictions: Predictions,
        batch: Batch,
        prepared: list[Any],
        totals: dict[str, Any],
    ) -> LossSums:
        """The losses of all branches; what is measured beside them, of the answer only."""
        answer, *others = (
            self._branch_sums(branch, batch, matched, totals)
            for branch, matched in zip(_all_branches(predictions), prepared, strict=True)
        )
        terms = dict(answer.terms)
        for branch, sums in zip(predictions.branches, others, strict=True):
            terms["total"] += branch.weight * sums.terms.pop("total")
            terms |= {f"{branch.name}/{name}": value for name, value in sums.terms.items()}
        return LossSums(terms, answer.ratios)

    def _branch_sums(
        self, branch: Branch, batch: Batch, matched: Any, totals: dict[str, Any]
    ) -> LossSums:
        boxes, box_assignment, repeats = branch.boxes, None, branch.assignment.repeats
        if isinstance(branch.assignment, Overlap):  # a query may answer for several people
            pairs, repeats = assign_by_overlap(batch.targets, branch.assignment), 1
            layers, _, q = branch.logits.shape[:3]
            queries, people, matched = (
                jnp.broadcast_to(x, (layers, *x.shape)) for x in (*pairs.flat, pairs.of_queries(q))
            )
            boxes, box_assignment = jnp.take_along_axis(boxes, queries[..., None], 2), people
        assignment, counted = _assign(branch, batch, matched)
        class_total = None
        if self.loss.class_loss == "no_object":
            class_total = no_object_total(totals, assignment.shape[-1], repeats, self.loss)
        return loss_sums(
            branch.logits,
            boxes,
            _people(branch, batch.targets),
            assignment,
            box_assignment=box_assignment,
            counted=counted,
            num_boxes=totals["num_boxes"] * repeats,
            class_total=class_total,
            config=self.loss,
            multi_label=self.multi_label,
        )


# by the name in model.build.NETWORKS; each is made of (loss, matcher, multi_label=...)
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "set_prediction": SetPrediction,
    "classification": Classification,
}


def _all_branches(predictions: Predictions) -> tuple[Branch, ...]:
    """The answer as a branch, and the others."""
    answer = Branch(predictions.logits, predictions.boxes, predictions.assignment, name="")
    return (answer, *predictions.branches)


def _people(branch: Branch, targets: Targets) -> Targets:
    """The people as a branch knows them."""
    if not branch.one_class:
        return targets
    labels = jnp.zeros_like(targets.labels).at[..., 0].set(1)
    return dataclasses.replace(targets, labels=labels)


def _assign(
    branch: Branch, batch: Batch, matched: Any
) -> tuple[Int[Array, "layers b q"], Bool[Array, "b q"]]:
    """Target of each query, -1 = none, and which queries take part: none of a filler image."""
    shape = branch.logits.shape[:3]
    counted = jnp.broadcast_to(batch.real[:, None], shape[1:])
    match branch.assignment:
        case Hungarian() | Overlap():
            return matched, counted
        case Known(targets=targets):
            # compared instead of gathered, which stays local to a shard of the batch
            valid = batch.targets.valid[:, None, :]  # b 1 t
            real = ((targets[..., None] == jnp.arange(valid.shape[-1])) & valid).any(-1)
            assignment = jnp.where(real, targets, -1).astype(jnp.int32)
            return jnp.broadcast_to(assignment, shape), counted & (real | (targets < 0))
