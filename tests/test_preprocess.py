"""Deterministic preprocessing against the released transforms (tests/golden/augment.npz), and image
files of every kind.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsct_jax.errors import UserError
from dsct_jax.preprocess import (
    MEAN,
    STD,
    Preprocessing,
    choose_bucket,
    decode_image,
    fit_bucket,
    normalize,
    pad_to,
    prepare_image,
    resize,
    resized_size,
    shrink_to_fit,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "augment.npz")
SIDES = st.integers(1, 3000)
BUCKETS = ((800, 1344), (1344, 800), (1088, 1088))


def golden_image(case: int) -> Image.Image:
    """The input of a golden case, by the recipe that the golden file documents."""
    height, width = GOLDEN[f"{case}/in_size"].tolist()
    rng = np.random.RandomState(int(GOLDEN["image_seeds"][case]))
    coarse = rng.randint(0, 256, (height // 16 + 2, width // 16 + 2, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def test_resized_size_equals_the_released_table():
    for height, width, short_side, max_long_side, out_height, out_width in GOLDEN[
        "resize_table"
    ].tolist():
        assert resized_size(height, width, short_side, max_long_side or None) == (
            out_height,
            out_width,
        )


@pytest.mark.parametrize("case", [0, 1, 2])
def test_evaluation_transform_equals_the_released_one(case):
    image = golden_image(case)
    np.testing.assert_array_equal(np.asarray(image)[::16, ::16], GOLDEN[f"{case}/in_image_small"])
    size = resized_size(image.height, image.width, 800, 1333)
    assert size == tuple(GOLDEN[f"{case}/out_size"])
    pixels = np.asarray(resize(image, size))
    output = np.asarray(normalize(jnp.asarray(pixels)[None], jnp.zeros((1, *size), bool)))[0]
    np.testing.assert_allclose(
        output[100:108, 200:208].transpose(2, 0, 1), GOLDEN[f"{case}/out_patch"], atol=1e-6
    )
    np.testing.assert_allclose(
        output.mean((0, 1), dtype=np.float64), GOLDEN[f"{case}/out_channel_mean"], atol=1e-5
    )
    np.testing.assert_allclose(
        output.std((0, 1), ddof=1, dtype=np.float64), GOLDEN[f"{case}/out_channel_std"], atol=1e-5
    )


def test_normalize_uses_imagenet_statistics_and_leaves_padding_at_zero():
    images = jnp.full((1, 4, 6, 3), 255, jnp.uint8)
    mask = jnp.zeros((1, 4, 6), bool).at[:, 3:].set(True).at[:, :, 5:].set(True)
    output = np.asarray(normalize(images, mask))
    np.testing.assert_allclose(output[0, 2, 4], (1 - np.array(MEAN)) / np.array(STD), rtol=1e-6)
    assert output.dtype == np.float32
    assert not output[0, 3].any() and not output[0, :, 5].any()
    assert (output[0, :3, :5] != 0).all()


@settings(deadline=None)
@given(SIDES, SIDES)
def test_fit_bucket_holds_the_size_and_changes_only_what_fits_nowhere(height, width):
    size, bucket = fit_bucket((height, width), BUCKETS)
    assert bucket in BUCKETS and 1 <= size[0] <= bucket[0] and 1 <= size[1] <= bucket[1]
    fitting = [one for one in BUCKETS if one[0] >= height and one[1] >= width]
    if fitting:
        assert size == (height, width)
        assert bucket[0] * bucket[1] == min(one[0] * one[1] for one in fitting)
        assert choose_bucket([(height, width)], BUCKETS) == bucket
    else:
        assert size[0] == bucket[0] or size[1] == bucket[1]  # no smaller than it must be
        assert all(size[0] >= shrink_to_fit((height, width), one)[0] for one in BUCKETS)


def test_choose_bucket_of_several_sizes_holds_the_largest_of_both_sides():
    assert choose_bucket([(800, 1000), (1000, 800)], BUCKETS) == (1088, 1088)
    assert choose_bucket([(800, 1200), (1200, 800)], BUCKETS) is None


def test_prepare_image_pads_at_the_right_and_at_the_bottom():
    image = Image.new("RGB", (40, 20), (10, 20, 30))
    canvas, size = prepare_image(
        image, Preprocessing(short_side=32, max_long_side=100, buckets=((48, 80), (80, 48)))
    )
    assert size == (32, 64) and canvas.shape == (48, 80, 3)
    assert (
        (canvas[:32, :64] == (10, 20, 30)).all()
        and not canvas[32:].any()
        and not canvas[:, 64:].any()
    )
    np.testing.assert_array_equal(pad_to(canvas[:32, :64], (48, 80)), canvas)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1"])
def test_decode_image_makes_rgb_of_every_mode(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    gray = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (8, 4)))
    path = tmp_path / f"image.{suffix}"
    gray.convert("RGB").convert(mode).save(path)
    image = decode_image(path)
    assert image.mode == "RGB" and image.size == (8, 8)
    if suffix == "png":
        np.testing.assert_array_equal(np.asarray(image), np.asarray(gray.convert("RGB")))


def test_decode_image_drops_alpha_without_blending(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (3, 3), (200, 100, 50, 0)).save(path)
    assert decode_image(path).getpixel((1, 1)) == (200, 100, 50)


def test_decode_image_reads_palettes_with_transparency_and_sixteen_bits(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    assert [decode_image(tmp_path / "palette.png").getpixel((x, 0)) for x in (0, 1)] == [
        (9, 8, 7),
        (200, 100, 50),
    ]
    Image.fromarray(np.array([[0x1234, 0xFF00]], np.uint16)).save(tmp_path / "deep.png")
    assert [decode_image(tmp_path / "deep.png").getpixel((x, 0)) for x in (0, 1)] == [
        (0x12,) * 3,
        (0xFF,) * 3,
    ]


@pytest.mark.parametrize("largest", [4095, 65535])
def test_decode_image_reads_sixteen_bits_that_pillow_opens_as_mode_i(tmp_path, largest):
    grey = np.array([[0, largest // 2, largest]], ">u2")
    path = tmp_path / "deep.pgm"
    path.write_bytes(b"P5\n3 1\n%d\n" % largest + grey.tobytes())
    with Image.open(path) as image:
        assert image.mode == "I"
    np.testing.assert_array_equal(np.asarray(decode_image(path))[0, :, 0], [0, 127, 255])


@pytest.mark.parametrize(("mode", "kind"), [("I", np.int32), ("F", np.float32)])
def test_decode_image_refuses_grey_without_a_range(tmp_path, mode, kind):
    path = tmp_path / "grey.tif"
    Image.fromarray(np.array([[0, 128, 255]], kind)).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    with pytest.raises(UserError, match=rf"grey\.tif: .*PIL mode {mode}"):
        decode_image(path)


def test_decode_image_keeps_the_stored_frame_unless_asked_for_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to show"
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode_image(tmp_path / "turned.jpg").size == (20, 10)
    assert decode_image(tmp_path / "turned.jpg", upright=True).size == (10, 20)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "cut png"])
def test_decode_image_names_the_file_it_cannot_read(tmp_path, damage):
    path = tmp_path / "broken.jpg"
    if damage != "missing":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format="png" if damage == "cut png" else "jpeg")
        whole = path.read_bytes()
        path.write_bytes(
            {"empty": b"", "text": b"not an image"}.get(damage, whole[: len(whole) // 2])
        )
    with pytest.raises(UserError, match=r"broken\.jpg") as error:
        decode_image(path)
    assert "\n" not in str(error.value)
