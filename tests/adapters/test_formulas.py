"""Prompt ensembling and the formulas that methods share, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_adapter.adapters import formulas
from clip_adapter.adapters.method import Batch, Head
from clip_adapter.cache.schema import LARGEST_FEATURE, SMALLEST_FEATURE


def test_templates_are_normalised_before_they_are_averaged():
    rng = np.random.default_rng(0)
    # Templates of very different length, where the mean of raw features is something else.
    text = rng.normal(size=(5, 7, 16)) * np.logspace(-1, 2, 7)[:, None]
    each = text / np.linalg.norm(text, axis=-1, keepdims=True)
    mean = each.mean(axis=1)
    expected = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    found = np.asarray(formulas.classifier_weights(jnp, jnp.asarray(text, jnp.float32)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    raw = text.mean(axis=1)
    raw /= np.linalg.norm(raw, axis=-1, keepdims=True)
    assert np.abs(found - raw).max() > 0.1


def test_cosine_logits_take_the_scale_as_a_multiplier():
    rng = np.random.default_rng(1)
    features, weights = rng.normal(size=(6, 8)), 9 * rng.normal(size=(3, 8))
    cosines = (features / np.linalg.norm(features, axis=1, keepdims=True)) @ (
        weights / np.linalg.norm(weights, axis=1, keepdims=True)
    ).T
    head = Head(jnp.asarray(weights), 100.0, -10.0)
    found = formulas.cosine_logits(jnp, jnp.asarray(features), head)
    np.testing.assert_allclose(np.asarray(found), 100 * cosines - 10, atol=1e-4)


@pytest.mark.parametrize("size", [SMALLEST_FEATURE, 1e-3, 0.01, 1.0, LARGEST_FEATURE])
def test_the_direction_of_every_feature_that_the_format_takes(size: float):
    """To rounding: nothing of what keeps the zero vector from dividing by zero is left in it."""
    x = np.random.default_rng(2).normal(size=(5, 8))
    x[0, 1:] = 0  # no squared norm is smaller than this one's
    x *= size / np.abs(x).max(axis=1, keepdims=True)
    for xp, asarray in ((np, np.asarray), (jnp, jnp.asarray), (torch, torch.tensor)):
        found = np.asarray(formulas.unit(xp, asarray(x.astype(np.float32))))
        wanted = x / np.linalg.norm(x, axis=1, keepdims=True)
        np.testing.assert_allclose(found, wanted, rtol=5e-7)


def test_the_zero_vector_has_finite_slopes():
    slopes = jax.grad(lambda x: formulas.unit(jnp, x).sum())(jnp.zeros((1, 4)))
    zeros = torch.zeros((1, 4), requires_grad=True)
    formulas.unit(torch, zeros).sum().backward()
    assert np.isfinite(slopes).all() and np.isfinite(zeros.grad.numpy()).all()


def test_a_zero_feature_gives_finite_logits():
    head = Head(jnp.ones((2, 4)), 100.0, 0.0)
    logits = formulas.cosine_logits(jnp, jnp.zeros((1, 4)), head)
    assert np.isfinite(np.asarray(logits)).all()


LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [800.0, -800.0, 0.0]])
LABELS = np.array([0, 2, 0])


def losses() -> np.ndarray:
    shifted = LOGITS - LOGITS.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(3), LABELS]


def test_cross_entropy():
    logits, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    found = formulas.cross_entropy(jnp, logits, labels)
    np.testing.assert_allclose(np.asarray(found), losses(), rtol=1e-6)


def test_the_mean_is_over_the_rows_that_count():
    counts = jnp.array([True, True, False])
    batch = Batch(jnp.zeros((3, 4)), jnp.asarray(LABELS), counts, jax.random.key(0))
    found = formulas.mean_cross_entropy(jnp, jnp.asarray(LOGITS), batch)
    assert float(found) == pytest.approx(losses()[:2].mean(), rel=1e-6)


def test_relu_has_no_slope_at_zero_and_shows_nan():
    assert float(jax.grad(lambda x: formulas.relu(jnp, x))(0.0)) == 0
    found = formulas.relu(np, np.array([-1.0, 0.0, 2.0, np.nan]))
    np.testing.assert_array_equal(found, [0, 0, 2, np.nan])


def test_one_hot_sums_by_class_and_sigmoid_in_three_libraries():
    x, labels = np.linspace(-20, 20, 9, dtype=np.float32), np.array([1, 0])
    rows, own = np.arange(8, dtype=np.float32).reshape(4, 2), np.float32([2, 0, 2, 2])
    for xp, asarray in ((np, np.asarray), (jnp, jnp.asarray), (torch, torch.tensor)):
        np.testing.assert_allclose(
            formulas.sigmoid(xp, asarray(x)), 1 / (1 + np.exp(-x.astype(np.float64))), atol=1e-7
        )
        hot = formulas.one_hot(xp, asarray(labels), 3, asarray(x))
        np.testing.assert_array_equal(hot, np.float32([[0, 1, 0], [1, 0, 0]]))
        assert str(hot.dtype).endswith("float32")
        sums = formulas.sum_by_class(xp, asarray(rows), asarray(own), 4)
        np.testing.assert_array_equal(sums, np.float32([[2, 3], [0, 0], [10, 13], [0, 0]]))
        assert str(sums.dtype).endswith("float32")
