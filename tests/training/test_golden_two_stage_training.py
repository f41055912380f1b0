"""Training of the two-stage networks against their code: losses and their gradients, one step's
statistics, and trajectories (tests/golden/two_stage; sizes are read from the files).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsct_jax.batch import Batch, Predictions, Targets
from dsct_jax.config import dataclass_from_dict
from dsct_jax.model.build import Network, moving_statistics, network_config
from dsct_jax.model.layers import DropoutNoise
from dsct_jax.parallel import make_mesh, shard_batch
from dsct_jax.training.classification import Classification, class_weights, rating_losses
from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig
from dsct_jax.training.step import initial_state, make_train_step
from dsct_jax.weights.rules import to_torch
from tests.model.test_golden_two_stage import (
    Case,
    caer_case,
    close,
    emo_case,
    glamor_case,
    golden_file,
)

__all__ = ["golden_file"]  # a fixture
# gradients of biases in front of a norm are zero but for rounding
GRADIENT = {"rtol": 1e-3, "atol": 1e-4}


def batch_of(arrays, contexts: str, subjects: str, labels: np.ndarray) -> Batch:
    b = len(labels)
    ratings = arrays.get("labels_vad")
    targets = Targets(
        np.full((b, 1, 4), 0.5, np.float32),
        labels[:, None].astype(np.float32),
        np.ones((b, 1), bool),
        None if ratings is None else ratings[:, None],
    )
    images = arrays[contexts]
    sizes = np.full((b, 2), images.shape[1], np.int32)
    ids, real = np.arange(b, dtype=np.int32), np.ones(b, bool)
    return Batch(images, sizes, targets, ids, sizes, real, arrays[subjects])


def without_dropout(case: Case) -> Network:
    section = {**case.config["model"], "dropout": 0.0}
    fields = ("widths", "hidden_dim", "encoder", "ratings", "fusion")
    section |= {name: getattr(case.network.config, name) for name in fields}
    return Network(network_config(section, case.classes))


def objective_of(case: Case, multi_label: bool) -> Classification:
    loss = dataclass_from_dict(LossConfig, "loss", case.config["loss"])
    return Classification(loss, MatcherConfig(), multi_label)


def gradients(network, objective, case, batch):
    """(terms, gradients by our path, moved statistics) of step 0."""

    @jax.jit
    def run(params, norm_stats, batch):
        def total(params):
            bound = network.bind(params, norm_stats)
            noise = DropoutNoise(jax.random.split(jax.random.key(0), len(batch.real)))
            answer = bound(*network.inputs(batch), people=batch.targets, noise=noise)
            totals = objective.totals(batch)
            sums = objective.loss_sums(answer, batch, None, totals)
            return sums.terms["total"], (sums.terms, answer, totals, moving_statistics(bound))

        return jax.grad(total, has_aux=True)(params)

    grads, aux = jax.device_get(run(case.params, case.norm_stats, batch))
    return grads, *aux


def norms(values, layout) -> dict[str, float]:
    named = to_torch(values, layout=layout)
    return {name: float(np.linalg.norm(x.astype(np.float64))) for name, x in named.items()}


def trajectory(network, case, objective, batch, optimizer: OptimizerConfig, steps: int):
    """Losses, gradient norms and final state of `steps` steps on one device."""
    mesh = make_mesh(jax.devices()[:1])
    values = jax.device_get((case.params, case.norm_stats))
    made, state = initial_state(*values, optimizer, total_steps=steps, mesh=mesh)
    step = make_train_step(network, made, objective=objective, mesh=mesh, seed=0)
    found = []
    for _ in range(steps):
        state, metrics = step(state, shard_batch(batch, mesh))
        found.append(jax.device_get(metrics))
    return found, jax.device_get(state)


CASES = {
    "glamor_original": (glamor_case, "faces_u8", (1e-3, 3e-3)),
    "caer_net_s": (caer_case, "faces_u8", (1e-3, 1e-3)),
}


def prepare(golden_file, name):
    make, subjects, later = CASES[name]
    case = make(arrays := golden_file(name))
    labels = np.eye(case.classes)[arrays["labels"]]
    batch = batch_of(arrays, "train/contexts_u8", subjects, labels)
    return case, arrays, without_dropout(case), objective_of(case, multi_label=False), batch, later


@pytest.mark.parametrize("name", CASES)
def test_golden_first_step(golden_file, name):
    case, arrays, network, objective, batch, _ = prepare(golden_file, name)
    grads, terms, _, _, statistics = gradients(network, objective, case, batch)
    assert terms["loss_class"] == pytest.approx(arrays["train/losses"][0], rel=1e-6)
    found = norms(grads, case.layout)
    stored = zip(arrays["train/names"].tolist(), arrays["train/grad_norm_by_tensor"], strict=True)
    for tensor, value in stored:
        np.testing.assert_allclose(found[tensor], value, err_msg=tensor, **GRADIENT)
    named = to_torch(grads, layout=case.layout)
    for tensor, value in stored_under(arrays, "train/grad_step0/"):
        scale = max(np.abs(value).max(), 1e-1)
        close(named[tensor], value, 1e-3 * scale)
    moved = to_torch(statistics, layout=case.layout)
    for tensor, value in stored_under(arrays, "train/after_step0/"):
        close(moved[tensor], value, 1e-6 * max(1, np.abs(value).max()))


def stored_under(arrays, prefix: str) -> list[tuple[str, np.ndarray]]:
    found = [(key.removeprefix(prefix), x) for key, x in arrays.items() if key.startswith(prefix)]
    assert found, f"nothing is stored under {prefix}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_golden_trajectory(golden_file, name):
    case, arrays, network, objective, batch, later = prepare(golden_file, name)
    rates = arrays["train/learning_rates"]
    drop = int(np.argmax(rates < rates[0])) / len(rates)
    section = case.config["optimizer"] | {"learning_rate": float(rates[0]), "drop_at": drop}
    section |= {"momentum": float(arrays["train/momentum"])}
    section |= {"lowest_rate": 0.0, "drop_again_at": ()}
    optimizer = dataclass_from_dict(OptimizerConfig, "optimizer", section)
    made, state = trajectory(network, case, objective, batch, optimizer, len(rates))
    for i, (metrics, loss) in enumerate(zip(made, arrays["train/losses"], strict=True)):
        tolerance = 1e-6 if i == 0 else later[0] if i < 5 else later[1]
        assert metrics["loss_class"] == pytest.approx(loss, rel=tolerance), i
    assert made[0]["grad_norm"] == pytest.approx(arrays["train/grad_norms"][0], rel=1e-3)
    final = to_torch(state.params | state.norm_stats, layout=case.layout)
    updates = zip(arrays["train/names"].tolist(), arrays["train/final_update_norm"], strict=True)
    for tensor, value in updates:
        moved_by = np.linalg.norm((final[tensor] - case.state[tensor]).astype(np.float64))
        assert moved_by == pytest.approx(value, rel=2e-2, abs=1e-4), tensor
    for tensor, value in stored_under(arrays, "train/final/"):
        np.testing.assert_allclose(final[tensor], value, rtol=2e-2, atol=2e-3)


def test_golden_emo_net_step(golden_file):
    case = emo_case(arrays := golden_file("emo_net_resnet18"), "emo_net_resnet18")
    network, objective = without_dropout(case), objective_of(case, multi_label=True)
    batch = batch_of(arrays, "contexts_u8", "bodies_u8", arrays["labels_cat"])
    grads, terms, answer, totals, statistics = gradients(network, objective, case, batch)
    close(answer.logits[0, :, 0, :-1], arrays["train/logits_cat_step0"], 1e-4)
    close(answer.ratings, arrays["train/vad_step0"], 1e-4)
    close(totals["class_weights"], arrays["train/class_weights_step0"][0], 1e-6)
    discrete, continuous, total, norm = arrays["train/loss_terms"][0]
    assert terms["loss_class"] == pytest.approx(discrete, rel=1e-5)
    assert terms["loss_ratings"] == pytest.approx(continuous, rel=1e-5)
    assert terms["total"] == pytest.approx(total, rel=1e-5)
    found = math.sqrt(sum(float(np.square(x.astype(np.float64)).sum()) for x in grads.values()))
    assert found == pytest.approx(norm, rel=1e-4)
    moved = to_torch(statistics, layout=case.layout)
    for name, value in stored_under(arrays, "train/after_step0/"):
        np.testing.assert_allclose(moved[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("weights", ["mean", "static", "dynamic"])
def test_golden_discrete_losses(golden_file, weights):
    arrays = golden_file("emo_losses")
    for name in sorted({key.split("/")[0] for key in arrays}):
        part = {k.split("/")[1]: x for k, x in arrays.items() if k.startswith(f"{name}/")}
        static = tuple(map(float, part["weights_static"][0]))
        config = LossConfig(class_loss="squared", squared_weights=weights, class_weights=static)
        labels, scores = part["labels_cat"], jnp.asarray(part["pred_cat"])
        found = class_weights(jnp.asarray(labels), config)
        np.testing.assert_allclose(found, part[f"weights_{weights}"][0], rtol=1e-6)
        b = len(labels)
        batch = batch_of(
            {"i": np.zeros((b, 4, 4, 3), np.uint8), "s": np.zeros((b, 4, 4, 3), np.uint8)},
            *("i", "s", labels),
        )
        objective = Classification(config, MatcherConfig(), multi_label=True)

        def loss(scores, objective=objective, batch=batch):
            padded = jnp.concatenate([scores, scores[:, :1]], -1)[None, :, None]
            answer = jax.tree.map(jnp.asarray, batch)
            predictions = Predictions(padded, jnp.zeros((1, len(scores), 1, 4)))
            sums = objective.loss_sums(predictions, answer, None, objective.totals(answer))
            return sums.terms["loss_class"]

        value, grad = jax.value_and_grad(loss)(scores)
        np.testing.assert_allclose(value, part[f"discrete_{weights}"], rtol=2e-6)
        np.testing.assert_allclose(grad, part[f"discrete_{weights}_grad"], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["l2", "smooth_l1"])
def test_golden_continuous_losses(golden_file, kind):
    arrays = golden_file("emo_losses")
    for name in sorted({key.split("/")[0] for key in arrays}):
        part = {k.split("/")[1]: x for k, x in arrays.items() if k.startswith(f"{name}/")}
        targets = jnp.asarray(part["labels_vad"])
        value, grad = jax.value_and_grad(lambda x, t=targets: rating_losses(x, t, kind).sum())(
            jnp.asarray(part["pred_vad"])
        )
        np.testing.assert_allclose(value, part[f"continuous_{kind}"], rtol=2e-6)
        np.testing.assert_allclose(grad, part[f"continuous_{kind}_grad"], rtol=2e-5, atol=1e-5)


def test_an_unknown_rating_costs_nothing():
    targets = jnp.array([[0.1, jnp.nan, 0.3]])
    value, grad = jax.value_and_grad(lambda x: rating_losses(x, targets, "smooth_l1").sum())(
        jnp.array([[0.2, 0.9, 0.3]])
    )
    np.testing.assert_allclose((value, *grad[0]), (0.5, 10, 0, 0), atol=1e-5)
