"""The DETR family against its authors' code: predictions, references, assignments, losses and all
gradients, from feature maps on (tests/golden/detr; sizes are read from the files).
"""

import dataclasses
import json
import re
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsct_jax.batch import Batch, Targets
from dsct_jax.model import backbone
from dsct_jax.model.build import Network, network_config
from dsct_jax.model.layers import DropoutNoise
from dsct_jax.training.config import LossConfig, MatcherConfig
from dsct_jax.training.objective import SetPrediction, match_on_host
from dsct_jax.weights.layouts import EXPORTS, detect_layout
from dsct_jax.weights.rules import from_torch, to_torch


@dataclasses.dataclass
class Case:
    """Which network a file is of, and how close we come to it."""

    network: str
    tolerance: float  # of logits and boxes, absolute
    # our field -> its name in the file, or its value
    model: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    # prefix of their losses -> our branch
    branches: dict[str, str] = field(default_factory=dict)
    # names whose gradient is zero in theory, so that the stored one is rounding
    zero: re.Pattern[str] = re.compile("(?!)")


# The first layer's values are all the same, whatever its self-attention looks at.
FIRST_LOOK = re.compile(
    r"transformer\.decoder\.layers\.0\.sa_[qk](content|pos)_proj\.(weight|bias)"
)
IDEA = {"giou_epsilon": 1e-6}
CASES = {
    "detr": Case("detr", 5e-6, loss={"class_loss": "no_object"}),
    "conditional": Case("conditional_detr", 5e-6, zero=FIRST_LOOK),
    "dab": Case("dab_detr", 5e-6, {"temperature": "pe_temperatureH"}, IDEA, zero=FIRST_LOOK),
    "dn": Case(
        "dab_detr",
        5e-6,
        {
            "temperature": "pe_temperatureH",
            "denoising_groups": "scalar",
            "label_noise": "label_noise_scale",
            "box_noise": "box_noise_scale",
        },
        IDEA,
        {"tgt_": "denoising/"},
    ),
    "anchor": Case(
        "anchor_detr",
        5e-6,
        {"num_queries": "num_query_position", "num_patterns": "num_query_pattern"},
    ),
}
COMMON = {
    "hidden_dim": "hidden_dim",
    "num_heads": "nheads",
    "feedforward_dim": "dim_feedforward",
    "num_encoder_layers": "enc_layers",
    "num_decoder_layers": "dec_layers",
    "num_queries": "num_queries",
}


class Replay(DropoutNoise):
    """The stored draws, in the order in which they are asked for."""

    def __init__(self, *draws: np.ndarray):
        self._draws = list(draws)

    def uniform(self, shape):
        return jnp.asarray(self._draws.pop(0).reshape(shape), jnp.float32)


@dataclasses.dataclass
class Run:
    """One file, and what we make of it."""

    case: Case
    arrays: dict[str, np.ndarray]
    settings: dict[str, Any]
    network: Network
    params: dict[str, Any]
    norm_stats: dict[str, Any]
    batch: Batch
    predictions: Any = None
    prepared: list[Any] | None = None
    losses: dict[str, Any] | None = None
    gradients: dict[str, np.ndarray] | None = None  # of parameters, by their names
    feature_gradients: Any = None

    def features(self) -> list[jax.Array]:
        maps = [self.arrays[name] for name in sorted(self.arrays) if name.startswith("in/feat")]
        return [jnp.asarray(x.astype(np.float32).transpose(0, 2, 3, 1)) for x in maps]

    def forward(self, params, features, **how):
        network = self.network.bind(params, self.norm_stats)
        mask = jnp.asarray(self.arrays["in/mask"])
        return network.detect(network.project(features), mask, **how)


def stored_state(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("state/"): x.astype(np.float32)
        for name, x in arrays.items()
        if name.startswith("state/")
    }


def targets_of(arrays: dict[str, np.ndarray], num_classes: int) -> Targets:
    labels = arrays["in/target_labels"]
    valid = np.arange(labels.shape[1]) < arrays["in/num_targets"][:, None]
    one_hot = (labels[..., None] == np.arange(num_classes)).astype(np.float32)
    return Targets(jnp.asarray(arrays["in/target_boxes"]), jnp.asarray(one_hot), jnp.asarray(valid))


