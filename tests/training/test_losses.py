"""Every loss term and its gradient against the released SetCriterion, and the cases that it does
not have.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsct_jax.batch import Targets
from dsct_jax.errors import UserError
from dsct_jax.training.config import LossConfig, MatcherConfig
from dsct_jax.training.losses import count_boxes, loss_sums, sigmoid_focal_loss
from dsct_jax.training.matching import assign_on_host, matching_cost

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "criterion.npz")
CASES = [
    f"{kind}_{case}"
    for kind in ("emotic", "caer")
    for case in ("main", "zero", "allzero", "toomany")
]
OPTIMISED = {"xla_backend_optimization_level": 3}
CONFIGS = {True: LossConfig(weight_class=5.0), False: LossConfig(weight_class=9.0)}


def golden(case):
    """The stored arrays of one case, its targets (class numbers as one-hot labels) and whether it
    is multi-label.
    """
    arrays = {
        name.split("/")[1]: GOLDEN[name] for name in GOLDEN.files if name.startswith(case + "/")
    }
    multi_label = case.startswith("emotic")
    labels = (
        arrays["tgt_labels"]
        if multi_label
        else np.eye(7)[arrays["tgt_labels"]] * arrays["valid"][..., None]
    )
    targets = Targets(
        boxes=jnp.asarray(arrays["tgt_boxes"]),
        labels=jnp.asarray(labels, jnp.float32),
        valid=jnp.asarray(arrays["valid"]),
    )
    return arrays, targets, multi_label


def total(logits, boxes, targets, assignment, config, multi_label):
    """What a training step differentiates."""
    losses = loss_sums(
        logits,
        boxes,
        targets,
        assignment,
        counted=jnp.ones(logits.shape[1:3], bool),
        num_boxes=count_boxes(targets.valid),
        config=config,
        multi_label=multi_label,
    ).compute()
    return losses["total"], losses


value_and_grad = jax.jit(
    jax.value_and_grad(total, argnums=(0, 1), has_aux=True), static_argnums=(4, 5)
)


@pytest.mark.parametrize("case", CASES)
def test_terms_total_and_gradients_equal_the_released_criterion(case):
    arrays, targets, multi_label = golden(case)
    logits, boxes = jnp.asarray(arrays["all_logits"]), jnp.asarray(arrays["all_boxes"])
    (_, losses), gradients = value_and_grad(
        logits,
        boxes,
        targets,
        jnp.asarray(arrays["assignment"], jnp.int32),
        CONFIGS[multi_label],
        multi_label,
    )

    released_names = {
        "class_error",
        "total",
        *(n for n in arrays if n.startswith(("loss_", "cardinality"))),
    }
    for name in released_names:
        ours = name.replace("loss_ce", "loss_class").replace("_0", "/0").replace("_1", "/1")
        np.testing.assert_allclose(losses[ours], arrays[name], rtol=2e-6, atol=0, err_msg=name)
    assert set(losses) - {"matched_iou"} == {
        n.replace("loss_ce", "loss_class").replace("_0", "/0").replace("_1", "/1")
        for n in released_names
    }
    for ours, name in zip(gradients, ("grad_logits", "grad_boxes"), strict=True):
        np.testing.assert_allclose(ours, arrays[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_our_matcher_finds_the_assignment_that_the_loss_was_computed_with(case):
    arrays, targets, multi_label = golden(case)
    cost = matching_cost(
        jnp.asarray(arrays["all_logits"]),
        jnp.asarray(arrays["all_boxes"]),
        targets,
        config=MatcherConfig(),
        multi_label=multi_label,
    )
    np.testing.assert_array_equal(
        assign_on_host(np.asarray(cost), arrays["valid"]), arrays["assignment"]
    )


def test_num_boxes_counts_people_that_no_query_is_left_for_and_never_is_zero():
    assert (
        count_boxes(jnp.asarray(golden("emotic_toomany")[0]["valid"])) == 7
    )  # 6 people for 4 queries, and 1
    assert count_boxes(jnp.zeros((2, 3), bool)) == 1


def run(case="emotic_main", config=None, **changes):
    arrays, targets, multi_label = golden(case)
    targets = Targets(
        **{"boxes": targets.boxes, "labels": targets.labels, "valid": targets.valid} | changes
    )
    logits, boxes = jnp.asarray(arrays["all_logits"]), jnp.asarray(arrays["all_boxes"])
    assignment = jnp.asarray(arrays["assignment"], jnp.int32)
    (_, losses), gradients = value_and_grad(
        logits, boxes, targets, assignment, config or CONFIGS[multi_label], multi_label
    )
    return losses, gradients, arrays


@pytest.mark.parametrize(("case", "classes"), [("emotic_main", 27), ("caer_main", 7)])
def test_paper_normalization_is_a_mean_over_the_classes_of_the_loss(case, classes):
    weight = 5.0 if classes == 27 else 9.0
    released, paper = (
        run(case)[0],
        run(case, LossConfig(weight_class=weight, focal_normalization="paper"))[0],
    )
    for name in ("loss_class", "loss_class/0", "loss_class/1"):
        np.testing.assert_allclose(paper[name] * classes, released[name], rtol=1e-6)
    np.testing.assert_allclose(paper["loss_bbox"], released["loss_bbox"], rtol=1e-6)


@pytest.mark.parametrize("case", ["emotic_main", "caer_main"])
def test_a_person_without_labels_trains_the_box_and_the_subject_but_no_emotion(case):
    arrays, targets, multi_label = golden(case)
    losses, (grad_logits, grad_boxes), _ = run(case, labels=targets.labels.at[0, 0].set(0))
    _, (reference_logits, reference_boxes), _ = run(case)
    bare = arrays["assignment"][:, 0] == 0
    assert bare.sum() == 3
    assert np.all(np.asarray(grad_logits)[:, 0][bare][:, :-1] == 0)
    assert np.array_equal(
        np.asarray(grad_logits)[:, 0][~bare], np.asarray(reference_logits)[:, 0][~bare]
    )
    assert np.array_equal(np.asarray(grad_logits)[..., -1], np.asarray(reference_logits)[..., -1])
    assert np.any(np.asarray(grad_logits)[:, 0][bare][:, -1] != 0) == multi_label
    assert np.array_equal(grad_boxes, reference_boxes)
    assert np.isfinite(losses["total"])


def test_class_weights_scale_both_sides_of_their_class():
    weights = (1.0, 0.0, 2.5, 1.0, 1.0, 1.0, 1.0)
    gradient = run("caer_main", LossConfig(weight_class=9.0, class_weights=weights))[1][0]
    reference = run("caer_main")[1][0]
    np.testing.assert_allclose(
        gradient[..., :7], reference[..., :7] * jnp.asarray(weights).reshape(1, 1, 1, 7), rtol=1e-6
    )
    with pytest.raises(UserError, match="class_weights has 2 values for 7 classes"):
        run("caer_main", LossConfig(class_weights=(1.0, 2.0)))


def test_softmax_loss_is_cross_entropy_of_the_matched_and_subject_focal_of_all():
    smoothing, weights = 0.1, (1.0, 2.0, 1.0, 0.5, 1.0, 3.0, 1.0)
    losses, (grad_logits, _), arrays = run(
        "caer_main",
        LossConfig(class_loss="softmax", label_smoothing=smoothing, class_weights=weights),
    )
    logits, assignment = arrays["all_logits"][-1].astype(np.float64), arrays["assignment"][-1]
    log_p = logits[..., :7] - np.log(np.exp(logits[..., :7]).sum(-1, keepdims=True))
    expected = 0.0
    for image, query in np.argwhere(assignment >= 0):
        label = arrays["tgt_labels"][image, assignment[image, query]]
        goal = np.full(7, smoothing / 7) + np.eye(7)[label] * (1 - smoothing)
        expected -= weights[label] * (goal * log_p[image, query]).sum()
    p = 1 / (1 + np.exp(-logits[..., 7]))
    found = assignment >= 0
    expected += np.where(
        found, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p)
    ).sum()
    np.testing.assert_allclose(losses["loss_class"], expected / arrays["valid"].sum(), rtol=2e-6)
    unmatched = arrays["assignment"] < 0
    assert np.all(np.asarray(grad_logits)[unmatched][:, :7] == 0)
    assert np.all(np.asarray(grad_logits)[..., 7] != 0)


def test_logit_adjustment_is_the_loss_of_logits_with_the_shares_added():
    shares = (0.5, 0.25, 0.1, 0.1, 0.05, 0.0, 0.0)
    plain, adjusted = (
        LossConfig(class_loss="softmax", **more)
        for more in ({}, {"logit_adjustment": 0.5, "class_shares": shares})
    )
    added = 0.5 * np.log(np.maximum(shares, 1e-4)).astype(np.float32)
    losses, _, arrays = run("caer_main", adjusted)
    (_, expected), _ = value_and_grad(
        jnp.asarray(arrays["all_logits"] + np.append(added, np.float32(0))),
        jnp.asarray(arrays["all_boxes"]),
        golden("caer_main")[1],
        jnp.asarray(arrays["assignment"], jnp.int32),
        *(plain, False),
    )
    np.testing.assert_allclose(losses["loss_class"], expected["loss_class"], rtol=2e-6)
    with pytest.raises(UserError, match=r"logit_adjustment=0.5 .*class_loss='softmax'"):
        LossConfig(logit_adjustment=0.5)
    with pytest.raises(UserError, match="class_shares has 2 values for 7 classes"):
        run("caer_main", LossConfig(class_shares=(0.5, 0.5)))


def test_label_smoothing_moves_only_the_matched_queries():
    configs = (LossConfig(label_smoothing=0.2), LossConfig())
    gradient, reference = (np.asarray(run("emotic_main", config)[1][0]) for config in configs)
    matched = golden("emotic_main")[0]["assignment"] >= 0
    # Two programs, in which the compiler may round the same sum differently.
    np.testing.assert_allclose(gradient[~matched], reference[~matched], rtol=1e-6)
    np.testing.assert_allclose(gradient[..., -1], reference[..., -1], rtol=1e-6)
    assert np.abs((gradient - reference)[matched]).max() > 1e-3


def test_matched_iou_of_exact_boxes_is_one():
    arrays, targets, _ = golden("emotic_main")
    assignment = jnp.asarray(arrays["assignment"], jnp.int32)
    boxes = jnp.take_along_axis(targets.boxes[None], jnp.maximum(assignment, 0)[..., None], axis=2)
    (_, losses), (_, gradient) = value_and_grad(
        jnp.asarray(arrays["all_logits"]), boxes, targets, assignment, CONFIGS[True], True
    )
    np.testing.assert_allclose(losses["matched_iou"], 1, rtol=1e-6)
    np.testing.assert_allclose([losses["loss_bbox"], losses["loss_giou"]], 0, atol=1e-6)
    assert np.all(np.isfinite(gradient))


def test_a_batch_that_cannot_hold_anyone():
    targets = Targets(
        boxes=jnp.zeros((2, 0, 4)), labels=jnp.zeros((2, 0, 26)), valid=jnp.zeros((2, 0), bool)
    )
    logits, boxes = jnp.zeros((2, 2, 4, 27)), jnp.full((2, 2, 4, 4), 0.5)
    # Compiled as users compile: without optimisation (tests/conftest.py) the 216 equal summands of
    # a layer are added one by one.
    optimised = jax.jit(
        jax.value_and_grad(total, argnums=(0, 1), has_aux=True),
        static_argnums=(4, 5),
        compiler_options=OPTIMISED,
    )
    (value, losses), gradients = optimised(
        logits, boxes, targets, jnp.full((2, 2, 4), -1), CONFIGS[True], True
    )
    np.testing.assert_allclose(value, 5 * 2 * (2 * 4 * 27 * 0.75 * 0.25 * np.log(2)), rtol=1e-6)
    assert losses["loss_bbox"] == losses["loss_giou"] == losses["matched_iou"] == 0
    assert np.all(gradients[1] == 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_loss": "hinge"},
        {"focal_normalization": "none"},
        {"focal_alpha": -1.0},
        {"label_smoothing": 1.0},
    ],
)
def test_a_wrong_setting_is_named(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        LossConfig(**changes)
    with pytest.raises(UserError, match="class_loss='softmax' needs multi_label=False"):
        run("emotic_main", LossConfig(class_loss="softmax"))


@settings(deadline=None, max_examples=50)
@given(
    st.floats(-200, 200, width=32),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]),
)
def test_focal_loss_is_finite_and_exact_for_any_logit(x, target, gamma):
    value, gradient = jax.value_and_grad(
        lambda x: sigmoid_focal_loss(x, jnp.float32(target), gamma=gamma)
    )(jnp.float32(x))
    log_p, log_not_p = -np.logaddexp(0, -np.float64(x)), -np.logaddexp(0, np.float64(x))
    expected = (
        -target * 0.25 * np.exp(gamma * log_not_p) * log_p
        - (1 - target) * 0.75 * np.exp(gamma * log_p) * log_not_p
    )
    np.testing.assert_allclose(value, expected, rtol=3e-5 if gamma else 2e-6, atol=1e-37)
    assert np.isfinite(gradient)
