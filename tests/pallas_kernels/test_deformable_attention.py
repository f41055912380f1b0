"""Multi-scale deformable attention: every implementation against the released operation's numbers
and against the definition in float64.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import grid_sample, pallas_gpu, reference, xla
from pallas_kernels.deformable_attention import (
    chosen_implementation,
    deformable_attention,
    deformable_attention_from_offsets,
)
from pallas_kernels.pallas_gpu import Tile
from pallas_kernels.workloads import PATTERNS, WORKLOADS, Workload

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SMALL = [workload for workload in WORKLOADS.values() if not workload.large]


def by_corner(value, origin, offsets, weights, cotangent, *, shapes):
    """The backward pass that accelerators use, on the CPU."""
    return jax.vmap(functools.partial(xla._gradients_by_corner, shapes))(
        value, origin, offsets, weights, cotangent
    )


class Interpreted:
    """The GPU kernels, their steps run one by one as XLA operations."""

    deformable_attention = staticmethod(
        functools.partial(pallas_gpu.deformable_attention, interpret=True, tile=Tile(8, 1))
    )
    deformable_attention_from_offsets = staticmethod(
        functools.partial(
            pallas_gpu.deformable_attention_from_offsets, interpret=True, tile=Tile(8, 1)
        )
    )


IMPLEMENTATIONS = {
    "reference": reference,
    "xla": xla,
    "grid_sample": grid_sample,
    "interpreted": Interpreted,
}


def inputs(workload, pattern="trained", *, seed=0):
    return {key: jnp.asarray(x) for key, x in workload.inputs(pattern, seed=seed).items()}


def gradients(function, arguments, cotangent):
    """Output and all gradients, compiled together."""

    @jax.jit
    def run(arguments, cotangent):
        out, pullback = jax.vjp(lambda a: function(**a), arguments)
        return out, *pullback(cotangent.astype(out.dtype))

    out, found = run(arguments, cotangent)
    return {"out": out, **found}


@functools.cache
def expected(name, pattern="trained", value_dtype="float32"):
    """Arguments, cotangent, and the definition's answers in float64."""
    workload = WORKLOADS[name]
    arguments = inputs(workload, pattern, seed=3)
    arguments["value"] = arguments["value"].astype(value_dtype).astype(jnp.float32)
    b, q = arguments["logits"].shape[:2]
    cotangent = (
        np.random.default_rng(4)
        .normal(size=(b, q, workload.heads * workload.head_size))
        .astype(np.float32)
    )
    with jax.enable_x64(True):
        exact = {key: jnp.asarray(x, jnp.float64) for key, x in arguments.items()}
        function = functools.partial(
            reference.deformable_attention_from_offsets, spatial_shapes=workload.spatial_shapes
        )
        answers = {
            key: np.asarray(x)
            for key, x in gradients(function, exact, jnp.asarray(cotangent)).items()
        }
    return arguments, cotangent, answers


def assert_close(found, answers, *, epsilon):
    """Errors relative to each array's largest entry: an entry is a sum of many terms of that size,
    so its own size says little.
    """
    for key, answer in answers.items():
        scale = max(np.abs(answer).max(), 1e-3)
        error = np.abs(np.asarray(found[key], np.float64) - answer).max()
        assert np.isfinite(error) and error <= epsilon * scale, (key, error, scale)


