"""The network against the authors' released code: whole model, one decoder layer, initial values,
parameter counts and the ablations.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsct_jax.errors import UserError
from dsct_jax.model.attention import DeformableAttention, LayerShape, Memory, initial_offsets
from dsct_jax.model.build import Network, flatten, unflatten
from dsct_jax.model.decoder import (
    DeformableLayer,
    FusionConfig,
    smallest_k_mask,
    subject_context_fusion,
    weighted_softmax,
)
from dsct_jax.model.dsct import DSCTConfig
from dsct_jax.model.layers import DropoutNoise, matmul_2d, scale_and_shift
from dsct_jax.training.optimizer import multipliers
from dsct_jax.weights.rules import RELEASED, from_torch, to_torch

SMALL = DSCTConfig(
    num_classes=26,
    **json.loads((Path(__file__).parents[1] / "golden" / "model_small.json").read_text()),
)


def released_state(arrays) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("state/"): arrays[name] for name in arrays if name.startswith("state/")
    }


@pytest.fixture(scope="module")
def small(golden):
    functions = Network(SMALL)
    flat = from_torch(
        released_state(golden("model_small")), functions.param_shapes | functions.norm_stats_shapes
    )
    return (
        functions,
        {k: flat[k] for k in functions.param_shapes},
        {k: flat[k] for k in functions.norm_stats_shapes},
    )


@pytest.fixture(scope="module")
def small_output(small, golden):
    functions, params, norm_stats = small
    arrays = golden("model_small")
    forward = jax.jit(lambda p, f, x, m: functions.bind(p, f)(x, m, return_details=True))
    return forward(
        params,
        norm_stats,
        jnp.asarray(arrays["batch"].transpose(0, 2, 3, 1)),
        jnp.asarray(arrays["mask"]),
    )


def test_whole_model_reproduces_the_released_code(small_output, golden):
    arrays = golden("model_small")
    np.testing.assert_allclose(small_output.logits, arrays["all_logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(small_output.boxes, arrays["all_boxes"], rtol=0, atol=2e-6)


def test_every_stage_reproduces_the_released_code(small_output, golden):
    arrays, details = golden("model_small"), small_output.details
    for level in range(4):
        np.testing.assert_allclose(
            details["features"][level].transpose(0, 3, 1, 2),
            arrays[f"src_{level}"],
            rtol=0,
            atol=1e-5,
        )
    np.testing.assert_allclose(details["valid_ratios"], arrays["valid_ratios"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(
        details["reference_points"], arrays["reference_points"], rtol=0, atol=1e-6
    )
    shown = ~np.concatenate(
        [arrays[f"mask_{level}"].reshape(2, -1) for level in range(4)], 1
    )  # padded tokens are never read
    np.testing.assert_allclose(
        np.asarray(details["memory"])[shown], arrays["memory"][shown], rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(details["states"], arrays["hs"], rtol=0, atol=1e-5)
    for layer in range(2):
        for ours, theirs in (("spatial_selection", "idx_sp"), ("semantic_selection", "idx_se")):
            selection = np.asarray(details["layers"][layer][ours])
            expected = np.zeros_like(selection)
            np.put_along_axis(expected, arrays[f"{theirs}_{layer}"], True, axis=-1)
            np.testing.assert_array_equal(selection, expected)


@pytest.mark.parametrize("case", ["fused", "nofuse"])
def test_decoder_layer_and_its_gradients(case, golden):
    arrays = golden("decoder_layer")
    b, d, ffn, heads, levels, points, context, _, spatial, semantic = (
        int(x) for x in arrays["config"]
    )
    fusion = (
        FusionConfig("released", "largest", spatial, semantic, "semantic")
        if case == "fused"
        else None
    )
    layer = DeformableLayer(
        LayerShape(d, heads, levels, points, ffn, dropout=0.0),
        num_context=context,
        fusion=fusion,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(layer)
    shapes = {f"decoder/0/{k}": v.shape for k, v in flatten(nnx.to_pure_dict(state)).items()}
    torch_state = {
        f"transformer.decoder.layers.0.{k}": v for k, v in released_state(arrays).items()
    }
    params = {k.removeprefix("decoder/0/"): v for k, v in from_torch(torch_state, shapes).items()}
    shapes_static = tuple((int(h), int(w)) for h, w in arrays["spatial_shapes"])

    def run(params, tgt, query_pos, reference_points, src):
        bound = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(bound, unflatten(params))
        memory = Memory(src, None, jnp.asarray(arrays["padding_mask"]), None, shapes_static)
        out, _ = nnx.merge(graph, bound, copy=True)(
            tgt, (query_pos,), (query_pos, reference_points, memory), noise=None
        )
        return jnp.sum(out * arrays["cotangent"]), out

    inputs = [jnp.asarray(arrays[k]) for k in ("tgt", "query_pos", "reference_points_input", "src")]
    (_, out), grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3, 4), has_aux=True))(
        params, *inputs
    )
    np.testing.assert_allclose(out, arrays[f"{case}/output"], rtol=0, atol=1e-5)
    for grad, name in zip(grads[1:], ("tgt", "query_pos", "reference_points", "src"), strict=True):
        expected = arrays[f"{case}/grad_{name}"]
        np.testing.assert_allclose(
            grad, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max())
        )
    torch_grads = to_torch({f"decoder/0/{k}": v for k, v in grads[0].items()})
    for key in (k for k in arrays if k.startswith(f"{case}/gradparam/")):
        expected = arrays[key]
        grad = torch_grads["transformer.decoder.layers.0." + key.split("/")[-1]]
        np.testing.assert_allclose(
            grad, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max())
        )


def test_released_names_go_there_and_back(small, golden):
    _, params, norm_stats = small
    expected = released_state(golden("model_small"))
    state = to_torch(params | norm_stats)
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_wrong_weights_are_named(small, golden):
    functions, _, _ = small
    shapes, state = (
        functions.param_shapes | functions.norm_stats_shapes,
        released_state(golden("model_small")),
    )
    lacking = {
        k: v for k, v in state.items() if k != "level_embed" and k != "transformer.level_embed"
    }
    with pytest.raises(UserError, match="level_embed is missing"):
        from_torch(lacking, shapes)
    with pytest.raises(UserError, match=r"'surprise\.weight' is matched by 0 rules"):
        from_torch(state | {"surprise.weight": np.zeros(1)}, shapes)
    with pytest.raises(UserError, match=r"query_embed\.weight has shape"):
        from_torch(state | {"query_embed.weight": np.zeros((3, 128), np.float32)}, shapes)
    with pytest.raises(
        UserError, match=r"class_embed_dsct.1.bias differs from class_embed_dsct.0.bias"
    ):
        from_torch(state | {"class_embed_dsct.1.bias": np.ones(27, np.float32)}, shapes)
    with pytest.raises(UserError, match="unknown to this model"):
        from_torch(
            state | {"transformer.encoder.layers.7.norm1.weight": np.ones(64, np.float32)}, shapes
        )


def test_every_released_rule_is_used_by_the_full_model():
    shapes = Network(DSCTConfig(num_classes=26))
    zeros = {
        k: np.zeros(v, np.float32)
        for k, v in (shapes.param_shapes | shapes.norm_stats_shapes).items()
    }
    state = to_torch(zeros, repeats=6)
    assert len(state) == 562  # entries of the released state_dict
    assert (
        len(RELEASED) == len({rule[0] for rule in RELEASED}) == len({rule[1] for rule in RELEASED})
    )


def test_initial_values_follow_deformable_detr(golden):
    arrays = golden("init")
    functions = Network(
        DSCTConfig(num_classes=26, backbone="tiny", num_encoder_layers=1, num_decoder_layers=1)
    )
    params, _ = functions.init(0)
    state = to_torch({k: v for k, v in params.items() if not k.startswith("backbone")})
    names = list(arrays["names"])
    compared = 0
    for name, tensor in state.items():
        if name.startswith("input_proj") and name.endswith("0.weight"):
            continue  # Xavier's bound depends on the backbone's width
        mean, std, low, high = arrays["stats"][names.index(name)]
        size = tensor.size
        assert abs(tensor.mean() - mean) <= 6 * std / np.sqrt(size) + 1e-6, name
        assert abs(tensor.std() - std) <= 6 * std / np.sqrt(2 * size) + 1e-6, name
        if std > 0 and abs(high) < 3 * std:  # a uniform distribution: its ends are sharp
            assert tensor.max() <= high * 1.1 + 1e-6 and tensor.min() >= low * 1.1 - 1e-6, name
        compared += 1
    assert compared > 50
    np.testing.assert_allclose(
        initial_offsets(8, 4, 4).ravel(),
        arrays["sampling_offsets_bias_h8_l4_p4"],
        rtol=0,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        initial_offsets(4, 4, 4).ravel(),
        arrays["sampling_offsets_bias_h4_l4_p4"],
        rtol=0,
        atol=1e-6,
    )
    np.testing.assert_allclose(params["class_head/bias"], arrays["class_bias"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(params["box_head/layer2/bias"], arrays["bbox_last_bias"])
    assert not np.any(params["box_head/layer2/kernel"])


@pytest.mark.parametrize(
    ("backbone", "trainable"),
    [
        (
            "resnet18",
            23_383_329,
        ),  # the paper's Table 9 says 22 M; the released code does not build it
        ("resnet34", 33_410_337),
        ("resnet50", 39_832_865),
        ("resnet101", 58_772_769),
        ("resnet152", 74_370_337),
        ("wide_resnet50", 82_726_177),
        ("wide_resnet101", 140_660_001),
    ],
)
def test_parameter_counts_are_those_of_table_9(backbone, trainable):
    from configs.base import get_config

    shapes = Network(DSCTConfig(num_classes=26, backbone=backbone)).param_shapes
    rates = multipliers(
        {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()},
        get_config().optimizer.rules,
    )
    assert sum(int(np.prod(shapes[k])) for k, rate in rates.items() if rate > 0) == trainable


def test_nearest_selects_the_smallest_and_breaks_ties_by_index():
    scores = jnp.array([[3.0, 1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(smallest_k_mask(scores, 2), [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(smallest_k_mask(scores, 4), [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert not smallest_k_mask(scores, 0).any()


def test_masked_softmax_counts_entries_and_survives_empty_rows():
    logits = jnp.array([[[1.0, 2.0, 500.0], [1.0, 2.0, 3.0]]])
    weights = weighted_softmax(logits, jnp.array([[[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]]))
    expected = np.array([np.e, 2 * np.e**2]) / (np.e + 2 * np.e**2)
    np.testing.assert_allclose(weights[0, 0], [*expected, 0], rtol=1e-6)
    np.testing.assert_array_equal(weights[0, 1], 0)


def _by_hand(subject, context, spatial, semantic, rule, weigh):
    """Eq. 6-8 for one subject query, element by element."""
    sets = [spatial + semantic] if rule == "paper" else [spatial, semantic]
    fused = subject.copy()
    for chosen in sets:
        if not chosen:
            continue
        scores = np.array([weigh(m) for m in chosen])
        weights = np.exp(scores - scores.max())
        fused += sum(w / weights.sum() * context[m] for w, m in zip(weights, chosen, strict=True))
    return fused


@pytest.mark.parametrize(
    ("rule", "selection", "reweighting", "k_sp", "k_sm"),
    [
        ("paper", "smallest", "semantic", 3, 2),
        ("paper", "largest", "equal", 3, 2),
        ("paper", "smallest", "spatial", 5, 0),
        ("paper", "largest", "attentive", 0, 4),
        ("paper", "smallest", "scaled", 3, 2),
        ("released", "largest", "semantic", 3, 2),
        ("released", "smallest", "equal", 0, 4),
        ("released", "largest", "spatial", 5, 0),
        ("released", "smallest", "attentive", 3, 2),
    ],
)
def test_fusion_variants_against_the_equations(rule, selection, reweighting, k_sp, k_sm):
    rng = np.random.default_rng(5)
    subject, context = rng.normal(size=(2, 8)), rng.normal(size=(7, 8))
    p_s, p_c, attentive = (
        rng.uniform(size=(2, 2)),
        rng.uniform(size=(7, 2)),
        rng.normal(size=(2, 7)),
    )
    config = FusionConfig(rule, selection, k_sp, k_sm, reweighting)
    arrays = [jnp.asarray(x[None], jnp.float32) for x in (subject, context, p_s, p_c)]
    how = {"config": config, "attentive_logits": jnp.asarray(attentive[None], jnp.float32)}
    fused, details = subject_context_fusion(*arrays, **how)
    gated, _ = subject_context_fusion(*arrays, **how, gate=jnp.full(8, 0.5))
    dots, distances = subject @ context.T, np.linalg.norm(p_s[:, None] - p_c[None], axis=-1)
    among = np.exp(subject @ subject.T - (subject @ subject.T).max(-1, keepdims=True))
    among /= among.sum(-1, keepdims=True)
    for q in range(2):
        spatial = list(np.argsort(distances[q])[:k_sp])
        semantic = list(np.argsort(dots[q] if selection == "smallest" else -dots[q])[:k_sm])
        scores = {
            "semantic": dots[q],
            "equal": np.zeros(7),
            "spatial": -distances[q],
            "attentive": attentive[q],
            "scaled": dots[q] / np.sqrt(8),
        }[reweighting]
        expected = _by_hand(
            subject[q], context, spatial, semantic, rule, lambda m, scores=scores: scores[m]
        )
        if rule == "released":
            expected = expected + among[q] @ subject
        np.testing.assert_allclose(fused[0, q], expected, rtol=2e-5, atol=2e-5)
        half = subject[q] + 0.5 * (expected - subject[q])
        np.testing.assert_allclose(gated[0, q], half, rtol=2e-5, atol=2e-5)
        assert set(np.flatnonzero(details["spatial_selection"][0, q])) == set(spatial)
        assert set(np.flatnonzero(details["semantic_selection"][0, q])) == set(semantic)


@pytest.mark.parametrize(
    "change",
    [
        {"num_context_queries": 0},  # the baseline of Table 6
        {
            "fusion": "paper",
            "semantic_selection": "smallest",
            "reweighting": "attentive",
            "fusion_layers": (1,),
        },
    ],
)
def test_variants_run_and_differ(change, small, golden):
    arrays = golden("model_small")
    functions = Network(dataclasses.replace(SMALL, **change))
    params, norm_stats = functions.init(1)
    run = jax.jit(lambda p, f, x, m: functions.bind(p, f)(x, m, return_details=True))
    out = run(
        params,
        norm_stats,
        jnp.asarray(arrays["batch"].transpose(0, 2, 3, 1)),
        jnp.asarray(arrays["mask"]),
    )
    assert out.logits.shape == (2, 2, 4, 27) and out.boxes.shape == (2, 2, 4, 4)
    assert np.isfinite(out.logits).all() and np.isfinite(out.boxes).all()
    fused = ["context_weights" in layer for layer in out.details["layers"]]
    assert fused == ([False, False] if "num_context_queries" in change else [False, True])
    assert all(
        np.prod(shape) > 0 for shape in functions.param_shapes.values()
    )  # checkpoints cannot hold an array without elements


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "detr"}, "name='detr' .* one of dsct"),
        ({"backbone": "vgg"}, "backbone='vgg' .* one of resnet18, resnet34"),
        ({"norm": "batch"}, "norm='batch' .* one of frozen_batch, group"),
        ({"hidden_dim": 0}, "hidden_dim=0 .* at least 1"),
        ({"hidden_dim": 100}, r"hidden_dim=100 .* divisible by config.model.num_heads \(8\)"),
        ({"hidden_dim": 48}, "hidden_dim=48 .* by 32"),  # the groups of the input's norm
        ({"num_heads": 0}, "num_heads=0 .* at least 1"),
        ({"num_points": 0}, "num_points=0 .* at least 1"),
        ({"num_levels": 2}, "num_levels=2 .* at least 3"),
        ({"feedforward_dim": 0}, "feedforward_dim=0 .* at least 1"),
        ({"num_encoder_layers": -1}, "num_encoder_layers=-1 .* at least 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers=0 .* at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 .* at least 0 and less than 1"),
        ({"dropout": -0.5}, "dropout=-0.5 .* at least 0 and less than 1"),
        ({"dropout": math.nan}, "dropout=nan .* at least 0 and less than 1"),
        ({"num_subject_queries": 0}, "num_subject_queries=0 .* at least 1"),
        ({"num_context_queries": -1}, "num_context_queries=-1 .* at least 0"),
        ({"num_spatial_neighbors": 301}, r"num_spatial_neighbors=301 .* at most .* \(300\)"),
        ({"num_semantic_neighbors": 301}, r"num_semantic_neighbors=301 .* at most .* \(300\)"),
        ({"num_semantic_neighbors": -1}, "num_semantic_neighbors=-1 .* at least 0"),
        ({"fusion": "late"}, "fusion='late' .* one of paper, released"),
        ({"fusion_layers": (6,)}, r"fusion_layers=\(6,\) .* of layers 0 to 5"),
        ({"fusion_layers": (-1,)}, r"fusion_layers=\(-1,\) .* at least 0"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16' .* one of float32, bfloat16"),
        ({"remat": "some"}, "remat='some' .* one of none, light, layers, all"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(UserError, match=f"^config.model.{message}"):
        DSCTConfig(num_classes=26, **change)


def test_refinement_adds_up_over_the_layers_and_each_layer_learns_alone(small, golden):
    """Zhu et al. 2020, A.4: layer after layer moves the box of the one before, whose gradient is
    stopped. A constant head makes it countable.
    """
    functions = Network(dataclasses.replace(SMALL, box_refinement=True))
    _, params, norm_stats = small
    images, mask = (
        jnp.asarray(golden("model_small")["batch"].transpose(0, 2, 3, 1)),
        jnp.asarray(golden("model_small")["mask"]),
    )
    delta = jnp.array([0.1, -0.2, 0.3, 0.05])
    constant = params | {
        "box_head/layer2/kernel": jnp.zeros_like(params["box_head/layer2/kernel"]),
        "box_head/layer2/bias": delta,
    }
    key = "box_head/layer2/bias"

    def last_logits(bias):
        out = functions.bind(constant | {key: bias}, norm_stats)(images, mask, return_details=True)
        logits = jax.scipy.special.logit(out.boxes)
        return logits[-1].mean(), (logits, out.details)

    (_, (logits, details)), gradient = jax.jit(jax.value_and_grad(last_logits, has_aux=True))(delta)
    c = SMALL.num_context_queries
    points = jax.scipy.special.logit(details["reference_points"][:, c:])
    start = jnp.concatenate([points, jnp.full_like(points, -2.0)], -1)
    for layer in range(SMALL.num_decoder_layers):
        np.testing.assert_allclose(logits[layer], start + (layer + 1) * delta, rtol=0, atol=2e-4)
    np.testing.assert_allclose(
        gradient, np.full(4, 1 / 4), rtol=1e-4
    )  # 2 / 4 if the box of the first layer let the gradient through


def test_offsets_count_in_half_boxes():
    attention = DeformableAttention(LayerShape(16, 2, 1, 4, 16, 0.0), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    queries, memory = (jnp.asarray(rng.normal(size=(1, k, 16)), jnp.float32) for k in (2, 48))
    points = jnp.array([[[[0.5, 0.25]], [[0.5, 0.25]]]])

    def run(boxes):
        seen = Memory(memory, None, jnp.zeros((1, 48), bool), None, ((6, 8),))
        return attention(queries, jnp.zeros_like(queries), points, seen, boxes)[1][
            "sampling_locations"
        ]

    pixels = run(None) - points[:, :, None, :, None]
    scaled = run(jnp.array([[[[0.4, 0.2]], [[0.0, 0.0]]]])) - points[:, :, None, :, None]
    np.testing.assert_allclose(
        scaled[0, 0], pixels[0, 0] * np.array([8 * 0.4, 6 * 0.2]) / (2 * 4), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(scaled[0, 1], pixels[0, 1], rtol=1e-6)  # no box: pixels of the map


def test_bfloat16_keeps_places_weights_and_answers_in_float32(small, small_output, golden):
    arrays, (_, params, norm_stats) = golden("model_small"), small
    functions = Network(dataclasses.replace(SMALL, compute_dtype="bfloat16"))
    images, mask = jnp.asarray(arrays["batch"].transpose(0, 2, 3, 1)), jnp.asarray(arrays["mask"])
    out = jax.jit(lambda p, f: functions.bind(p, f)(images, mask, return_details=True))(
        params, norm_stats
    )
    assert out.logits.dtype == out.boxes.dtype == jnp.float32
    assert out.details["memory"].dtype == out.details["features"][0].dtype == jnp.bfloat16
    for layer in out.details["layers"]:
        for name in (
            "sampling_locations",
            "attention_weights",
            "self_attention_weights",
            "context_weights",
        ):
            assert layer[name].dtype == jnp.float32, name
    # Where the selection of context queries flips, a query answers something else: the median is
    # what rounding alone does.
    assert np.median(np.abs(out.logits - small_output.logits)) < 0.03
    assert np.median(np.abs(out.boxes - small_output.boxes)) < 0.003
    assert np.abs(out.boxes - small_output.boxes).max() < 0.1


@pytest.mark.parametrize("remat", ["light", "layers", "all"])
def test_rematerialization_keeps_less(remat, small, golden):
    arrays, (_, params, norm_stats) = golden("model_small"), small
    images, mask = jnp.asarray(arrays["batch"].transpose(0, 2, 3, 1)), jnp.asarray(arrays["mask"])
    keys = jax.random.split(jax.random.key(0), 2)

    def kept_bytes(rule):
        functions = Network(dataclasses.replace(SMALL, remat=rule))

        def forward(params):
            return functions.bind(params, norm_stats)(images, mask, noise=DropoutNoise(keys)).logits

        _, pull_back = jax.eval_shape(lambda p: jax.vjp(forward, p), params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))

    assert kept_bytes(remat) < 0.8 * kept_bytes(
        "none"
    )  # that the values stay the same is shown by the released trajectory, computed with "light"


def draw(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def differentiated(layer, *arguments):
    """The layer's result, a gradient of it, and what the layer makes of that gradient, all as they
    are and as float64.
    """
    result, pull_back = jax.vjp(layer, *arguments)
    gradient = draw(*result.shape).astype(result.dtype)
    values = [result, gradient, *pull_back(gradient)]
    return values, [np.asarray(value, np.float64) for value in values]


@pytest.mark.parametrize(
    ("given", "returned"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
@pytest.mark.parametrize("ones", [(), (1, 1)])
def test_a_product_of_rows_is_the_product(given, returned, ones):
    x, kernel = draw(2, 3, 4, 6).astype(given), draw(*ones, 6, 5).astype(given)
    (result, _, to_x, to_kernel), exact = differentiated(
        lambda x, kernel: matmul_2d(x, kernel, returned), x, kernel
    )
    assert (result.dtype, to_x.dtype, to_kernel.dtype) == (returned, given, given)
    rows, matrix, gradient = (
        np.float64(x).reshape(-1, 6),
        np.float64(kernel).reshape(6, 5),
        exact[1].reshape(-1, 5),
    )
    expected = {"result": rows @ matrix, "x": gradient @ matrix.T, "kernel": rows.T @ gradient}
    shapes, bits = (
        (result.shape, x.shape, kernel.shape),
        {"float32": 20, "bfloat16": 8},
    )  # that must be right, of the largest
    for (name, wanted), got, shape, kind in zip(
        expected.items(), (exact[0], *exact[2:]), shapes, (returned, given, given), strict=True
    ):
        assert got.shape == shape
        np.testing.assert_allclose(
            got,
            wanted.reshape(shape),
            rtol=0,
            atol=2.0 ** -bits[kind] * np.abs(wanted).max(),
            err_msg=name,
        )


def test_scale_and_shift_has_the_obvious_gradients():
    x, scale, bias = draw(2, 3, 4), draw(4), draw(4) + 1
    _, ours = differentiated(scale_and_shift, x, scale, bias)
    _, expected = differentiated(lambda x, scale, bias: x * scale + bias, x, scale, bias)
    for got, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
