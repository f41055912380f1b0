"""What the DETR family shares: sizes, denoising, the last logit, and steps of real training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsct_jax.batch import Targets
from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.build import Network, network_config
from dsct_jax.model.denoising import (
    embed_labels,
    hidden_queries,
    move_center_and_size,
    move_corners,
    noisy_people,
)
from dsct_jax.model.heads import ClassHead
from dsct_jax.model.layers import DropoutNoise
from dsct_jax.training.optimizer import multipliers

# of the authors' models with ResNet-50, frozen stem and layer1 included
PARAMETERS = {
    ("detr", 7): 41_503_180,
    ("detr", 91): 41_524_768,
    ("conditional_detr", 7): 43_396_813,
    ("conditional_detr", 91): 43_418_401,
    ("anchor_detr", 7): 37_017_123,
    ("anchor_detr", 91): 37_038_711,
    ("dab_detr", 7): 43_649_929,
    ("dab_detr", 91): 43_671_517,
    ("dn_detr", 7): 43_651_969,
    ("dn_detr", 91): 43_694_977,
}
SETTINGS = {"dn_detr": {"name": "dab_detr", "denoising_groups": 5}}
FAMILY = sorted({name for name, _ in PARAMETERS})


def section(name: str) -> dict:
    return SETTINGS.get(name, {"name": name})


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_the_number_of_parameters_is_the_authors(name, classes):
    shapes = Network(network_config(section(name), classes)).param_shapes
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == PARAMETERS[name, classes]
    frozen = {
        path: shape
        for path, shape in shapes.items()
        if path.startswith(("backbone/stem", "backbone/layer1"))
    }
    assert sum(int(np.prod(shape)) for shape in frozen.values()) == 222_400


@pytest.mark.parametrize("name", FAMILY)
def test_all_but_the_backbone_learns_at_the_full_rate(name):
    config = base.get_config()
    base.use_network(config, section(name)["name"])
    shapes = Network(network_config(section(name), 7)).param_shapes
    rates = multipliers(dict.fromkeys(shapes, 0.0), config.optimizer.rules)
    assert {rates[path] for path in shapes if not path.startswith("backbone/")} == {1.0}
    assert config.model.name == section(name)["name"] and config.optimizer.learning_rate == 1e-4


def test_a_dilated_backbone_halves_the_stride_and_keeps_the_parameters():
    plain, dilated = (
        ResNet(BACKBONES["tiny"], norm="group", dilated=dilated, rngs=nnx.Rngs(0))
        for dilated in (False, True)
    )
    images = jnp.ones((1, 64, 96, 3))
    shapes = [[x.shape[1:3] for x in net(images)] for net in (plain, dilated)]
    assert shapes == [[(8, 12), (4, 6), (2, 3)], [(8, 12), (4, 6), (4, 6)]]
    assert jax.tree.map(jnp.shape, nnx.state(plain)) == jax.tree.map(jnp.shape, nnx.state(dilated))


def test_the_last_logit_is_the_highest_class_or_one_of_its_own():
    x = jnp.ones((2, 3, 8))
    logits = ClassHead(8, 4, subject=False, rngs=nnx.Rngs(0))(x)
    np.testing.assert_array_equal(logits[..., -1], logits[..., :-1].max(-1))
    head = ClassHead(8, 4, subject=True, rngs=nnx.Rngs(0))
    assert head(x).shape == (2, 3, 5) and head.kernel.shape == (8, 5)


def people(*labels: list[int], classes: int = 5) -> Targets:
    """One image; labels [] = a person without any."""
    hot = np.zeros((1, len(labels), classes), np.float32)
    for i, found in enumerate(labels):
        hot[0, i, found] = 1
    boxes = np.tile(np.array([0.5, 0.5, 0.2, 0.4], np.float32), (1, len(labels), 1))
    return Targets(jnp.asarray(boxes), jnp.asarray(hot), jnp.ones((1, len(labels)), bool))


def noise(seed: int = 0) -> DropoutNoise:
    return DropoutNoise(jax.random.split(jax.random.key(seed), 1))


def test_noisy_labels_keep_their_number_and_one_label_becomes_any_class():
    how = {"num_groups": 400, "box_noise": 0.4, "move": move_center_and_size}
    noisy = noisy_people(people([1], [0, 2, 3], []), noise(), label_noise=1.0, **how)
    labels = np.asarray(noisy.labels).reshape(400, 3, 5)
    assert (labels.sum(-1) == [1, 3, 0]).all()
    counts = labels[:, 0].sum(0)
    assert (counts > 50).all() and counts.sum() == 400
    same = noisy_people(people([1], [0, 2, 3], []), noise(), label_noise=0.0, **how)
    assert (
        np.asarray(same.labels).reshape(400, 3, 5)
        == labels[:1] * 0 + people([1], [0, 2, 3], []).labels
    ).all()
    assert (same.people == np.arange(1200) % 3).all()


def test_box_noise_of_dn_and_of_dino():
    how = {"num_groups": 200, "label_noise": 0.0, "box_noise": 0.4}
    boxes = np.asarray(noisy_people(people([1]), noise(), move=move_center_and_size, **how).boxes)
    moved = np.abs(boxes[0] - [0.5, 0.5, 0.2, 0.4]) / np.array([0.1, 0.2, 0.2, 0.4]) / 0.4
    assert (moved <= 1 + 1e-5).all() and (moved.max(0) > 0.9).all()
    noisy = noisy_people(people([1], [2]), noise(), move=move_corners, negatives=True, **how)
    assert (np.asarray(noisy.negative[0]) == np.tile([False, False, True, True], 200)).all()
    corners = np.concatenate(
        [noisy.boxes[0, :, :2] + s * noisy.boxes[0, :, 2:] / 2 for s in (-1, 1)], -1
    )
    moved = np.abs(corners - [0.4, 0.3, 0.6, 0.7]) / np.array([0.1, 0.2, 0.1, 0.2]) / 0.4
    far = np.asarray(noisy.negative[0])
    assert (moved[~far] <= 1 + 1e-5).all() and (moved[far] >= 1 - 1e-5).all()


def test_labels_are_embedded_as_the_mean_of_theirs():
    table = jnp.asarray(np.arange(12, dtype=np.float32).reshape(6, 2))
    found = embed_labels(table, people([1], [0, 2], []).labels)
    np.testing.assert_array_equal(found[0], [table[1], (table[0] + table[2]) / 2, table[5]])


def test_groups_see_themselves_and_those_who_search_and_are_not_seen_by_them():
    hidden = hidden_queries(2, 1, 2)
    np.testing.assert_array_equal(hidden, [[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
