"""Temperature, thresholds, errors of calibration, and thresholds.json."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import f1_score

from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import (
    calibration_errors,
    fit_min_confidence,
    fit_temperature,
    fit_thresholds,
    negative_log_likelihood,
    read_fit,
    save_fit,
    stored_decoder,
)
from dsct_jax.postprocess import Decoder

NAMES = ("calm", "glad")
PLAIN = Decoder(NAMES, True, True)
FITTED = Decoder(NAMES, True, True, 1.25, (0.1 + 0.2, 0.75), 0.1 + 0.1, "val", 12)
TEXT = json.dumps(FITTED.to_dict())
# thresholds.json, or the text "calibration" of a .safetensors file, as they were before.
OLDER = {
    "class_names": NAMES,
    "temperature": 1.25,
    "thresholds": FITTED.thresholds,
    "split": "val",
    "people": 12,
    "checkpoint": "step 6",
    "min_confidence": FITTED.min_confidence,
}


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 20))
def test_no_threshold_has_a_better_f1(data, n):
    probabilities = data.draw(
        hnp.arrays(np.float64, (n, 1), elements=st.sampled_from([0.0, 0.2, 0.2 + 1e-9, 0.7, 1.0]))
    )
    labels = data.draw(hnp.arrays(bool, (n, 1)))
    (threshold,) = fit_thresholds(probabilities, labels)
    assert 0 <= threshold <= 1
    if not labels.any():
        assert threshold == 0.5
        return

    def f1(cut):
        return f1_score(labels[:, 0], probabilities[:, 0] > cut, zero_division=0)

    # Eq. 4 says "more than": nobody's probability 0 can be reached by any threshold.
    assert f1(threshold) >= max(f1(cut) for cut in [0.0, *np.unique(probabilities)]) - 1e-12


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 12), st.integers(0, 5))
def test_no_certainty_finds_people_better(data, n, missed):
    confidences = data.draw(
        hnp.arrays(np.float64, n, elements=st.sampled_from([0.0, 0.05, 0.2, 0.7, 1.0]))
    )
    finds = data.draw(hnp.arrays(bool, n))
    people = int(finds.sum()) + missed
    cut = fit_min_confidence(confidences, finds, people=people)
    if not finds.any():
        assert cut is None
        return

    def f1(chosen):
        return 2 * (finds & chosen).sum() / (chosen.sum() + people)

    assert (
        f1(confidences >= cut)
        >= max(f1(confidences > level) for level in [0.0, *np.unique(confidences)]) - 1e-12
    )


def test_a_fit_of_older_versions_is_read():
    assert PLAIN.with_fit(json.dumps(OLDER), where="here") == FITTED
    del OLDER["min_confidence"], OLDER["checkpoint"]
    unsure = dataclasses.replace(FITTED, min_confidence=None)
    assert PLAIN.with_fit(OLDER, where="here") == unsure


@pytest.mark.parametrize("multi_label", [True, False])
def test_the_temperature_that_made_the_labels_is_found(multi_label):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 4))
    if multi_label:
        labels = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    else:
        exponentials = np.exp(logits)
        drawn = (
            rng.random((len(logits), 1))
            > (exponentials / exponentials.sum(-1, keepdims=True)).cumsum(-1)
        ).sum(-1)
        labels = np.eye(4, dtype=bool)[np.minimum(drawn, 3)]
    assert fit_temperature(3 * logits, labels, multi_label=multi_label) == pytest.approx(
        3, rel=0.05
    )
    assert negative_log_likelihood(
        logits, labels, multi_label=multi_label
    ) < negative_log_likelihood(3 * logits, labels, multi_label=multi_label)


def test_errors_by_hand():
    probabilities, labels = (
        np.array([[0.9], [0.9], [0.2], [0.2]]),
        np.array([[True], [False], [False], [False]]),
    )
    errors = calibration_errors(probabilities, labels, multi_label=True)
    assert errors["ece"] == pytest.approx((2 * 0.4 + 2 * 0.2) / 4)
    assert errors["brier"] == pytest.approx((0.01 + 0.81 + 0.04 + 0.04) / 4)
    assert [(entry["count"], entry["true"]) for entry in errors["bins"]] == [(2, 0.0), (2, 0.5)]
    certain = calibration_errors(
        np.array([[1.0, 0.0]]), np.array([[True, False]]), multi_label=False
    )
    assert (certain["ece"], certain["brier"], certain["bins"][0]["high"]) == (0.0, 0.0, 1.0)


def test_the_file_keeps_every_digit_and_is_whole_or_not_there(tmp_path):
    path = tmp_path / "thresholds.json"
    save_fit(FITTED, path, checkpoint="step 6")
    assert read_fit(path, PLAIN) == (FITTED, "step 6")
    assert PLAIN.with_fit(TEXT, where="here") == FITTED
    assert Decoder.from_dict(json.loads(TEXT), where="here") == FITTED
    assert [path.name for path in tmp_path.iterdir()] == ["thresholds.json"]


def test_a_run_without_a_fit_and_a_fit_of_other_weights(tmp_path, caplog):
    assert stored_decoder(PLAIN, {}, tmp_path, 6) == PLAIN
    save_fit(FITTED, tmp_path / "thresholds.json", checkpoint="step 6")
    assert stored_decoder(PLAIN, {}, tmp_path, 6) == FITTED
    with caplog.at_level(logging.WARNING):
        assert stored_decoder(PLAIN, {}, tmp_path, 8) == PLAIN
    assert "fitted for step 6, not for step 8" in caplog.text
    own = dataclasses.replace(FITTED, temperature=2.0)
    validated = {"decoder": own.to_dict()}
    assert stored_decoder(PLAIN, validated, tmp_path, 6) == FITTED  # fitted again by the user
    caplog.clear()
    assert stored_decoder(PLAIN, validated, tmp_path, 8) == own
    assert not caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a stored fit"),
        ("{}", "not a stored fit"),
        ("[3]", "not a stored fit"),
        (
            TEXT.replace("glad", "sad"),
            "fitted for the classes calm, sad, not for calm, glad",
        ),
        (TEXT.replace("1.25", "0.0"), "temperature=0.0 must be more than 0"),
        (TEXT.replace("0.75", "7.5"), r"thresholds must be 2 numbers in \[0, 1\]"),
        (TEXT.replace(": 0.2,", ": 1.2,"), r"min_confidence=1.2 must lie in \[0, 1\]"),
        (TEXT.replace(", 0.75", ""), r"thresholds must be 2 numbers in \[0, 1\]"),
    ],
)
def test_a_damaged_file_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        PLAIN.with_fit(text, where="here")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("here: ")
