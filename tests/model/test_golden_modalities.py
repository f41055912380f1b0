"""The frozen networks of Table 13 against torchvision's and Places365's: every level that is used,
with the published names (tests/golden/two_stage/modalities.npz, or `--golden-two-stage=DIR`).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsct_jax.batch import padding_mask
from dsct_jax.model.build import flatten, unflatten
from dsct_jax.model.layers import NormStatistic
from dsct_jax.model.modalities import MODALITIES, PREFIX, Modality
from dsct_jax.preprocess import normalize
from dsct_jax.weights import modalities
from tests.model.test_golden_two_stage import weights_of

NAMES = {
    "scene": ("scene/names", "scene/shapes"),
    "semantic": ("semantic/names", "semantic/shapes"),
    "instance": ("instance/backbone_names_current", "instance/shapes"),
}


@pytest.fixture(scope="module")
def arrays(pytestconfig):
    path = pytestconfig.getoption("--golden-two-stage") / "modalities.npz"
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def maps_of(arrays, monkeypatch, name: str, *, pyramid: bool):
    """What the network answers with the golden file's weights."""
    network = nnx.eval_shape(lambda: Modality(name, "resnet50", pyramid=pyramid, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(network, NormStatistic)
    start = f"{PREFIX}{name}/"
    shapes = {start + k: v.shape for k, v in flatten(nnx.to_pure_dict(state)).items()}
    tensors = weights_of(arrays, *NAMES[name])
    monkeypatch.setattr(modalities, "read_tensors", lambda _: tensors)
    values = modalities._read(Path("published.pth"), name, shapes)
    image = arrays["image_u8"][None]
    sizes = jnp.array([image.shape[1:3]], jnp.int32)
    pixels = normalize(jnp.asarray(image), padding_mask(sizes, *image.shape[1:3]))

    @jax.jit
    def run(values, pixels):
        nnx.replace_by_pure_dict(
            state, unflatten({k.removeprefix(start): v for k, v in values.items()})
        )
        return nnx.merge(graph, state)(pixels)

    return run(values, pixels)


def require_close(arrays, prefix: str, found, tolerance: float) -> None:
    """Statistics over the map and its first channels, as the file has them."""
    found = np.asarray(found[0]).transpose(2, 0, 1)  # NCHW
    assert found.shape == tuple(arrays[f"{prefix}/shape"])
    for name, value in (
        ("spatial_mean", found.mean((1, 2))),
        ("channel_mean", found.mean(0)),
        ("first_channels", found[: len(arrays[f"{prefix}/first_channels"])]),
    ):
        np.testing.assert_allclose(value, arrays[f"{prefix}/{name}"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODALITIES)
def test_every_level(arrays, monkeypatch, name):
    levels = maps_of(arrays, monkeypatch, name, pyramid=False)
    # without dilation, which the cells of stride 16 and 32 do not notice
    prefixes = {"semantic": ["semantic", *["semantic_undilated"] * 2]}.get(name, [name] * 3)
    for prefix, level, found in zip(prefixes, ("c3", "c4", "c5"), levels, strict=True):
        require_close(arrays, f"{prefix}/{level}", found, 1e-5)
    if name == "semantic":
        for level, step in (("c4", 2), ("c5", 4)):
            dilated = arrays[f"semantic/{level}/first_channels"][:, ::step, ::step]
            undilated = arrays[f"semantic_undilated/{level}/first_channels"]
            np.testing.assert_allclose(dilated, undilated, rtol=0, atol=1e-5)


def test_the_feature_pyramid(arrays, monkeypatch):
    levels = maps_of(arrays, monkeypatch, "instance", pyramid=True)
    for level, found in zip(("1", "2", "3", "pool"), levels, strict=True):
        require_close(arrays, f"instance/fpn_{level}", found, 3e-5)
    wrong = arrays["instance_eps_1e-5/fpn_2/spatial_mean"]
    found = np.asarray(levels[1][0]).mean((0, 1))
    assert np.abs(found - wrong).max() > 1e-4  # the published weights have no epsilon
