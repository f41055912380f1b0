"""Reading boxes cell by cell: the cells against loops, and where in a network they count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsct_jax.errors import UserError
from dsct_jax.model.build import Network, network_config
from dsct_jax.model.roi import roi_align
from tests.model.test_deformable_runs import SMALL as DETECTOR

SMALL = {name: value for name, value in DETECTOR.items() if name != "num_queries"} | {
    "name": "dsct",
    "num_encoder_layers": 0,
    "num_subject_queries": 3,
    "num_context_queries": 2,
    "num_spatial_neighbors": 1,
    "num_semantic_neighbors": 1,
    "box_refinement": True,
    "roi_size": 4,
}


def in_loops(features, center, size, cells):
    """Every cell as a sum over all pixels, one by one."""
    h, w, channels = features.shape
    found = np.zeros((cells, cells, channels))
    for i in range(cells):
        for j in range(cells):
            y = (center[1] + ((i + 0.5) / cells - 0.5) * size[1]) * h - 0.5
            x = (center[0] + ((j + 0.5) / cells - 0.5) * size[0]) * w - 0.5
            tall, wide = max(size[1] * h / cells, 1), max(size[0] * w / cells, 1)
            for row in range(h):
                for column in range(w):
                    weight = max(1 - abs(y - row) / tall, 0) / tall
                    weight *= max(1 - abs(x - column) / wide, 0) / wide
                    found[i, j] += weight * features[row, column]
    return found


def test_cells_are_those_of_loops():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, 9, 12, 3)).astype(np.float32)
    centers = rng.uniform(0.1, 0.9, (2, 4, 2)).astype(np.float32)  # some reach over the border
    sizes = rng.uniform(0.05, 0.9, (2, 4, 2)).astype(np.float32)
    found = roi_align(*map(jnp.asarray, (features, centers, sizes)), 3)
    for image in range(2):
        for box in range(4):
            expected = in_loops(features[image], centers[image, box], sizes[image, box], 3)
            np.testing.assert_allclose(found[image, box], expected, rtol=0, atol=1e-5)


def test_cells_of_a_pixel_each_are_the_pixels():
    features = np.random.default_rng(0).standard_normal((1, 6, 8, 2)).astype(np.float32)
    # rows 1 to 4, columns 2 to 5
    box = jnp.array([[[4 / 8, 3 / 6]]]), jnp.array([[[4 / 8, 4 / 6]]])
    found = roi_align(jnp.asarray(features), *box, 4)
    np.testing.assert_allclose(found[0, 0], features[0, 1:5, 2:6], rtol=0, atol=1e-6)


def test_a_constant_map_reads_as_that_constant():
    sizes = jnp.array([[[0.5, 0.3], [0.2, 0.6]]])
    found = roi_align(jnp.full((1, 20, 20, 1), 3.0), jnp.full((1, 2, 2), 0.5), sizes, 4)
    np.testing.assert_allclose(found, 3.0, atol=0.2)  # a triangle between pixels, not an integral


@pytest.fixture(scope="module")
def network():
    return Network(network_config(SMALL, 4))


def test_only_the_last_layer_reads(network):
    """Another reading changes what the last layer says, of subjects alone."""
    params, stats = network.init(0)
    other = {
        path: 2 * value if "/reading/linear/" in path else value for path, value in params.items()
    }
    images = jnp.asarray(np.random.default_rng(1).standard_normal((1, 64, 96, 3)), jnp.float32)
    run = jax.jit(
        lambda params: network.bind(params, stats)(
            images, jnp.zeros((1, 64, 96), bool), return_details=True
        )
    )
    one, two = run(params), run(other)
    assert {path.split("/")[1] for path in params if "/reading/" in path} == {"1"}
    for name in ("logits", "boxes"):
        np.testing.assert_array_equal(getattr(one, name)[0], getattr(two, name)[0])
    assert not np.allclose(one.logits[1], two.logits[1])
    shapes = [x.shape[1:3] for x in one.details["features"]]
    assert shapes == [(8, 12), (4, 6), (2, 3), (1, 2)]  # not C2
    states = np.asarray(one.details["states"]), np.asarray(two.details["states"])
    np.testing.assert_array_equal(states[0][:, :, :2], states[1][:, :, :2])  # the context


def test_points_have_no_cells():
    with pytest.raises(UserError, match=r"model.roi_size=4 .*box_refinement"):
        network_config(SMALL | {"box_refinement": False}, 4)


def test_without_it_nothing_is_added(network):
    plain = Network(dataclasses.replace(network.config, roi_size=0))
    more = network.param_shapes.keys() - plain.param_shapes.keys()
    assert more and all("decoder/1/reading/" in path for path in more)
    assert plain.param_shapes.keys() <= network.param_shapes.keys()
