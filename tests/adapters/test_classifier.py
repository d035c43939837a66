"""Prompt ensembling and the metrics, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from clip_adapter.adapters import classifier


def test_templates_are_normalised_before_they_are_averaged():
    rng = np.random.default_rng(0)
    # Templates of very different length, where the mean of raw features is something else.
    text = rng.normal(size=(5, 7, 16)) * np.logspace(-1, 2, 7)[:, None]
    each = text / np.linalg.norm(text, axis=-1, keepdims=True)
    mean = each.mean(axis=1)
    expected = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    found = np.asarray(classifier.classifier_weights(jnp.asarray(text, jnp.float32)))
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
    found = classifier.cosine_logits(jnp.asarray(features), jnp.asarray(weights), 100.0, -10.0)
    np.testing.assert_allclose(np.asarray(found), 100 * cosines - 10, atol=1e-4)


def test_a_zero_feature_gives_finite_logits():
    logits = classifier.cosine_logits(jnp.zeros((1, 4)), jnp.ones((2, 4)), 100.0, 0.0)
    assert np.isfinite(np.asarray(logits)).all()


def test_cross_entropy_and_accuracy():
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [800.0, -800.0, 0.0]])
    labels = np.array([0, 2, 0])
    shifted = logits - logits.max(axis=1, keepdims=True)
    expected = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(3), labels]
    found = classifier.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6)
    accuracy = float(classifier.accuracy(jnp.asarray(logits), jnp.asarray(labels)))
    assert accuracy == pytest.approx(2 / 3)