def replay(arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> Replay | None:
    """Their draws are one after another, ours one per slot."""
    if "dn/rand_label" not in arrays:
        return None
    labels, b = arrays["in/target_labels"], len(arrays["in/num_targets"])
    image, slot = arrays["dn/batch_idx"], arrays["dn/map_known_indice"]
    k, slots = settings["num_classes"], int(arrays["dn/pad_size"])
    chosen, places, boxes = np.ones((b, slots)), np.zeros((b, slots)), np.zeros((b, slots, 4))
    chosen[image, slot] = arrays["dn/rand_label"]
    noisy = np.flatnonzero(arrays["dn/rand_label"] < settings["label_noise_scale"])
    assert len(noisy) == len(arrays["dn/new_label"])
    old = labels[image[noisy], slot[noisy] % labels.shape[1]]
    places[image[noisy], slot[noisy]] = ((arrays["dn/new_label"] - old) % k + 0.5) / k
    boxes[image, slot] = arrays["dn/rand_box"]
    return Replay(chosen, places, boxes)


def weights_of(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    weights = dict(zip(arrays["loss/names"].tolist(), arrays["loss/weights"].tolist(), strict=True))
    names = {"class": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou"}
    return {f"weight_{ours}": weights[theirs] for ours, theirs in names.items()}


@pytest.fixture(scope="module", params=list(CASES))
def run(request) -> Run:
    case = CASES[request.param]
    folder = request.config.getoption("--golden-detr")
    with np.load(folder / f"{request.param}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    settings = json.loads(str(arrays["config"]))
    named = COMMON | case.model
    model = {ours: settings[x] if isinstance(x, str) else x for ours, x in named.items()}
    k = settings["num_classes"]
    channels = (1, 1, *settings["channels"])[-3:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone.ResNetConfig, "channels", channels)
        network = Network(
            network_config({"name": case.network, "backbone": "tiny", "remat": "none", **model}, k)
        )
        start, norm_stats = network.init(0)
    shapes = {
        path: shape
        for path, shape in network.param_shapes.items()
        if not path.startswith("backbone/")
    }
    loaded = from_torch(stored_state(arrays), shapes, layout=EXPORTS[case.network])
    targets = targets_of(arrays, k)
    b = len(targets.valid)
    batch = Batch(
        *[jnp.zeros((b, 2), int)] * 2, targets, *[jnp.zeros(b, int)] * 2, jnp.ones(b, bool)
    )
    params = jax.tree.map(jnp.asarray, start | loaded)
    run = Run(case, arrays, settings, network, params, norm_stats, batch)
    _train(run)
    return run


def _train(run: Run) -> None:
    """Forward, matching, losses and backward of one step."""
    costs = {
        f"cost_{name}": float(run.settings[f"set_cost_{name}"])
        for name in ("class", "bbox", "giou")
    }
    loss = LossConfig(**weights_of(run.arrays), **run.case.loss)
    objective = SetPrediction(loss, MatcherConfig(**costs), multi_label=False)

    def forward(params, features):
        noise = replay(run.arrays, run.settings)
        return run.forward(params, features, people=run.batch.targets, noise=noise)

    run.predictions, pull_back = jax.vjp(jax.jit(forward), run.params, run.features())
    run.prepared = match_on_host(jax.device_get(objective.prepare(run.predictions, run.batch)))

    def total(predictions):
        totals = objective.totals(run.batch)
        prepared = jax.tree.map(jnp.asarray, run.prepared)
        sums = objective.loss_sums(predictions, run.batch, prepared, totals)
        return sums.terms["total"], sums.terms

    cotangents, run.losses = jax.jit(jax.grad(total, has_aux=True, allow_int=True))(run.predictions)
    grads, run.feature_gradients = pull_back(cotangents)
    own = {path: np.asarray(x) for path, x in grads.items() if not path.startswith("backbone/")}
    run.gradients = to_torch(own, layout=EXPORTS[run.case.network])


def published(logits, run: Run) -> np.ndarray:
    """Our logits as the authors have them."""
    classes, subject = np.split(np.asarray(logits, np.float64), [run.settings["num_classes"]], -1)
    if run.case.loss.get("class_loss") != "no_object":
        return classes
    everybody = np.log(np.exp(classes).sum(-1, keepdims=True))
    return np.concatenate([classes, everybody - subject], -1)


def assert_near(found, expected, tolerance, **how):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance, **how)


def test_golden_predictions_of_every_layer(run):
    tolerance = run.case.tolerance
    assert_near(published(run.predictions.logits, run), run.arrays["out/logits"], tolerance)
    assert_near(run.predictions.boxes, run.arrays["out/boxes"], tolerance)
    for branch in run.predictions.branches:
        if branch.name == "denoising":
            assert_near(published(branch.logits, run), run.arrays["dn/out_logits"], tolerance)
            assert_near(branch.boxes, run.arrays["dn/out_boxes"], tolerance)


def test_golden_memory_states_and_references(run):
    details, tolerance = run.predictions.details, 2 * run.case.tolerance
    seen = ~run.arrays["mid/token_mask"]
    assert_near(np.asarray(details["memory"])[seen], run.arrays["mid/memory"][seen], tolerance)
    assert_near(details["states"], run.arrays["mid/decoder_layers"], tolerance)
    if "mid/reference" in run.arrays:
        expected, found = run.arrays["mid/reference"], details["references"]
        found = found[0] if expected.ndim == 3 else np.stack(found[:-1])
        assert_near(found, expected, run.case.tolerance)


def test_golden_matching_is_exact(run):
    layers = len(run.arrays["out/logits"])
    for layer, assignment in enumerate(run.prepared[0]):
        name = "last" if layer == layers - 1 else f"aux{layer}"
        image, query = np.nonzero(assignment >= 0)
        pairs = np.stack([image, query, assignment[image, query]], -1)
        np.testing.assert_array_equal(pairs, run.arrays[f"match/{name}"])


def test_golden_losses(run):
    names, values = run.arrays["loss/names"].tolist(), run.arrays["loss/values"]
    compared = 0
    for name, value, weight in zip(names, values, run.arrays["loss/weights"], strict=True):
        if not weight:
            continue
        prefix = next((x for x in run.case.branches if name.startswith(x)), "")
        _, term, *layer = name.removeprefix(prefix).split("_")
        term = {"ce": "class"}.get(term, term)
        ours = "/".join([f"{run.case.branches.get(prefix, '')}loss_{term}", *layer])
        np.testing.assert_allclose(run.losses[ours], value, rtol=2e-6, err_msg=name)
        compared += 1
    assert compared == sum("loss_class" in x or "_bbox" in x or "_giou" in x for x in run.losses)
    np.testing.assert_allclose(run.losses["total"], run.arrays["loss/total"], rtol=2e-6)


def test_golden_gradients(run):
    for level, gradient in enumerate(run.feature_gradients):
        expected = run.arrays[f"grad/feat{level}"].transpose(0, 2, 3, 1)
        assert_near(gradient, expected, 5e-5 * np.abs(expected).max())
    total = float(run.arrays["grad/total_norm"])
    names = run.arrays["grad/param_names"].tolist()
    for name, norm in zip(names, run.arrays["grad/param_norms"], strict=True):
        found = np.linalg.norm(run.gradients[name].astype(np.float64))
        if run.case.zero.fullmatch(name):
            assert max(found, norm) < 1e-6 * total, name
            continue
        assert abs(found - norm) <= 1e-4 * (norm + 1e-3 * total), name
    for key in (key for key in run.arrays if key.startswith("grad/param/")):
        expected = run.arrays[key]
        found = run.gradients[key.removeprefix("grad/param/")]
        assert_near(found, expected, 5e-5 * np.abs(expected).max(), err_msg=key)


def test_golden_names_there_and_back(run):
    """The tables know every tensor of the file, its copies too."""
    state, layout = stored_state(run.arrays), EXPORTS[run.case.network]
    copies = zip(run.arrays.get("alias/name", []), run.arrays.get("alias/same_as", []), strict=True)
    whole = state | {str(name): state[str(original)] for name, original in copies}
    assert detect_layout(whole) is layout
    shapes = {p: s for p, s in run.network.param_shapes.items() if not p.startswith("backbone/")}
    ours = from_torch(whole, shapes, layout=layout)
    back = to_torch(ours, layout=layout, repeats=len(run.arrays["out/logits"]))
    assert back.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_golden_denoising_queries(run):
    if not run.predictions.branches:
        pytest.skip("no denoising in this file")
    bound = run.network.bind(run.params, run.norm_stats)
    noise = replay(run.arrays, run.settings)
    queries = bound.queries(len(run.arrays["in/mask"]), run.batch.targets, noise)
    assert_near(queries.tokens, run.arrays["dn/query_label"], 1e-6)
    assert_near(queries.box_logits, run.arrays["dn/query_bbox_unact"], 1e-5)
    np.testing.assert_array_equal(queries.hidden[0], run.arrays["dn/attn_mask"])


def test_golden_evaluation_without_denoising(run):
    if "eval/logits" not in run.arrays:
        pytest.skip("evaluation is the same as training in this file")
    predictions = jax.jit(run.forward)(run.params, run.features())
    assert_near(published(predictions.logits[-1], run), run.arrays["eval/logits"], 5e-6)
    assert_near(predictions.boxes[-1], run.arrays["eval/boxes"], 5e-6)
