"""Refinement by images without labels, against the formulas in float64 loops and the figures of the
official code (StatA's repository, in full; unlabelled training rows and ridge: in float64)."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_adapter.adapters import neighbours
from clip_adapter.adapters.formulas import classifier_weights
from clip_adapter.adapters.stata import Refinement, classes_found, refine, refined_logits
from clip_adapter.cache.few_shot import draw_few_shot
from clip_adapter.cache.reader import FeatureCache

Numbers = np.ndarray


def softmax(logits: Numbers) -> Numbers:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def direction(vector: Numbers) -> Numbers:
    length = np.linalg.norm(vector)
    return vector / length if length else vector


def density(row: Numbers, mean: Numbers, variance: Numbers) -> float:
    return -0.5 * sum(
        (row[d] - mean[d]) ** 2 / variance[d] + np.log(variance[d]) for d in range(len(row))
    )


def in_loops(
    rows: Numbers, known: Sequence[Numbers], texts: Numbers
) -> tuple[Numbers, Numbers, Numbers]:
    """z, μ and v, number by number."""
    count, classes = len(rows), len(texts)
    nearest = min(3, count - 1)
    near = np.zeros((count, count))
    for i in range(count):
        others = sorted((j for j in range(count) if j != i), key=lambda j: -(rows[i] @ rows[j]))
        for j in others[:nearest]:
            near[i, j] = rows[i] @ rows[j]
    z = np.array(known)
    wide = sum(z[i, k] * (rows[i] - texts[k]) ** 2 for i in range(count) for k in range(classes))
    wide = wide / count
    means, variances = texts.copy(), np.array([wide] * classes)
    for outer in range(11):
        likely = np.array(
            [
                [density(rows[i], means[k], variances[k]) for k in range(classes)]
                for i in range(count)
            ]
        )
        for _ in range(5):
            before = z.copy()
            for i in range(count):
                pull = sum((near[i, j] + near[j, i]) * before[j] for j in range(count))
                z[i] = softmax(np.log(known[i]) + (likely[i] + 50 / (2 * nearest) * pull) / 50)
        if outer == 10:
            break
        for k in range(classes):
            beta = (own := sum(z.argmax(axis=1) == k)) / (1 + own)
            mean = direction(sum(z[i, k] * rows[i] for i in range(count)))
            means[k] = direction(beta * mean + (1 - beta) * texts[k])
            scatter = sum(z[i, k] * (rows[i] - means[k]) ** 2 for i in range(count))
            within = scatter / max(sum(z[:, k]), 1e-12)
            held = wide + (texts[k] - means[k]) ** 2
            variances[k] = np.maximum(beta * within + (1 - beta) * held, 1e-12)
    return z, means, variances


def some_images(count: int, seed: int = 0) -> tuple[Numbers, Numbers, Numbers]:
    """Un-normalised features near four of five texts, logits at ten times a calibrated scale, and
    the texts."""
    rng = np.random.default_rng(seed)
    texts = np.array([direction(row) for row in rng.normal(size=(5, 8))])
    labels = rng.integers(4, size=count)
    rows = texts[labels] + 0.4 + 0.4 * rng.normal(size=(count, 8))
    features = rows * rng.uniform(1, 9, size=(count, 1))
    cosines = rows @ texts.T / np.linalg.norm(rows, axis=1, keepdims=True)
    return features, 100 * cosines, texts


@pytest.mark.parametrize("block", [1 << 24, 64])
@pytest.mark.parametrize("count", [2, 3, 23])
@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-9), (np.float32, 2e-4)])
def test_it_is_the_formula_in_loops(
    block: int, count: int, dtype: type, atol: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(neighbours, "BLOCK_NUMBERS", block)
    features, logits, texts = some_images(count)
    rows = np.array([direction(row) for row in features])
    known = [softmax(row / 10) for row in logits]
    wanted, means, variances = in_loops(rows, known, texts)
    shares, found = refine(features.astype(dtype), logits, texts, 10.0)
    assert shares.dtype == found.means.dtype == found.variances.dtype == dtype
    np.testing.assert_allclose(shares, wanted, atol=atol)
    np.testing.assert_allclose(found.means, means, atol=atol)
    np.testing.assert_allclose(found.variances, variances, atol=atol, rtol=100 * atol)
    if count > 3:
        assert np.abs(shares - known).max() > 0.1  # it does something
        assert set(classes_found(shares)) == {int(row.argmax()) for row in wanted}


def test_new_images_are_classified_one_by_one():
    features, logits, texts = some_images(40)
    _, found = refine(features[:30], logits[:30], texts, 10.0)
    new = features[30:]
    wanted = [
        np.log(softmax(z / 10))
        + np.array(
            [density(direction(f), *of_class) / 50 for of_class in zip(*found[:2], strict=True)]
        )
        for f, z in zip(new, logits[30:], strict=True)
    ]
    np.testing.assert_allclose(refined_logits(np, found, logits[30:], new), wanted, atol=1e-9)
    single = Refinement(*(np.asarray(part, np.float32) for part in found))
    for xp, array in ((np, np.asarray), (jnp, jnp.asarray), (torch, torch.tensor)):
        parts = Refinement(*map(array, single))
        rows, given = (array(some.astype(np.float32)) for some in (new, logits[30:]))
        np.testing.assert_allclose(refined_logits(xp, parts, given, rows), wanted, atol=1e-3)


def test_images_that_are_all_alike_stay_finite():
    """No variance at all, a class that none shows, and a share that underflows."""
    features = np.ones((4, 8), np.float32)
    logits = np.array([[0, -1e5]] * 4, np.float32)
    texts = np.eye(8, dtype=np.float32)[:2]
    shares, found = refine(features, logits, texts)
    assert all(np.isfinite(part).all() for part in (shares, *found))
    assert shares.argmax(axis=1).tolist() == [0] * 4
    assert np.isfinite(refined_logits(np, found, logits, features)).all()
    np.testing.assert_allclose(found.means[1], texts[1], atol=1e-6)


def ridge_logits(train: Numbers, labels: Numbers, weights: Numbers, rows: Numbers) -> Numbers:
    """Of λ = 1 and c = 3, in float64."""
    residual = np.eye(len(weights))[labels] - 3 * train @ weights.T
    fitted = np.linalg.solve(train @ train.T + np.eye(len(train)), residual)
    return 3 * rows @ weights.T + rows @ train.T @ fitted


def test_it_reaches_what_the_official_code_reaches(digits_cache: Path):
    """Test accuracies on the embedded default; one image of 899 on the edge is allowed."""
    with FeatureCache(digits_cache) as cache:
        scale = cache.logit_scale
        weights = np.asarray(classifier_weights(np, cache.text_features()), np.float64)
        train, val, test = (cache.images(split, views=1) for split in ("train", "val", "test"))
    known, rows = (
        images.features[0] / np.linalg.norm(images.features[0], axis=1, keepdims=True)
        for images in (train, test)
    )

    def accuracy(scores: Numbers) -> float:
        return float(np.mean(scores.argmax(axis=1) == test.labels))

    zero_shot = scale * rows @ weights.T
    found = {"test rows": accuracy(refine(rows, zero_shot, weights)[0])}
    _, of_train = refine(known, scale * known @ weights.T, weights)
    found["train rows"] = accuracy(refined_logits(np, of_train, zero_shot, rows))
    for shots in (1, 4, 16):
        drawn = draw_few_shot(train.labels, val.labels, shots=shots, seed=1).support
        support = known[drawn].astype(np.float64)
        logits = ridge_logits(support, train.labels[drawn], weights, rows.astype(np.float64))
        found[f"ridge {shots}"] = accuracy(refine(rows, logits, weights, 0.1)[0])
    wanted = {"test rows": 0.77976, "train rows": 0.77864}
    wanted |= {"ridge 1": 0.83315, "ridge 4": 0.89766, "ridge 16": 0.91880}
    assert found == pytest.approx(wanted, abs=1.5 / len(test.labels))
