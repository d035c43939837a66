"""What the other images say of a label, against a fit without each image."""

import numpy as np
import pytest
from scipy.special import softmax

from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.label_check import accuracy_of, judged, left_out_logits
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


def without(features: Numbers, labels: Numbers, head: Head, row: int, alpha: float) -> Numbers:
    """The logits of an image by the formulas of the paper on all others, in float64."""
    rows = features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    kept = np.arange(len(rows)) != row
    own, of = rows[kept], labels[kept]
    classes, dim = head.weights.shape
    means = np.stack([own[of == c].mean(axis=0) for c in range(classes)])
    away = own - means[of]
    covariance = away.T @ away / (len(own) - 1)
    inverse = dim * np.linalg.inv((len(own) - 1) * covariance + np.trace(covariance) * np.eye(dim))
    constant = -np.log(classes) - np.sum(means @ inverse * means, axis=1) / 2
    return (
        20 * rows[row] @ head.weights.T + 0.5 + alpha * (rows[row] @ inverse @ means.T + constant)
    )


@pytest.mark.parametrize("dim", [6, 48])  # fewer and more than images
def test_each_image_is_left_out_exactly(dim: int):
    features, labels, head = data((2, 5, 9, 7), dim)
    found = left_out_logits(features, labels, head)
    alpha = (len(labels) / 4) ** (5 / 3) / 1000
    for row in range(len(labels)):
        wanted = without(features, labels, head, row, alpha)
        np.testing.assert_allclose(found[row], wanted, rtol=2e-4, atol=2e-3)


def test_classes_of_one_image_and_of_none():
    features, labels, head = data((1, 6, 6, 6), 8)
    kept = labels != 3
    found = left_out_logits(features[kept], labels[kept], head)
    assert np.isneginf(found[:, 3]).all() and np.isfinite(found[:, :3]).all()
    own, likelier, share = judged(features[kept], labels[kept], head)
    assert np.isfinite(own).all() and not np.isin(3, likelier)
    assert (likelier != labels[kept]).all() and (own + share <= 1 + 1e-9).all()
    with pytest.raises(ValueError, match="2 images are too few"):
        left_out_logits(features[:2], labels[:2], head)


def test_where_all_images_equal_their_mean_zero_shot_is_left():
    features, labels, head = data((2, 2, 2, 2), 8)
    means = np.stack([features[labels == c][0] for c in range(4)])[labels]
    found = left_out_logits(means, labels, head)
    zero_shot = cosine_logits(np, means, head)
    differences = found - zero_shot
    assert np.ptp(differences, axis=1).max() < 1e-4


def test_wrong_labels_are_what_to_look_at_first():
    features, labels, head = data((40, 40, 40, 40), 16, noise=0.6)
    wrong = np.arange(0, 160, 23)
    labels[wrong] = (labels[wrong] + 1) % 4
    own, _, share = judged(features, labels, head)
    first = np.argsort(own - share, kind="stable")[: len(wrong)]
    assert len(np.intersect1d(first, wrong)) >= len(wrong) - 1
    assert (own[wrong] < 0.05).sum() >= len(wrong) - 1
    assert (own[np.setdiff1d(np.arange(160), wrong)] < 0.05).sum() <= 2


def test_the_temperature_is_the_likeliest_one():
    features, labels, head = data((30, 30, 30, 30), 16)
    own, _, _ = judged(features, labels, head)
    logits = left_out_logits(features, labels, head).astype(np.float64)
    losses = [
        -np.log(softmax(logits / t, axis=1)[np.arange(len(labels)), labels]).mean()
        for t in np.geomspace(0.05, 50, 400)
    ]
    assert -np.log(own).mean() == pytest.approx(min(losses), abs=2e-3)


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
