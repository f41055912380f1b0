"""Branches of a set prediction (one-to-many, denoising, overlap) and objectives without a matching,
alone and inside a training step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsct_jax.batch import Batch, Branch, Hungarian, Known, Overlap, Predictions, Targets
from dsct_jax.model.build import Network
from dsct_jax.parallel import make_mesh, shard_batch
from dsct_jax.training import objective as objective_module
from dsct_jax.training.assignment import assign_by_overlap
from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig, StepConfig
from dsct_jax.training.losses import LossSums, count_boxes, loss_sums
from dsct_jax.training.matching import assign_on_host, matching_cost
from dsct_jax.training.objective import SetPrediction
from dsct_jax.training.step import initial_state, make_train_step

T, K = 3, 4
RULES = ((".*", 1.0),)


class Answer(nnx.Module):
    """A function as a network without values of its own."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments, **keywords):
        return self.function(*arguments, **keywords)


def make_batch(b: int = 8, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (b, 8, 8, 3), dtype=np.uint8)
    labels = np.eye(K, dtype=np.float32)[rng.integers(0, K, (b, T))]
    boxes = rng.uniform(0.2, 0.6, (b, T, 4)).astype(np.float32)
    valid = rng.random((b, T)) < 0.6
    valid[0] = False
    sizes = np.full((b, 2), 8, np.int32)
    targets = Targets(boxes, labels, valid)
    batch = Batch(images, sizes, targets, np.arange(b, dtype=np.int32), sizes, np.ones(b, bool))
    return jax.tree.map(jnp.asarray, batch)


def random_answer(q: int, b: int = 8, seed: int = 1) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((2, b, q, K + 1)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.uniform(0.2, 0.6, (2, b, q, 4)), jnp.float32)


def set_prediction(implementation: str = "scipy", *, multi_label: bool = False) -> SetPrediction:
    matcher = MatcherConfig(implementation=implementation)
    return SetPrediction(LossConfig(), matcher, multi_label=multi_label)


def sums_of(objective: SetPrediction, predictions: Predictions, batch: Batch) -> LossSums:
    """What a step computes on one device."""
    prepared = objective.prepare(predictions, batch)
    if objective.host_half:
        solved = objective.host_half(jax.tree.map(np.asarray, prepared))
        prepared = jax.tree.map(jnp.asarray, solved)
    return objective.loss_sums(predictions, batch, prepared, objective.totals(batch))


def plain_sums(logits, boxes, batch: Batch, assignment, *, repeats: int = 1) -> LossSums:
    """Of one branch without any rule: the assignment is given."""
    return loss_sums(
        logits,
        boxes,
        batch.targets,
        jnp.asarray(assignment, jnp.int32),
        counted=jnp.broadcast_to(batch.real[:, None], logits.shape[1:3]),
        num_boxes=repeats * count_boxes(batch.targets.valid),
        config=LossConfig(),
        multi_label=False,
    )


def matched(logits, boxes, targets: Targets) -> np.ndarray:
    cost = matching_cost(logits, boxes, targets, config=MatcherConfig(), multi_label=False)
    return assign_on_host(np.asarray(cost), np.asarray(targets.valid))


@pytest.mark.parametrize("implementation", ["scipy", "device"])
def test_a_network_without_branches_has_the_plain_losses(implementation):
    batch, (logits, boxes) = make_batch(), random_answer(4)
    expected = plain_sums(logits, boxes, batch, matched(logits, boxes, batch.targets))
    found = sums_of(set_prediction(implementation), Predictions(logits, boxes), batch)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("implementation", ["scipy", "device"])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_are_a_matching_with_targets_that_are_repeated(implementation, repeats):
    batch, (logits, boxes) = make_batch(), random_answer(7)
    copies = jax.tree.map(lambda x: jnp.concatenate([x] * repeats, axis=1), batch.targets)
    assignment = matched(logits, boxes, copies)
    assert (np.bincount(assignment[0, 1][assignment[0, 1] >= 0] % T).max()) == repeats
    answer = random_answer(4, seed=2)
    branch = Branch(logits, boxes, Hungarian(repeats), name="many")
    found = sums_of(
        set_prediction(implementation), Predictions(*answer, branches=(branch,)), batch
    ).terms
    # the copies are people too, so there are `repeats` times as many to divide by
    expected = plain_sums(logits, boxes, dataclasses.replace(batch, targets=copies), assignment)
    for name in ("loss_class", "loss_class/0", "loss_bbox", "loss_giou"):
        np.testing.assert_allclose(found[f"many/{name}"], expected.terms[name], rtol=1e-6)


