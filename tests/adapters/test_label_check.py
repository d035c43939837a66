"""What the other images say of a label, against a fit without each image."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.label_check import Gaussians, accuracy_of, judged, likeliest
from clip_adapter.adapters.method import Head, Task
from clip_adapter.adapters.registry import METHODS
from tests.pipelines.tiny_cache import tiny_data

Numbers = np.ndarray


def data(per_class: tuple[int, ...], dim: int, noise: float = 1.0) -> tuple[Numbers, Numbers, Head]:
    made = tiny_data(train=per_class, noise=noise, dim=dim)
    features, labels = made.splits["train"]
    text = made.text.mean(axis=1)
    weights = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    head = Head(weights, np.float32(20.0), np.float32(0.5))
    return features[0], labels.astype(np.int32), head


def without(
    features: Numbers, labels: Numbers, classes: int, row: int, *, of_all: bool = False
) -> Numbers:
    """The classifier of an image by the formulas of the paper on all others, in float64; of_all:
    with the covariance of all."""
    rows = features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    kept = np.arange(len(rows)) != row
    own, of = rows[kept], labels[kept]
    means = np.stack([own[of == c].mean(axis=0) for c in range(classes)])
    away, count, dim = own - means[of], len(own), rows.shape[1]
    if of_all:
        every = np.stack([rows[labels == c].mean(axis=0) for c in range(classes)])
        away, count = rows - every[labels], len(rows)
    covariance = away.T @ away / (count - 1)
    inverse = dim * np.linalg.inv((count - 1) * covariance + np.trace(covariance) * np.eye(dim))
    return rows[row] @ inverse @ means.T - np.sum(means @ inverse * means, axis=1) / 2


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("dim", [6, 48])  # fewer and more than images
def test_each_image_is_left_out_exactly(dim: int, of_all: bool):
    features, labels, _ = data((2, 5, 9, 7), dim)
    gaussians = Gaussians.of(features, labels, 4)
    found = gaussians.left_out(features, labels, spread_of_all=of_all)
    for row in range(len(labels)):
        wanted = without(features, labels, 4, row, of_all=of_all)
        np.testing.assert_allclose(found[row], wanted, rtol=1e-6, atol=1e-6)
    some = gaussians.left_out(features[3:9], labels[3:9], spread_of_all=of_all)
    np.testing.assert_allclose(some, found[3:9], rtol=1e-9)


def test_classes_of_one_image_and_of_none():
    features, labels, head = data((1, 6, 6, 6), 8)
    kept = labels != 3
    found = Gaussians.of(features[kept], labels[kept], 4).left_out(features[kept], labels[kept])
    assert np.isneginf(found[:, 3]).all() and np.isfinite(found[:, :3]).all()
    own, likelier, share = judged(features[kept], labels[kept], head)
    assert np.isfinite(own).all() and not np.isin(3, likelier)
    assert (likelier != labels[kept]).all() and (own + share <= 1 + 1e-9).all()
    with pytest.raises(ValueError, match="2 images are too few"):
        Gaussians.of(features[:2], labels[:2], 4)


def test_where_all_images_equal_their_mean_zero_shot_is_left():
    features, labels, head = data((2, 2, 2, 2), 8)
    means = np.stack([features[labels == c][0] for c in range(4)])[labels]
    gaussians = Gaussians.of(means, labels, 4)
    assert not gaussians.left_out(means, labels).any()
    _, temperature = likeliest(gaussians, means, labels, head)
    shares = softmax(cosine_logits(np, means, head).astype(np.float64) / temperature, axis=1)
    own, _, _ = judged(means, labels, head)
    np.testing.assert_allclose(own, shares[np.arange(8), labels], rtol=1e-5)


def test_wrong_labels_are_what_to_look_at_first():
    features, labels, head = data((40, 40, 40, 40), 16, noise=0.6)
    wrong = np.arange(0, 160, 23)
    labels[wrong] = (labels[wrong] + 1) % 4
    own, _, share = judged(features, labels, head)
    first = np.argsort(own - share, kind="stable")[: len(wrong)]
    assert len(np.intersect1d(first, wrong)) >= len(wrong) - 1
    assert (own < share)[wrong].sum() >= len(wrong) - 1
    assert (own[np.setdiff1d(np.arange(160), wrong)] < 0.05).sum() <= 2


def test_weight_and_temperature_are_the_likeliest_ones():
    """Among the weights that the method tries, by images that are left out exactly."""
    features, labels, head = data((30, 30, 30, 30), 16)
    gaussians = Gaussians.of(features, labels, 4)
    found = likeliest(gaussians, features, labels, head)
    zero_shot = cosine_logits(np, features, head).astype(np.float64)
    left_out = np.stack([without(features, labels, 4, row) for row in range(120)])
    losses = {
        (alpha, t): -log_softmax((zero_shot + alpha * left_out) / t, axis=1)[
            np.arange(120), labels
        ].mean()
        for alpha in METHODS["gda"].hyper["alpha"].tried
        for t in np.geomspace(0.05, 50, 300)
    }
    alpha, temperature = min(losses, key=losses.__getitem__)
    assert found[0] == alpha and found[1] == pytest.approx(temperature, rel=0.05)


def test_the_accuracy_is_that_of_the_method_by_default():
    made = tiny_data()
    features, labels, head = data((9, 9, 9, 9), 16)
    gda, test = METHODS["gda"], made.splits["test"]
    none = np.zeros(0, np.int32)
    task = Task(features[None], labels, features[:0], none, head, np.int32(0))
    arrays = gda.fit(np, task, gda.defaults())
    wanted = gda.logits(np, arrays, gda.defaults(), test[0][0], head).argmax(axis=1) == test[1]
    right = accuracy_of((features, labels), (test[0][0], test[1]), head)
    np.testing.assert_array_equal(right, wanted)
    assert 0.4 < right.mean() < 1