@pytest.mark.parametrize("case", [1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_released_operation(implementation, case):
    golden = np.load(GOLDEN / f"msda_op_{case}.npz")
    shapes = tuple((int(h), int(w)) for h, w in golden["spatial_shapes"])
    arguments = {
        name: jnp.asarray(golden[name])
        for name in ("value", "sampling_locations", "attention_weights")
    }
    function = functools.partial(
        IMPLEMENTATIONS[implementation].deformable_attention, spatial_shapes=shapes
    )
    found = gradients(function, arguments, jnp.asarray(golden["cotangent"]))
    np.testing.assert_allclose(found["out"], golden["output"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(found["value"], golden["grad_value"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(
        found["attention_weights"], golden["grad_attention_weights"], rtol=2e-6, atol=2e-6
    )
    smooth = golden["loc_grad_ok"]
    np.testing.assert_allclose(
        found["sampling_locations"][smooth],
        golden["grad_sampling_locations"][smooth],
        rtol=2e-6,
        atol=2e-6,
    )


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.name)
@pytest.mark.parametrize("implementation", ["xla", "grid_sample", "interpreted"])
def test_values_and_gradients(implementation, workload):
    arguments, cotangent, answers = expected(workload.name)
    function = functools.partial(
        IMPLEMENTATIONS[implementation].deformable_attention_from_offsets,
        spatial_shapes=workload.spatial_shapes,
    )
    found = gradients(function, arguments, cotangent)
    # float32 pixels carry an error of half an ulp of the map's width (far outside: of the offset),
    # which moves a weight by as much
    assert_close(found, answers, epsilon=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "interpreted"])
def test_bfloat16_values(implementation):
    arguments, cotangent, answers = expected("ragged_levels", value_dtype="bfloat16")
    shapes = WORKLOADS["ragged_levels"].spatial_shapes
    arguments = {**arguments, "value": jnp.asarray(arguments["value"], jnp.bfloat16)}
    function = functools.partial(
        IMPLEMENTATIONS[implementation].deformable_attention_from_offsets, spatial_shapes=shapes
    )
    exact_cotangent = np.asarray(jnp.asarray(cotangent, jnp.bfloat16).astype(jnp.float32))
    found = gradients(function, arguments, exact_cotangent)
    assert found["out"].dtype == found["value"].dtype == jnp.bfloat16
    assert found["offsets"].dtype == found["logits"].dtype == jnp.float32
    assert_close(
        {"out": found["out"], "value": found["value"]},
        {key: answers[key] for key in ("out", "value")},
        epsilon=2**-7,
    )
    # rounding happens once, at the end: the sums and the gradients of the points are as exact as
    # with float32 values
    same = gradients(
        function, {**arguments, "value": arguments["value"].astype(jnp.float32)}, exact_cotangent
    )
    # Half an ulp of bfloat16. Two programs' float32 sums may differ in the last bit, which near a
    # tie turns the rounding.
    scale = np.abs(same["out"]).max()
    np.testing.assert_allclose(
        found["out"].astype(jnp.float32), same["out"], rtol=2**-8, atol=1e-6 * scale
    )
    np.testing.assert_allclose(
        found["offsets"], same["offsets"], rtol=0, atol=1e-5 * np.abs(same["offsets"]).max()
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern):
    arguments, cotangent, answers = expected("encoder_tiny", pattern)
    shapes = WORKLOADS["encoder_tiny"].spatial_shapes
    found = gradients(
        functools.partial(deformable_attention_from_offsets, spatial_shapes=shapes),
        arguments,
        cotangent,
    )
    if (
        pattern == "initial"
    ):  # whole steps put points exactly on pixels, where the slope is one-sided
        answers = {
            key: x for key, x in answers.items() if key not in ("offsets", "reference_points")
        }
    assert_close(found, answers, epsilon=2e-5)


def test_accelerator_backward_equals_cpu_backward():
    workload = WORKLOADS["ragged_levels"]
    arguments, cotangent, answers = expected(workload.name)
    shapes = workload.spatial_shapes
    origin = (
        arguments["reference_points"] * np.asarray(reference.level_sizes(shapes, jnp.float32)) - 0.5
    )
    weights = jax.nn.softmax(
        jnp.asarray(arguments["logits"]).reshape(*arguments["logits"].shape[:3], -1)
    ).reshape(arguments["logits"].shape)
    run = jax.jit(functools.partial(by_corner, shapes=shapes))
    heads = cotangent.reshape(*arguments["logits"].shape[:3], workload.head_size)
    grad_value, grad_offsets, grad_weights = run(
        arguments["value"], jnp.asarray(origin, jnp.float32), arguments["offsets"], weights, heads
    )
    _, softmax_pullback = jax.vjp(
        lambda x: jax.nn.softmax(x.reshape(*x.shape[:3], -1)).reshape(x.shape), arguments["logits"]
    )
    (grad_logits,) = softmax_pullback(grad_weights)
    found = {
        "value": grad_value.reshape(arguments["value"].shape),
        "offsets": grad_offsets,
        "logits": grad_logits,
    }
    assert_close(found, {key: answers[key] for key in found}, epsilon=2e-5)


@settings(max_examples=5, deadline=None)
@given(
    levels=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    queries=st.integers(1, 9),
    points=st.integers(1, 3),
    spread=st.sampled_from([0.3, 3.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_any_shape(levels, queries, points, spread, seed):
    workload = Workload(
        "drawn", tuple(levels), queries=queries, heads=2, head_size=4, points=points, spread=spread
    )
    arguments = inputs(workload, seed=seed)
    answer = reference.deformable_attention_from_offsets(
        spatial_shapes=workload.spatial_shapes, **arguments
    )
    found = xla.deformable_attention_from_offsets(
        spatial_shapes=workload.spatial_shapes, **arguments
    )
    interpreted = Interpreted.deformable_attention_from_offsets(
        spatial_shapes=workload.spatial_shapes, **arguments
    )
    # the same float32 pixel, added up in another order: at 1e4 pixels an ulp is 1e-3
    np.testing.assert_allclose(found, answer, rtol=0, atol=1e-5 if spread < 10 else 1e-2)
    np.testing.assert_allclose(interpreted, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_points_that_are_not_finite_or_far_away_count_nothing(implementation):
    shapes = ((3, 4), (2, 2))
    rng = np.random.default_rng(0)
    value = rng.normal(size=(1, 16, 2, 8)).astype(np.float32)
    locations = rng.uniform(size=(1, 6, 2, 2, 2, 2)).astype(np.float32)
    weights = rng.uniform(size=(1, 6, 2, 2, 2)).astype(np.float32)
    bad = np.zeros(weights.shape, bool)
    for query, broken in enumerate([np.nan, np.inf, -np.inf, 1e30, -3e9]):
        locations[0, query, 1, :, 0, query % 2], bad[0, query, 1, :, 0] = broken, True
    function = functools.partial(
        IMPLEMENTATIONS[implementation].deformable_attention, spatial_shapes=shapes
    )
    cotangent = np.ones((1, 6, 16), np.float32)
    found = gradients(
        function,
        {"value": value, "sampling_locations": locations, "attention_weights": weights},
        cotangent,
    )
    tame = np.where(bad[..., None], 0.5, locations)
    without = gradients(
        function,
        {
            "value": value,
            "sampling_locations": tame,
            "attention_weights": np.where(bad, 0, weights),
        },
        cotangent,
    )
    assert all(np.isfinite(x).all() for x in found.values())
    np.testing.assert_allclose(found["out"], without["out"], atol=1e-6)
    np.testing.assert_allclose(found["value"], without["value"], atol=1e-6)
    assert (np.asarray(found["sampling_locations"])[bad] == 0).all() and (
        np.asarray(found["attention_weights"])[bad] == 0
    ).all()


def test_choice():
    value, offsets = (
        jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32),
        jax.ShapeDtypeStruct((1, 3, 2, 1, 2, 2), jnp.float32),
    )
    platform = jax.default_backend()
    assert chosen_implementation(value, offsets) == ("pallas_gpu" if platform == "gpu" else "xla")
    assert chosen_implementation(value, offsets, "reference") == "reference"
    with pytest.raises(ValueError, match="one of reference, xla, grid_sample, pallas_gpu"):
        chosen_implementation(value, offsets, "cuda")
    assert "head" in pallas_gpu.unsupported_reason(
        jax.ShapeDtypeStruct((1, 4, 2, 256), jnp.float32), offsets, platform="gpu"
    )
    assert "float16" in pallas_gpu.unsupported_reason(
        jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float16), offsets, platform="gpu"
    )
    assert pallas_gpu.unsupported_reason(value, offsets, platform="gpu") is None
    if platform != "gpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            chosen_implementation(value, offsets, "pallas_gpu")


def test_shapes_that_do_not_fit_are_named():
    arguments = inputs(WORKLOADS["odd_queries"])
    with pytest.raises(ValueError, match="hold 24 tokens"):
        deformable_attention_from_offsets(spatial_shapes=((6, 4),), **arguments)
    short = {**arguments, "reference_points": arguments["reference_points"][:, :3]}
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="reference_points"):
        deformable_attention_from_offsets(spatial_shapes=((5, 4),), **short)
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="weights"):
        deformable_attention(
            arguments["value"], ((5, 4),), arguments["offsets"], arguments["logits"][:, :3]
        )


@pytest.mark.skipif(
    len(jax.devices()) < 2,
    reason="one device: run with XLA_FLAGS=--xla_force_host_platform_device_count=8",
)
@pytest.mark.parametrize("implementation", ["xla", "interpreted"])
def test_images_stay_on_their_devices(implementation):
    devices = jax.devices()
    workload = Workload(
        "sharded", ((4, 4), (2, 2)), batch=len(devices), queries=9, heads=2, head_size=8, points=2
    )
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    arguments = inputs(workload)
    function = functools.partial(
        IMPLEMENTATIONS[implementation].deformable_attention_from_offsets,
        spatial_shapes=workload.spatial_shapes,
    )

    def loss(arguments):
        return function(**arguments) ** 2

    def gradient(arguments):
        out, pullback = jax.vjp(loss, arguments)
        return out, pullback(jnp.ones_like(out))

    compiled = jax.jit(gradient).lower(jax.device_put(arguments, sharding)).compile()
    text = compiled.as_text()
    assert not [
        name
        for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        if name in text
    ]
    assert all(x.spec[0] == "data" for x in jax.tree.leaves(compiled.output_shardings))
    out, found = compiled(jax.device_put(arguments, sharding))
    answer, exact = jax.jit(gradient)(arguments)
    np.testing.assert_allclose(out, answer, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, exact)


def test_portable_path_exports_with_symbolic_sizes():
    b, h, w = jax.export.symbolic_shape("b,2*h,2*w")

    def sample(image, points, logits):
        n = image.shape[-1] // 4
        _, height, width, _ = image.shape
        shapes = ((height, width), (height // 2, width // 2))
        value = jnp.concatenate(
            [
                image.reshape(image.shape[0], -1, 4, n),
                image[:, ::2, ::2].reshape(image.shape[0], -1, 4, n),
            ],
            1,
        )
        reference_points = jnp.full((*points.shape[:2], 2, 2), 0.5)
        return deformable_attention_from_offsets(
            value, shapes, reference_points, points, logits, implementation="xla"
        )

    symbolic = [(b, h, w, 8), (b, 5, 4, 2, 3, 2), (b, 5, 4, 2, 3)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in symbolic]
    exported = jax.export.export(jax.jit(sample), platforms=("cpu", "cuda", "tpu"))(*arguments)
    rng = np.random.default_rng(0)
    concrete = [
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in [(2, 6, 4, 8), (2, 5, 4, 2, 3, 2), (2, 5, 4, 2, 3)]
    ]
    np.testing.assert_allclose(exported.call(*concrete), sample(*concrete), atol=1e-6)


@pytest.mark.parametrize("name", ["encoder_800x1066_batch4", "decoder_304"])
def test_portable_path_lowers_for_tpu(name):
    workload = WORKLOADS[name]
    arguments = {
        key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in workload.shapes().items()
    }
    run = jax.jit(
        jax.grad(
            lambda a: deformable_attention_from_offsets(
                spatial_shapes=workload.spatial_shapes, implementation="xla", **a
            ).sum()
        )
    )
    text = jax.export.export(run, platforms=("tpu",))(arguments).mlir_module()
    assert "stablehlo.gather" in text and "stablehlo.scatter" in text