def test_the_weight_of_a_branch_scales_what_it_adds_to_the_total():
    batch, answer, further = make_batch(), random_answer(4), random_answer(5, seed=3)
    objective, totals = set_prediction(), []
    for weight in (0.0, 1.0, 2.5):
        branches = (Branch(*further, Hungarian(), name="more", weight=weight),)
        sums = sums_of(objective, Predictions(*answer, branches=branches), batch)
        totals.append(float(sums.terms["total"]))
    alone = sums_of(objective, Predictions(*answer), batch)
    added = sums_of(objective, Predictions(*further), batch).terms["total"]
    assert totals[0] == alone.terms["total"]
    np.testing.assert_allclose(np.array(totals[1:]) - totals[0], [added, 2.5 * added], rtol=1e-5)
    # its terms are named, and what is measured is of the answer only
    assert {"more/loss_class", "more/loss_giou/0", "loss_class"} <= set(sums.terms)
    assert sums.ratios.keys() == alone.ratios.keys()


def test_known_queries_answer_for_the_people_that_they_were_made_of():
    batch, (logits, boxes) = make_batch(), random_answer(2 * T + 1)
    made_of = np.tile(np.r_[np.arange(T), np.arange(T), -1], (8, 1)).astype(np.int32)
    people = np.asarray(batch.targets.valid)
    valid = np.concatenate([people, people, np.zeros((8, 1), bool)], 1)
    branch = Branch(logits, boxes, Known(jnp.asarray(made_of), repeats=2), name="denoising")
    answer = random_answer(4, seed=2)

    def total(logits, boxes):
        changed = dataclasses.replace(branch, logits=logits, boxes=boxes)
        predictions = Predictions(*answer, branches=(changed,))
        sums = sums_of(set_prediction("device"), predictions, batch)
        return sums.terms["total"], sums.terms

    (_, terms), (by_logits, by_boxes) = jax.value_and_grad(total, (0, 1), has_aux=True)(
        logits, boxes
    )
    by_logits, by_boxes = np.asarray(by_logits), np.asarray(by_boxes)
    padding = (made_of >= 0) & ~valid
    assert padding.any() and valid.any()
    assert np.all(by_logits[:, padding] == 0) and np.all(by_boxes[:, padding] == 0)
    assert np.all(np.any(by_logits[:, ~padding] != 0, -1))  # nobody is an answer that is learned
    assert np.all(np.any(by_boxes[:, valid] != 0, -1)) and np.all(by_boxes[:, ~valid] == 0)
    hidden = jnp.where(padding[None, ..., None], -100.0, logits)
    expected = plain_sums(
        hidden, boxes, batch, np.broadcast_to(np.where(valid, made_of, -1), (2, 8, 7)), repeats=2
    )
    for name in ("loss_class", "loss_bbox/0", "loss_giou"):
        np.testing.assert_allclose(terms[f"denoising/{name}"], expected.terms[name], rtol=1e-6)


