"""Costs and assignments of the matcher against the released HungarianMatcher, and the properties
that any matching must have.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsct_jax.batch import Targets
from dsct_jax.training.config import MatcherConfig
from dsct_jax.training.matching import assign_on_device, assign_on_host, matching_cost

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "matcher.npz")
cost_of = jax.jit(matching_cost, static_argnames=("config", "multi_label"))
on_device = jax.jit(assign_on_device)
CASES = [
    f"{kind}_{case}" for kind in ("ml", "mc") for case in ("main", "zero", "allzero", "toomany")
]


def golden(case):
    """The stored arrays of one case, with class numbers as one-hot labels."""
    arrays = {
        name.split("/")[1]: GOLDEN[name] for name in GOLDEN.files if name.startswith(case + "/")
    }
    labels = arrays["tgt_labels"]
    if case.startswith("mc"):
        labels = np.eye(7)[labels] * arrays["valid"][..., None]
    targets = Targets(
        boxes=jnp.asarray(arrays["tgt_boxes"]),
        labels=jnp.asarray(labels, jnp.float32),
        valid=jnp.asarray(arrays["valid"]),
    )
    return arrays, targets


@pytest.mark.parametrize("case", CASES)
def test_cost_and_assignment_equal_the_released_matcher(case):
    arrays, targets = golden(case)
    cost = cost_of(jnp.asarray(arrays["logits"])[None], jnp.asarray(arrays["boxes"])[None], targets,
                         config=MatcherConfig(), multi_label=case.startswith("ml"))  # fmt: skip
    cost = np.asarray(cost)
    assert cost.shape == (1, *arrays["cost"].shape)
    difference = np.abs(cost[0] - arrays["cost"]) * arrays["valid"][:, None, :]
    assert difference.max(initial=0) < 2e-6

    assignment = assign_on_host(cost, arrays["valid"])
    expected = np.full(assignment.shape, -1)
    for image, (queries, people) in enumerate(
        zip(arrays["idx_src"], arrays["idx_tgt"], strict=True)
    ):
        matched = queries >= 0
        expected[0, image, queries[matched]] = people[matched]
    np.testing.assert_array_equal(assignment, expected)
    assert assignment.dtype == np.int32
    np.testing.assert_array_equal(on_device(cost, arrays["valid"]), expected)


def test_all_layers_in_one_call_equal_layer_by_layer():
    arrays, targets = golden("ml_main")
    logits = jnp.stack([jnp.asarray(arrays["logits"]) * scale for scale in (1.0, -0.5, 2.0)])
    boxes = jnp.stack([jnp.asarray(arrays["boxes"])] * 3)
    settings_of = {"config": MatcherConfig(), "multi_label": True}
    together = cost_of(logits, boxes, targets, **settings_of)
    for layer in range(3):
        np.testing.assert_allclose(
            together[layer], cost_of(logits[layer], boxes[layer], targets, **settings_of), atol=1e-6
        )
    assignment = assign_on_host(np.asarray(together), arrays["valid"])
    alone = assign_on_host(np.asarray(together[1:2]), arrays["valid"])
    np.testing.assert_array_equal(assignment[1:2], alone)


def test_an_unlabelled_person_adds_no_class_cost():
    arrays, targets = golden("mc_main")
    bare = Targets(boxes=targets.boxes, labels=jnp.zeros_like(targets.labels), valid=targets.valid)
    logits, boxes = jnp.asarray(arrays["logits"]), jnp.asarray(arrays["boxes"])
    cost = cost_of(logits, boxes, bare, config=MatcherConfig(), multi_label=False)
    without_class = cost_of(
        logits, boxes, targets, config=MatcherConfig(cost_class=0.0), multi_label=False
    )
    np.testing.assert_allclose(cost, without_class, atol=1e-6)


def test_a_cost_that_is_not_finite_names_layer_and_image():
    cost, valid = np.zeros((3, 2, 4, 5), np.float32), np.ones((2, 5), bool)
    valid[0, 4] = False
    cost[2, 1, 3, 0] = np.nan
    with pytest.raises(
        FloatingPointError, match=r"decoder layer 2, image 1 of the batch \(id 77\), is not finite"
    ):
        assign_on_host(cost, valid, image_ids=[5, 77])
    cost[2, 1, 3, 0] = 0
    cost[0, 0, 0, 4] = np.inf  # padding
    assert (assign_on_host(cost, valid) >= 0).sum() == 3 * 2 * 4


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2**31 - 1))
def test_assignment_is_one_to_one_complete_and_optimal(num_queries, num_targets, seed):
    rng = np.random.default_rng(seed)
    cost = rng.integers(-3, 4, (2, 1, num_queries, num_targets)).astype(
        np.float32
    )  # small integers: many ties
    valid = rng.random((1, num_targets)) < 0.7
    assignment = assign_on_host(cost, valid)
    people = np.flatnonzero(valid[0])
    for layer in range(2):
        queries = np.flatnonzero(assignment[layer, 0] >= 0)
        matched = assignment[layer, 0, queries]
        assert len(set(matched)) == len(matched) == min(num_queries, len(people))
        assert set(matched) <= set(people)
        size = len(matched)
        totals = [
            sum(cost[layer, 0, q, t] for q, t in zip(some_queries, some_people, strict=True))
            for some_queries in itertools.combinations(range(num_queries), size)
            for some_people in itertools.permutations(people, size)
        ]
        assert cost[layer, 0, queries, matched].sum() == min(totals)


@pytest.mark.parametrize(("num_queries", "num_targets"), [(9, 9), (4, 7), (30, 12), (5, 1), (3, 0)])
def test_the_device_assigns_exactly_as_the_host(num_queries, num_targets):
    rng = np.random.default_rng(num_queries)
    cost = rng.uniform(-4, 8, (6, 16, num_queries, num_targets)).astype(np.float32)
    valid = rng.random((16, num_targets)) < 0.6
    cost = np.where(valid[None, :, None], cost, np.float32(np.nan))  # meaningless where nobody is
    assignment = on_device(cost, valid)
    np.testing.assert_array_equal(assignment, assign_on_host(cost, valid))
    assert assignment.dtype == np.int32


def test_where_costs_tie_the_device_finds_an_optimum_too():
    rng = np.random.default_rng(0)
    cost = rng.integers(-3, 4, (40, 1, 4, 3)).astype(np.float32)
    valid = np.ones((1, 3), bool)
    totals = [
        np.where(found[..., None] == np.arange(3), cost, 0).sum((1, 2, 3))
        for found in (on_device(cost, valid), assign_on_host(cost, valid))
    ]
    np.testing.assert_array_equal(*totals)
    assert np.all((np.asarray(on_device(cost, valid)) >= 0).sum((1, 2)) == 3)
