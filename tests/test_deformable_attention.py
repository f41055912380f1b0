"""Multi-scale deformable attention: every implementation against the released operation's numbers and against the definition in float64."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_attention import IMPLEMENTATIONS, deformable_attention

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", [1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_released_operation(implementation, case):
    golden = np.load(GOLDEN / f"msda_op_{case}.npz")
    shapes = tuple((int(h), int(w)) for h, w in golden["spatial_shapes"])
    arguments = [jnp.asarray(golden[name]) for name in ("value", "sampling_locations", "attention_weights")]

    @jax.jit
    def run(value, locations, weights):
        return jax.vjp(lambda *a: deformable_attention(a[0], shapes, a[1], a[2], implementation=implementation), value, locations, weights)

    out, pullback = run(*arguments)
    grad_value, grad_locations, grad_weights = pullback(jnp.asarray(golden["cotangent"]))
    np.testing.assert_allclose(out, golden["output"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(grad_value, golden["grad_value"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(grad_weights, golden["grad_attention_weights"], rtol=2e-6, atol=2e-6)
    smooth = golden["loc_grad_ok"]
    np.testing.assert_allclose(grad_locations[smooth], golden["grad_sampling_locations"][smooth], rtol=2e-6, atol=2e-6)
