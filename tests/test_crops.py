"""A person's two crops against the code of the two-stage networks (tests/golden/two_stage)."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from dsct_jax.crops import CropConfig, bilinear, cut_crops, round_crop
from dsct_jax.errors import UserError

CHAINS = {
    "glamor": CropConfig(),
    "caer": CropConfig(resize="pil", context_corner=(8, 30)),
    "emo_cv": CropConfig(
        resize="opencv",
        subject_size=128,
        context_size=224,
        context_resize=(224, 224),
        context_corner=(0, 0),
        face_in_context="visible",
    ),
}
CHAINS["emo_pil"] = dataclasses.replace(CHAINS["emo_cv"], resize="bicubic")
CHAINS["emo_masked"] = dataclasses.replace(CHAINS["emo_cv"], face_in_context="masked_own")
# chain -> (name of the context, of the subject) in the file; "_rowsN": every N-th row is stored
STORED = {
    "glamor": ("glamor_context_without_jpeg", "glamor_face"),
    "caer": ("caer_context_u8", "caer_face_u8"),
    "emo_cv": ("emo_context_cv_u8", "emo_body_cv_u8"),
    "emo_pil": ("emo_context_pil_u8", "emo_body_pil_u8"),
    "emo_masked": ("emo_masked_context_cv_u8", ""),
}
# in units of the stored values
TOLERANCE = {"glamor": 1e-6, "caer": 0, "emo_cv": 1, "emo_pil": 0, "emo_masked": 1}


@pytest.fixture(scope="module")
def stored(pytestconfig):
    path = pytestconfig.getoption("--golden-two-stage") / "preprocessing.npz"
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("chain", CHAINS)
def test_golden_crops(stored, chain):
    cases = [name.removesuffix("/image") for name in stored if name.endswith("/image")]
    compared = 0
    for case in cases:
        image, box = Image.fromarray(stored[f"{case}/image"]), stored[f"{case}/box"]
        for crop, name in zip(cut_crops(image, box, CHAINS[chain]), STORED[chain], strict=True):
            for rows in (1, 2, 4):
                key = f"{case}/{name}" + (f"_rows{rows}" if rows > 1 else "")
                if name and key in stored:
                    found = crop[::rows].astype(np.float64) / (255 if chain == "glamor" else 1)
                    wanted = stored[key].astype(np.float64)
                    distance = np.abs(found - wanted).max()
                    assert distance <= TOLERANCE[chain], (key, distance)
                    compared += 1
    assert compared >= 4, "nothing was stored for this chain"


def test_masks():
    image = Image.new("RGB", (60, 40), "white")
    boxes = np.array([(10, 5, 20, 15), (40, 20, 50, 30)], np.float32)
    views = {}
    for how in ("visible", "masked_own", "masked_all"):
        config = CropConfig(face_in_context=how, context_resize=(112, 112), context_corner=(0, 0))
        views[how] = cut_crops(image, boxes[0], config, everybody=boxes)[0]
    black = {how: (view == 0).all(-1).mean() for how, view in views.items()}
    assert black["visible"] == 0
    assert 0.02 < black["masked_own"] < 100 / 2400
    assert black["masked_all"] == pytest.approx(2 * black["masked_own"], rel=0.1)


def test_a_drawn_corner_and_rounding():
    pixels = np.arange(128 * 171 * 3, dtype=np.uint32).reshape(128, 171, 3) % 251
    image = Image.fromarray(pixels.astype(np.uint8))
    config = CropConfig(face_in_context="visible")
    context, _ = cut_crops(image, np.array([0, 0, 9, 9]), config, corner=(3, 5))
    np.testing.assert_array_equal(round_crop(context), pixels[3:115, 5:117])
    assert round_crop(context).dtype == np.uint8


def test_bilinear_by_hand():
    found = bilinear(np.array([0.0, 10.0]).reshape(2, 1, 1), 4)
    np.testing.assert_allclose(found.ravel(), [0, 2.5, 7.5, 10])


def test_what_does_not_fit_is_one_line():
    with pytest.raises(UserError, match=r"model\.context_resize=\(100, 171\) .* at least .*112"):
        CropConfig(context_resize=(100, 171))
    with pytest.raises(UserError, match=r"model\.context_corner=\(8, 90\) .* at most \(16, 59\)"):
        CropConfig(context_corner=(8, 90))
