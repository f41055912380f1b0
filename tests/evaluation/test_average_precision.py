"""AP under its three definitions: scikit-learn, the definitions written out, and resampling against
repetition.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sklearn_metrics

from dsct_jax.evaluation.measures import (
    DEFINITIONS,
    average_precision,
    precision_at_recall,
    resampled_average_precision,
)

TIED = st.sampled_from([0.0, 0.1, 0.1 + 1e-12, 0.5, 1.0])


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 30), st.integers(1, 4))
def test_average_precision_equals_scikit_learn_with_ties_and_without_positives(data, n, k):
    scores = data.draw(
        hnp.arrays(np.float64, (n, k), elements=st.sampled_from([0.0, 0.1, 0.1 + 1e-12, 0.5, 1.0]))
    )
    labels = data.draw(hnp.arrays(bool, (n, k)))
    ours = average_precision(scores, labels)
    for column in range(k):
        expected = (
            sklearn_metrics.average_precision_score(labels[:, column], scores[:, column])
            if labels[:, column].any()
            else 0.0
        )
        np.testing.assert_allclose(ours[column], expected, atol=1e-12)


def test_average_precision_by_hand_does_not_depend_on_the_order_of_ties():
    scores, labels = (
        np.array([[0.9], [0.5], [0.5], [0.1]]),
        np.array([[True], [True], [False], [False]]),
    )
    expected = 0.5 * 1 + 0.5 * 2 / 3
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]):
        np.testing.assert_allclose(average_precision(scores[order], labels[order]), [expected])
    np.testing.assert_array_equal(
        average_precision(np.zeros((0, 3)), np.zeros((0, 3), bool)), np.zeros(3)
    )


def written_out(scores, labels, definition):
    """AP of one class from its precision and recall at every distinct score, by the texts of VOC
    2007 and 2010.
    """
    points = []
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        points.append((labels[chosen].sum() / labels.sum(), labels[chosen].mean()))
    if definition == "eleven_point":
        best = [
            max(
                (precision for recall, precision in points if recall >= tenth / 10 - 1e-12),
                default=0.0,
            )
            for tenth in range(11)
        ]
        return np.mean(best)
    area, before = 0.0, 0.0
    for i, (recall, precision) in enumerate(points):
        height = precision if definition == "step" else max(later for _, later in points[i:])
        area, before = area + (recall - before) * height, recall
    return area


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 25), st.sampled_from(DEFINITIONS))
def test_every_definition_equals_its_text(data, n, definition):
    scores = data.draw(hnp.arrays(np.float64, n, elements=TIED | st.floats(0, 1)))
    labels = data.draw(hnp.arrays(bool, n))
    ours = average_precision(scores[:, None], labels[:, None], definition=definition)[0]
    np.testing.assert_allclose(
        ours, written_out(scores, labels, definition) if labels.any() else 0.0, atol=1e-12
    )


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 20), st.integers(1, 3), st.integers(1, 5))
def test_a_resample_equals_people_repeated(data, n, k, r):
    scores = data.draw(hnp.arrays(np.float64, (n, k), elements=TIED))
    labels = data.draw(hnp.arrays(bool, (n, k)))
    weights = data.draw(hnp.arrays(np.int16, (r, n), elements=st.integers(0, 3)))
    values = resampled_average_precision(scores, labels, weights, definitions=DEFINITIONS)
    for definition in DEFINITIONS:
        for row, times in zip(values[definition], weights, strict=True):
            expected = average_precision(
                np.repeat(scores, times, 0), np.repeat(labels, times, 0), definition=definition
            )
            np.testing.assert_allclose(row, expected, atol=1e-12)


def test_the_definitions_are_ordered_and_need_not_agree():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((300, 5)), rng.random((300, 5)) < 0.2
    step, envelope, eleven = (
        average_precision(scores, labels, definition=name) for name in DEFINITIONS
    )
    assert (envelope > step).all()
    assert (np.abs(eleven - step) > 1e-3).all()
    np.testing.assert_array_equal(
        average_precision(labels.astype(float), labels, definition="eleven_point"), np.ones(5)
    )


def test_the_curve_for_drawing_is_the_envelope():
    scores, labels = (
        np.array([[0.9], [0.8], [0.7], [0.6]]),
        np.array([[True], [False], [True], [False]]),
    )
    np.testing.assert_allclose(
        precision_at_recall(scores, labels, np.array([0.0, 0.5, 0.51, 1.0]))[:, 0],
        [1, 1, 2 / 3, 2 / 3],
    )
    np.testing.assert_array_equal(
        precision_at_recall(scores, np.zeros((4, 1), bool), np.array([0.0, 1.0])), np.zeros((2, 1))
    )


def test_an_unknown_definition_is_refused():
    with pytest.raises(ValueError, match="interpolated"):
        average_precision(np.zeros((1, 1)), np.ones((1, 1), bool), definition="interpolated")
    with pytest.raises(ValueError, match="interpolated"):
        resampled_average_precision(
            np.zeros((1, 1)),
            np.ones((1, 1), bool),
            np.ones((1, 1), np.int16),
            definitions=["interpolated"],
        )
