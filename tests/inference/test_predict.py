"""What `dsct_jax.predict` takes: one image or several, paths, PIL images and arrays, upright."""

import numpy as np
import pytest
from PIL import Image

import dsct_jax
from dsct_jax.batch import Predictions
from dsct_jax.errors import UserError
from dsct_jax.inference.introspection import introspect
from dsct_jax.inference.load import Model
from dsct_jax.inference.predict import read_rgb
from tests.commands.test_predict import RedFinder, scene

BOX = (10, 10, 50, 40)


@pytest.fixture
def image():
    return scene(80, 60, BOX)


def test_one_image_gives_its_people_and_a_list_gives_lists(image, tmp_path):
    image.save(tmp_path / "red.png")
    expected = dsct_jax.predict(RedFinder(), image)
    assert len(expected) == 1
    np.testing.assert_allclose(expected[0].box, BOX, atol=2)
    for one in (np.asarray(image), tmp_path / "red.png", str(tmp_path / "red.png")):
        assert dsct_jax.predict(RedFinder(), one) == expected
        assert dsct_jax.predict(RedFinder(), [one]) == [expected]
    kinds = [image, np.asarray(image), tmp_path / "red.png"]
    assert dsct_jax.predict(RedFinder(), kinds) == [expected] * 3
    assert dsct_jax.predict(RedFinder(), iter(kinds)) == [expected] * 3
    assert dsct_jax.predict(RedFinder(), ()) == []


@pytest.mark.parametrize("as_path", [True, False])
def test_a_portrait_is_put_upright(tmp_path, as_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show it
    path = tmp_path / "sideways.jpg"
    scene(200, 150, (40, 30, 120, 130)).save(path, exif=exif, quality=95)
    with Image.open(path) as opened:
        (subject,) = dsct_jax.predict(RedFinder(), path if as_path else opened)
    np.testing.assert_allclose(subject.box, (20, 40, 120, 120), atol=5)  # (x, y) -> (149 - y, x)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((2, 60, 80, 3), np.uint8), "several images a list"),
        (list(np.zeros((60, 80, 3), np.uint8)), r"not uint8 \[80, 3\]"),  # rows of an image
        (np.zeros((60, 80, 3)), "must be uint8"),
        ("nowhere.png", "nowhere.png: no such image file"),
        ([Image.new("F", (8, 8))], "a PIL image: grey of 32-bit floating point"),
        ([Image.new("I", (8, 8))], "32-bit whole numbers"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(images, says):
    model = RedFinder()
    with pytest.raises(UserError, match=says) as error:
        dsct_jax.predict(model, images)
    assert "\n" not in str(error.value)
    assert model.shapes == []  # before anything was computed


@pytest.mark.parametrize("thing", [None, 3, [[[0, 0, 0]]]])
def test_other_things_are_named(thing):
    with pytest.raises(UserError, match=f"a uint8 array, not {type(thing).__name__}"):
        read_rgb(thing)


def test_a_damaged_image_that_was_opened_is_named(image, tmp_path):
    path = tmp_path / "cut.png"
    image.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with Image.open(path) as opened, pytest.raises(UserError, match=r"cut\.png"):
        dsct_jax.predict(RedFinder(), opened)


def test_a_network_that_reports_less_is_named(image):
    """What an introspection shows is DSCT's; another network is refused in one line."""

    class Other(RedFinder, Model):
        config = {"model": {"name": "other"}}  # noqa: RUF012

        def __call__(self, images, padding_mask, *, return_details=False):
            answer = super().__call__(images, padding_mask)
            return Predictions(
                answer.logits, answer.boxes, {"memory": 1} if return_details else None
            )

    named = r"config\.model\.name='other'.*features, reference_points"
    with pytest.raises(UserError, match=named) as error:
        introspect(Other(), image)
    assert "\n" not in str(error.value)
