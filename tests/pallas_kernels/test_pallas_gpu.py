"""The GPU kernels: on any machine they lower for CUDA; on a GPU they are right. There:
JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu
"""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import pallas_gpu, xla
from pallas_kernels.deformable_attention import (
    chosen_implementation,
    deformable_attention_from_offsets,
)
from pallas_kernels.workloads import PATTERNS, WORKLOADS


def a_gpu_to_lower_for():
    """From 0.11 on, Pallas asks which GPU it lowers for."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("_",), abstract_device=device))


def forward_and_gradients(function, spatial_shapes):
    def run(arguments, cotangent):
        out, pullback = jax.vjp(lambda a: function(spatial_shapes=spatial_shapes, **a), arguments)
        return {"out": out, **pullback(cotangent.astype(out.dtype))[0]}

    return jax.jit(run)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_lowers_for_cuda(name, dtype):
    workload = WORKLOADS[name]
    arguments = {
        key: jax.ShapeDtypeStruct(shape, dtype if key == "value" else jnp.float32)
        for key, shape in workload.shapes().items()
    }
    cotangent = jax.ShapeDtypeStruct(
        (*workload.shapes()["logits"][:2], workload.heads * workload.head_size), dtype
    )
    run = forward_and_gradients(
        functools.partial(pallas_gpu.deformable_attention_from_offsets, partitioned=False),
        workload.spatial_shapes,
    )
    with a_gpu_to_lower_for():
        text = run.trace(arguments, cotangent).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2
    assert "deformable_attention_forward" in text and "deformable_attention_backward" in text


def test_lowering_leaves_the_warning_filters_of_the_process_alone():
    workload = WORKLOADS["odd_queries"]
    arguments = {key: jnp.asarray(x) for key, x in workload.inputs().items()}
    before = list(warnings.filters)
    jax.eval_shape(
        functools.partial(
            pallas_gpu.deformable_attention_from_offsets,
            spatial_shapes=workload.spatial_shapes,
            partitioned=False,
        ),
        **arguments,
    )
    assert warnings.filters == before


def points_at_an_edge(workload, arguments):
    """Which points [b q n l p] lie within 1e-4 of a whole pixel."""
    sizes = np.array(workload.spatial_shapes, np.float64)[:, ::-1]  # (width, height)
    points = np.asarray(arguments["reference_points"], np.float64)[:, :, None, :, None]
    pixels = points * sizes[:, None] - 0.5 + np.asarray(arguments["offsets"], np.float64)
    return (np.abs(pixels - np.round(pixels)) < 1e-4).any(-1)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_right_on_the_gpu(name, dtype, pattern):
    """Against the portable path in float64, which the CPU tests hold against the definition. All
    gradients, atomic additions included. A point that float32 cannot tell from the edge of a pixel
    has two slopes, one per side; of the millions, it leaves out the gradient of those.
    """
    workload = WORKLOADS[name]
    arguments = {key: jnp.asarray(x) for key, x in workload.inputs(pattern, seed=1).items()}
    arguments["value"] = arguments["value"].astype(dtype)
    assert chosen_implementation(arguments["value"], arguments["offsets"]) == "pallas_gpu"
    shape = (*arguments["logits"].shape[:2], workload.heads * workload.head_size)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=shape), dtype)
    found = forward_and_gradients(deformable_attention_from_offsets, workload.spatial_shapes)(
        arguments, cotangent
    )
    with jax.enable_x64(True):
        exact = {key: jnp.asarray(x, jnp.float64) for key, x in arguments.items()}
        answers = forward_and_gradients(
            xla.deformable_attention_from_offsets, workload.spatial_shapes
        )(exact, jnp.asarray(cotangent, jnp.float64))
        answers = {key: np.asarray(x) for key, x in answers.items()}
    at_edge = points_at_an_edge(workload, arguments)
    two_slopes = {"offsets": at_edge[..., None], "reference_points": at_edge.any((2, 4))[..., None]}
    assert pattern == "initial" or at_edge.mean() < 2e-3
    for key, answer in answers.items():
        epsilon = 2**-7 if dtype == jnp.bfloat16 and key in ("out", "value") else 5e-5
        error = np.abs(np.asarray(found[key], np.float64) - answer)
        error = np.where(two_slopes.get(key, False), 0, error).max()
        assert np.isfinite(error) and error <= epsilon * np.abs(answer).max(), (key, error)


@pytest.mark.gpu
def test_addresses_shared_by_many_points_are_added_up():
    """Every point of every query on one pixel: the case that the interpreter's atomic addition gets
    wrong.
    """
    value = jnp.ones((1, 4, 1, 32), jnp.float32)
    offsets, logits = jnp.zeros((1, 4096, 1, 1, 4, 2)), jnp.zeros((1, 4096, 1, 1, 4))
    run = forward_and_gradients(
        functools.partial(deformable_attention_from_offsets, implementation="pallas_gpu"), ((2, 2),)
    )
    arguments = {
        "value": value,
        "reference_points": jnp.full((1, 4096, 1, 2), 0.25),
        "offsets": offsets,
        "logits": logits,
    }
    found = run(arguments, jnp.ones((1, 4096, 32)))
    np.testing.assert_allclose(found["value"][0, :, 0, 0], [4096, 0, 0, 0], rtol=1e-5)
