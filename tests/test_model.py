"""The network against the authors' released code: whole model, one decoder layer, initial values, parameter counts and the ablations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsct_jax.errors import UserError
from dsct_jax.model.attention import initial_offsets
from dsct_jax.model.decoder import DecoderLayer, FusionConfig, masked_softmax, nearest, subject_context_fusion
from dsct_jax.model.dsct import DSCTConfig
from dsct_jax.optimizer import multipliers
from dsct_jax.state import ModelFunctions, flatten, unflatten
from dsct_jax.torch_weights import RELEASED, from_torch, to_torch

SMALL = DSCTConfig(
    num_classes=26,
    backbone="tiny",
    hidden_dim=64,
    num_heads=4,
    feedforward_dim=128,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_context_queries=20,
    num_spatial_neighbors=6,
    num_semantic_neighbors=5,
    fusion="released",
    semantic_selection="largest",
)


def released_state(arrays) -> dict[str, np.ndarray]:
    return {name.removeprefix("state/"): arrays[name] for name in arrays if name.startswith("state/")}


@pytest.fixture(scope="module")
def small(golden):
    functions = ModelFunctions(SMALL)
    flat = from_torch(released_state(golden("model_small")), functions.param_shapes | functions.frozen_shapes)
    return functions, {k: flat[k] for k in functions.param_shapes}, {k: flat[k] for k in functions.frozen_shapes}


@pytest.fixture(scope="module")
def small_output(small, golden):
    functions, params, frozen = small
    arrays = golden("model_small")
    forward = jax.jit(lambda p, f, x, m: functions.bind(p, f)(x, m, return_details=True))
    return forward(params, frozen, jnp.asarray(arrays["batch"].transpose(0, 2, 3, 1)), jnp.asarray(arrays["mask"]))


def test_whole_model_reproduces_the_released_code(small_output, golden):
    arrays = golden("model_small")
    np.testing.assert_allclose(small_output.logits, arrays["all_logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(small_output.boxes, arrays["all_boxes"], rtol=0, atol=2e-6)


def test_every_stage_reproduces_the_released_code(small_output, golden):
    arrays, details = golden("model_small"), small_output.details
    for level in range(4):
        np.testing.assert_allclose(details["features"][level].transpose(0, 3, 1, 2), arrays[f"src_{level}"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(details["valid_ratios"], arrays["valid_ratios"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(details["reference_points"], arrays["reference_points"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(details["memory"], arrays["memory"], rtol=0, atol=1e-5)
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
    b, d, ffn, heads, levels, points, context, _, spatial, semantic = (int(x) for x in arrays["config"])
    fusion = FusionConfig("released", "largest", spatial, semantic, "semantic") if case == "fused" else None
    layer = DecoderLayer(
        d,
        num_heads=heads,
        num_levels=levels,
        num_points=points,
        feedforward_dim=ffn,
        dropout_rate=0.0,
        num_context=context,
        fusion=fusion,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(layer)
    shapes = {f"decoder/0/{k}": v.shape for k, v in flatten(nnx.to_pure_dict(state)).items()}
    torch_state = {f"transformer.decoder.layers.0.{k}": v for k, v in released_state(arrays).items()}
    params = {k.removeprefix("decoder/0/"): v for k, v in from_torch(torch_state, shapes).items()}
    shapes_static = tuple((int(h), int(w)) for h, w in arrays["spatial_shapes"])

    def run(params, tgt, query_pos, reference_points, src):
        bound = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(bound, unflatten(params))
        out, _ = nnx.merge(graph, bound, copy=True)(
            tgt, query_pos, reference_points, src, jnp.asarray(arrays["padding_mask"]), shapes_static, rngs=None, implementation=None
        )
        return jnp.sum(out * arrays["cotangent"]), out

    inputs = [jnp.asarray(arrays[k]) for k in ("tgt", "query_pos", "reference_points_input", "src")]
    (_, out), grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3, 4), has_aux=True))(params, *inputs)
    np.testing.assert_allclose(out, arrays[f"{case}/output"], rtol=0, atol=1e-5)
    for grad, name in zip(grads[1:], ("tgt", "query_pos", "reference_points", "src"), strict=True):
        expected = arrays[f"{case}/grad_{name}"]
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    torch_grads = to_torch({f"decoder/0/{k}": v for k, v in grads[0].items()}, num_decoder_layers=1)
    for key in (k for k in arrays if k.startswith(f"{case}/gradparam/")):
        expected = arrays[key]
        grad = torch_grads["transformer.decoder.layers.0." + key.split("/")[-1]]
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
