"""What counts as right."""

import numpy as np

from clip_adapter.adapters.scoring import is_right


def test_a_row_is_right_where_the_first_of_its_largest_logits_is_the_labels():
    rng = np.random.default_rng(0)
    # Few values, so that most rows have ties.
    logits = rng.integers(0, 3, size=(500, 7)).astype(np.float32)
    labels = rng.integers(0, 7, size=500)
    expected = logits.argmax(axis=1) == labels
    assert 50 < expected.sum() < 450
    np.testing.assert_array_equal(is_right(logits, labels), expected)


def test_infinite_logits_are_compared_and_nan_is_never_right():
    logits = np.array([[0, np.inf], [-np.inf, 0], [np.nan, 1], [1, np.nan]], np.float32)
    np.testing.assert_array_equal(is_right(logits, np.array([1, 1, 1, 1])), [1, 1, 0, 0])
