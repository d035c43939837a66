"""What counts as right, and how likely at the best temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_adapter.adapters.engine.scoring import (
    AT_ONCE,
    Scored,
    balanced,
    is_right,
    pooled,
    score,
    validation_score,
)
from clip_adapter.adapters.method import Task
from tests.adapters.tasks import tempered_nll


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


def logits_of(right: float, scale: float, rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Five classes; `right`: by how much the label's logit is larger, in deviations."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, rows)
    logits = rng.normal(size=(rows, 5))
    logits[np.arange(rows), labels] += right
    return (scale * logits).astype(np.float32), labels


@pytest.mark.parametrize("right", [-1.0, 0.0, 0.5, 2.0, 30.0])
def test_likelihood_is_that_of_the_best_temperature_at_any_scale(right: float):
    """`right` of −1 prefers the largest temperature, 30 the smallest."""
    found = []
    for scale in (1e-3, 1.0, 1e3):
        logits, labels = logits_of(right, scale)
        scored = jax.jit(score)(logits, labels)
        assert scored.score[0] == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
        np.testing.assert_allclose(scored.score[1], np.mean(scored.losses), rtol=1e-6)
        assert scored.score[1] == pytest.approx(tempered_nll(logits, labels), rel=1e-4, abs=1e-5)
        found.append(np.asarray(scored.losses))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-3, atol=1e-6)


def task_of(logits: np.ndarray, labels: np.ndarray) -> Task:
    """Whose validation features are the logits."""
    return Task(None, None, jnp.asarray(logits), jnp.asarray(labels), None, None)


def compiled(task: Task, at_once: int = AT_ONCE) -> Scored:
    """How it does, as one program instead of one for each operation."""
    return jax.jit(lambda task: validation_score(lambda rows: rows, task, at_once))(task)


def test_many_rows_are_judged_in_blocks_at_a_temperature_of_all():
    logits, labels = logits_of(1.0, 5.0, rows=2 * AT_ONCE + 7)
    order = np.argsort(labels, kind="stable")  # class by class, as validation images lie
    task, expected = task_of(logits[order], labels[order]), tempered_nll(logits, labels)
    for found in (compiled(task), compiled(task, len(labels))):
        assert found.score[1] == pytest.approx(expected, rel=1e-3)
        np.testing.assert_array_equal(found.right, (logits.argmax(axis=1) == labels)[order])


def test_balanced_accuracy_is_the_mean_of_recalls_over_all_folds():
    """Class 0 has 8 images in two folds, class 1 two, class 2 none."""
    right = [np.array([1, 1, 1, 0, 0]), np.array([1, 1, 1, 1, 0])]
    labels = [np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 0, 1])]
    folds = []
    for good, own in zip(right, labels, strict=True):
        logits = np.zeros((5, 3), np.float32)
        logits[np.arange(5), np.where(good, own, 2)] = 1
        folds.append(task_of(logits, own))
    scores = [compiled(fold).score for fold in balanced(folds)]
    accuracy, _ = pooled(scores, balanced(folds))
    assert accuracy == pytest.approx((7 / 8 + 0) / 2)
    plain = [compiled(fold).score for fold in folds]
    assert pooled(plain, folds)[0] == pytest.approx(7 / 10)
