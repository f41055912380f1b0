"""The decoder: what it is before a fit, how it is stored, and which query is which person."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.special import expit

from dsct_jax.errors import UserError
from dsct_jax.postprocess import Decoder, Selection

NAMES = ("calm", "glad")
FITTED = Decoder(NAMES, True, True, 1.25, (0.1 + 0.2, 0.75), 0.6, "val", 12)
LOGITS = np.array([[0.5, 2.0, 3.0], [-1.0, 0.2, -3.0], [0.0, 0.0, 0.45]], np.float32)
BOXES = np.array([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2]], np.float32)


@pytest.mark.parametrize(
    ("multi_label", "class_loss", "expected"),
    [(True, "focal", True), (False, "softmax", True), (False, "focal", False)],
)
def test_training_says_what_the_last_logit_means(multi_label, class_loss, expected):
    decoder = Decoder.unfitted(list(NAMES), multi_label=multi_label, class_loss=class_loss)
    assert decoder == Decoder(NAMES, multi_label, expected)
    last = LOGITS[:, 2] if expected else LOGITS[:, :2].max(1)
    np.testing.assert_allclose(decoder.confidence(LOGITS), expit(last.astype(float)))


def test_it_is_stored_as_json_and_comes_back():
    for decoder in (FITTED, Decoder(NAMES, False, False)):
        stored = json.loads(json.dumps(decoder.to_dict()))
        assert Decoder.from_dict(stored, where="here") == decoder


def test_a_fit_says_nothing_about_what_training_knows():
    own = Decoder(NAMES, True, True)
    other = dataclasses.replace(FITTED, multi_label=False, subject_logit=False)
    assert own.with_fit(other.to_dict(), where="here") == FITTED


def test_the_fit_decides_unless_the_user_names_a_number():
    found = FITTED.by_query(LOGITS, BOXES, (100, 200))
    assert list(found) == [0, 2]  # most confident first; query 1 is below 0.6
    assert found[0].labels == ("glad", "calm")
    np.testing.assert_allclose(found[0].box, (80, 40, 120, 60), atol=1e-4)
    assert list(found.values()) == FITTED(LOGITS, BOXES, (100, 200))
    strict, loose = Selection(threshold=0.8), Selection(min_confidence=0.0)
    assert FITTED(LOGITS, BOXES, (100, 200), selection=strict)[0].labels == ("glad",)
    assert len(FITTED(LOGITS, BOXES, (100, 200), selection=loose)) == 3
    assert FITTED.resolve_min_confidence(Selection()) == 0.6
    assert Decoder(NAMES, True, True).resolve_min_confidence(Selection()) == 0.3
    assert FITTED.resolve_thresholds(strict) == (0.8, 0.8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be more than 0"),
        ({"thresholds": (0.5,)}, "thresholds must be 2 numbers"),
        ({"min_confidence": 1.5}, "min_confidence=1.5 must lie in"),
    ],
)
def test_numbers_out_of_range_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(FITTED, **change)