def test_overlap_gives_each_person_its_best_queries():
    boxes = np.array(
        [
            [0.30, 0.3, 0.2, 0.2],  # exactly person 0
            [0.31, 0.3, 0.2, 0.2],
            [0.32, 0.3, 0.2, 0.2],  # third best of person 0
            [0.75, 0.7, 0.2, 0.2],  # IoU 0.6 with person 1
            [0.80, 0.7, 0.2, 0.2],  # too little of person 1
            [0.10, 0.9, 0.1, 0.1],  # nobody
            [0.50, 0.1, 0.1, 0.1],  # little of person 2, but no box has more
        ],
        np.float32,
    )
    people = np.array([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.55, 0.1, 0.1, 0.1]]])
    targets = Targets(jnp.asarray(people, jnp.float32), jnp.ones((1, 3, K)), jnp.ones((1, 3), bool))
    rule = Overlap(jnp.asarray(boxes)[None], min_iou=0.55, repeats=2)
    found = assign_by_overlap(targets, rule).of_queries(7)
    np.testing.assert_array_equal(found[0], [0, 0, -1, 1, -1, -1, 2])
    absent = dataclasses.replace(targets, valid=jnp.array([[False, True, True]]))
    found = assign_by_overlap(absent, rule).of_queries(7)
    np.testing.assert_array_equal(found[0], [-1, -1, -1, 1, -1, -1, 2])
    nobody = jax.tree.map(lambda x: x[:, :0], targets)
    assert np.all(assign_by_overlap(nobody, rule).of_queries(7) == -1)
    few = dataclasses.replace(rule, max_positives=2)  # of the five
    assert np.sum(assign_by_overlap(targets, few).of_queries(7) >= 0) == 2


@pytest.mark.parametrize("multi_label", [False, True])
def test_filler_images_count_in_nothing(multi_label):
    whole, image = make_batch(8), jnp.arange(8)
    people = dataclasses.replace(whole.targets, valid=whole.targets.valid & (image < 5)[:, None])
    whole = dataclasses.replace(whole, targets=people, real=image < 5)
    logits, boxes = random_answer(4)
    real = jax.tree.map(lambda x: x[:5], whole)
    objective = set_prediction(multi_label=multi_label)
    found = sums_of(objective, Predictions(logits, boxes), whole).compute()
    expected = sums_of(objective, Predictions(logits[:, :5], boxes[:, :5]), real).compute()
    assert found.keys() == expected.keys() and "cardinality_error/0" in found
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


class ToyNetwork(Network):
    """A linear layer each for an answer, a one-to-many and a denoising branch."""

    def __init__(self):
        pass  # there is no module behind it

    def init(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        shapes = {"answer/w": (3, 2 * 4 * (K + 5)), "many/w": (3, 2 * 7 * (K + 5))}
        shapes["denoising/w"] = (K + 4, K + 5)
        return {
            path: 0.3 * rng.standard_normal(shape).astype(np.float32)
            for path, shape in shapes.items()
        }

    def bind(self, params, norm_stats):
        del norm_stats

        def split(x):
            return x[..., : K + 1], jax.nn.sigmoid(x[..., K + 1 :])

        def network(images, padding_mask, *, people=None, noise=None):
            assert people is not None and noise is not None
            features = images.mean((1, 2))
            answer, many = (
                (features @ params[f"{name}/w"]).reshape(-1, 2, q, K + 5).swapaxes(0, 1)
                for name, q in (("answer", 4), ("many", 7))
            )
            seen = jnp.concatenate([people.labels, people.boxes], -1)
            seen = jnp.concatenate([seen, seen, jnp.zeros_like(seen[:, :1])], 1)
            denoised = jnp.stack([seen @ params["denoising/w"]] * 2)
            made_of = jnp.tile(jnp.array([*range(T), *range(T), -1], jnp.int32), (len(seen), 1))
            return Predictions(
                *split(answer),
                branches=(
                    Branch(*split(many), Hungarian(repeats=2), name="many", weight=0.5),
                    Branch(*split(denoised), Known(made_of, repeats=2), name="denoising"),
                ),
            )

        return Answer(network)


def train(network, objective, *, devices: int = 1, **options):
    """Three steps: (metrics of each, parameters, the step)."""
    mesh, step_config = make_mesh(jax.devices()[:devices]), StepConfig(**options)
    optimizer, state = initial_state(
        network.init(),
        {},
        OptimizerConfig(learning_rate=1e-2, rules=RULES),
        total_steps=10,
        mesh=mesh,
        step_config=step_config,
    )
    step = make_train_step(
        network, optimizer, objective=objective, mesh=mesh, seed=0, step_config=step_config
    )
    metrics = []
    for i in range(3):
        state, terms = step(state, shard_batch(make_batch(16, i), mesh))
        metrics.append(jax.device_get(terms))
    return metrics, jax.device_get(state.params), step


def test_all_branches_are_matched_in_one_host_call(monkeypatch):
    calls = []

    def counted(problem):
        calls.append(problem)
        return problem.solve(assign_on_host)

    monkeypatch.setattr(objective_module, "match_on_host", counted)
    metrics, params, _ = train(ToyNetwork(), set_prediction())
    assert len(calls) == 3  # one per step
    assert [None if cost is None else cost.shape for cost in calls[0].costs] == [
        (2, 16, 4, T),
        (2, 16, 7, T),
        None,
    ]
    assert {"loss_class", "many/loss_bbox/0", "denoising/loss_giou", "num_boxes"} <= set(metrics[0])
    start = ToyNetwork().init()
    assert all(np.any(params[path] != start[path]) for path in start)


def test_branches_train_the_same_however_the_batch_is_spread_or_matched():
    expected, params, _ = train(ToyNetwork(), set_prediction())
    for objective, options in (
        (set_prediction(), {"devices": 8}),
        (set_prediction(), {"devices": 2, "accumulate": 4}),
        (set_prediction("device"), {"devices": 2, "accumulate": 2}),
    ):
        metrics, other, _ = train(ToyNetwork(), objective, **options)
        for step, terms in enumerate(expected):
            assert metrics[step].keys() == terms.keys()
            for name, value in terms.items():
                np.testing.assert_allclose(
                    metrics[step][name], value, rtol=2e-5, atol=1e-6, err_msg=name
                )
        for path, value in params.items():
            np.testing.assert_allclose(other[path], value, rtol=0, atol=1e-5, err_msg=path)


class MeanLabels:
    """An objective without matching: the mean of what is predicted is the mean of the labels."""

    host_half = None

    def totals(self, batch):
        return {"num_images": batch.real.sum().astype(jnp.float32)}

    def prepare(self, predictions, batch):
        del predictions, batch

    def loss_sums(self, predictions, batch, prepared, totals):
        assert prepared is None
        error = predictions["labels"] - batch.targets.labels.mean(1)
        loss = jnp.square(error).sum() / totals["num_images"]
        return LossSums({"total": loss, "loss_labels": loss})


class LabelNetwork(Network):
    """Predicts how often each label occurs in an image."""

    def __init__(self):
        pass

    def init(self):
        return {"w": np.zeros((3, K), np.float32)}

    def bind(self, params, norm_stats):
        return Answer(
            lambda images, mask, *, people, noise: {
                "labels": images.mean((1, 2)) @ params["w"],
                "shape": jnp.arange(4),
            }
        )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_objective_without_matching_is_one_program(accumulate, monkeypatch):
    def never(*arguments):
        raise AssertionError("the host has no part in this step")

    monkeypatch.setattr("dsct_jax.training.step.run_on_host", never)
    metrics, _, step = train(LabelNetwork(), MeanLabels(), devices=2, accumulate=accumulate)
    assert step.first_half._cache_size() == 0
    assert (step.second_half._cache_size() > 0) == (accumulate == 1)
    assert set(metrics[0]) == {
        "total", "loss_labels", "num_images", "grad_norm", "grad_norm/w", "nonfinite",
    }  # fmt: skip
    assert metrics[0]["num_images"] == 16 and metrics[0]["nonfinite"] == 0
    one, _, _ = train(LabelNetwork(), MeanLabels())
    np.testing.assert_allclose([m["total"] for m in metrics], [m["total"] for m in one], rtol=1e-5)
