"""Temperature, sets and p-values against SciPy in float64, MAPIE and plain loops."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin

from clip_adapter.adapters.decisions import (
    Decisions,
    class_means,
    images_for,
    likeliest_temperature,
    nearest_cosines,
    prior_temperature,
    probabilities,
    rank_of,
    spreads,
    unlucky_coverage,
)

CLASSES, DIM = 5, 7


def drawn(count: int, seed: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at T = `sharpness` is where their labels come from."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(count, CLASSES))
    labels = np.array([rng.choice(CLASSES, p=softmax(row)) for row in logits])
    return (sharpness * logits).astype(np.float32), labels


def decisions(count: int, seed: int = 0, prior: float = 1.0) -> Decisions:
    rng = np.random.default_rng(seed)
    logits, labels = drawn(count, seed)
    prototypes = rng.normal(size=(CLASSES, DIM))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    cosines = rng.uniform(0.2, 0.9, (count, 2))
    return Decisions.of(
        *(logits, labels, cosines, prior),
        folds=4,
        chose=count // 3,
        prototypes=prototypes.astype(np.float32),
    )


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 60.0])
@pytest.mark.parametrize("count", [8, 300])
def test_the_temperature_is_the_smallest_loss_with_its_prior(count: int, sharpness: float) -> None:
    logits, labels = drawn(count, 3, sharpness)
    prior = 1.7 * sharpness

    def loss(x: float) -> float:
        own = log_softmax(logits.astype(np.float64) / np.exp(x), axis=1)
        return -own[np.arange(count), labels].mean() + (x - np.log(prior)) ** 2 / count

    grid = np.linspace(np.log(1e-3), np.log(1e3), 2000)
    near = grid[np.argmin([loss(x) for x in grid])]
    exact = minimize_scalar(loss, bounds=(near - 0.02, near + 0.02), options={"xatol": 1e-9}).x
    assert likeliest_temperature(logits, labels, prior) == pytest.approx(np.exp(exact), rel=1e-5)


def test_many_images_say_the_temperature_and_none_leave_the_prior() -> None:
    logits, labels = drawn(20_000, 0, 5.0)
    assert likeliest_temperature(logits, labels, 1.0) == pytest.approx(5.0, rel=0.05)
    assert likeliest_temperature(logits[:0], labels[:0], 0.3) == 0.3
    right = np.eye(CLASSES)[labels]  # without the prior it would be 1e-3
    assert 0.01 < likeliest_temperature(right[:20], labels[:20], 0.2) < 0.2


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_how_many_images_are_looked_at_at_a_time_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Of 30: one by one, by four with two left over, all."""
    logits, labels = drawn(30, 5)
    zero_shot = 3 * logits[:, ::-1] + logits
    cosines, prototypes = np.zeros((30, 2)), np.eye(CLASSES, DIM, dtype=np.float32)
    monkeypatch.setattr("clip_adapter.adapters.decisions.AT_ONCE", at_once)
    prior = prior_temperature(spreads(logits), spreads(zero_shot))
    found = Decisions.of(logits, labels, cosines, prior, folds=4, chose=0, prototypes=prototypes)
    ratios = np.ptp(logits.astype(np.float64), axis=1) / np.ptp(zero_shot.astype(float), axis=1)
    assert prior == pytest.approx(np.median(ratios))
    shares = softmax(logits.astype(np.float64) / found.temperature, axis=1)
    assert found.scores == pytest.approx(1 - shares[np.arange(30), labels], abs=1e-6)
    assert found.known[:, 0] == pytest.approx(shares.max(axis=1), abs=1e-6)


def test_the_prior_needs_no_labels_and_follows_the_scale_of_the_logits() -> None:
    zero_shot = np.array([[0.0, 2, 1], [1, 1, 5], [3, 0, 0]])
    assert prior_temperature(spreads(7 * zero_shot - 3), spreads(zero_shot)) == pytest.approx(7)
    other = zero_shot * np.array([[1.0], [2], [30]])
    assert prior_temperature(spreads(other), spreads(zero_shot)) == pytest.approx(2), (
        "the median of the images"
    )
    assert prior_temperature(spreads(np.ones((2, 3))), spreads(zero_shot[:2])) == 1
    assert prior_temperature(spreads(zero_shot[:0]), spreads(zero_shot[:0])) == 1


def test_no_temperature_changes_the_order_of_the_classes() -> None:
    logits, _ = drawn(50, 1)
    for temperature in (1e-3, 0.2, 1e3):
        shares = probabilities(logits, temperature)
        assert shares.sum(axis=1) == pytest.approx(1)
        assert np.array_equal(shares.argmax(axis=1), logits.argmax(axis=1))


class Known(ClassifierMixin, BaseEstimator):
    """Gives the probabilities that it is given."""

    classes_ = np.arange(CLASSES)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict_proba(self, shares: np.ndarray) -> np.ndarray:
        return shares

    def predict(self, shares: np.ndarray) -> np.ndarray:
        return shares.argmax(axis=1)


@pytest.mark.parametrize("coverage", [0.6, 0.9, 0.95])
@pytest.mark.parametrize("count", [20, 57, 200])
def test_sets_are_those_of_mapie_and_the_most_probable_class(count: int, coverage: float) -> None:
    fitted = decisions(count, seed=count)
    own = probabilities(drawn(count, count)[0], fitted.temperature)
    new = probabilities(drawn(400, 10_000)[0], fitted.temperature)
    theirs = SplitConformalClassifier(Known(), coverage, conformity_score="lac", prefit=True)
    theirs.conformalize(own, fitted.labels)
    wanted = theirs.predict_set(new)[1][:, :, 0]
    if coverage == 0.6:
        assert not wanted.any(axis=1).all(), "some sets are empty, and get their class below"
    wanted[np.arange(400), new.argmax(axis=1)] = True
    assert np.array_equal(fitted.sets(new, coverage), wanted)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    images=st.integers(19, 60),
    coverage=st.sampled_from([0.8, 0.9, 0.95]),
    sharpness=st.sampled_from([0.02, 1.0, 30.0]),
)
def test_sets_hold_the_label_as_often_as_promised_over_random_splits(
    seed: int, images: int, coverage: float, sharpness: float
) -> None:
    """On average over 150 draws of which images are held out; ± 4 standard errors."""
    rng = np.random.default_rng(seed)
    logits, labels = drawn(1000, seed, sharpness)
    found = []
    for _ in range(150):
        order = rng.permutation(len(labels))
        own, new = order[:images], order[images : images + 100]
        fitted = Decisions.of(
            *(logits[own], labels[own], np.zeros((images, 2)), sharpness),
            folds=0,
            chose=0,
            prototypes=np.eye(CLASSES, DIM, dtype=np.float32),
        )
        answered = fitted.sets(probabilities(logits[new], fitted.temperature), coverage)
        found.append(answered[np.arange(100), labels[new]].mean())
    assert np.mean(found) > coverage - 4 * np.std(found) / np.sqrt(len(found))


def test_too_few_images_promise_nothing_and_say_so() -> None:
    assert [images_for(share) for share in (0.5, 0.9, 0.95, 0.99)] == [1, 9, 19, 99]
    for share in (0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 2 / 3, 0.97):
        assert rank_of(images_for(share), share) == images_for(share)
        assert rank_of(images_for(share) - 1, share) > images_for(share) - 1
    few = decisions(18)
    assert few.sets(probabilities(drawn(30, 2)[0]), 0.95).all()
    assert not few.sets(probabilities(drawn(30, 2)[0]), 0.9).all()


@pytest.mark.parametrize("images", [19, 80])
def test_one_time_in_ten_the_coverage_is_below_the_stated_one(images: int) -> None:
    """Scores of images to come are uniform: their share below the k-th of n is the coverage."""
    rng = np.random.default_rng(0)
    scores = np.sort(rng.uniform(size=(20_000, images)), axis=1)
    found = scores[:, rank_of(images, 0.9) - 1]
    assert np.mean(found < unlucky_coverage(images, 0.9)) == pytest.approx(0.1, abs=0.01)


def test_known_counts_the_held_out_images_that_are_as_strange() -> None:
    """In loops: the rank of the product of three ranks."""
    fitted, images = decisions(40), 40
    rng = np.random.default_rng(5)
    shares = probabilities(drawn(25, 6)[0], fitted.temperature)
    features = rng.normal(size=(25, DIM)).astype(np.float32)
    texts = rng.normal(size=(CLASSES, DIM))

    def product(values: Sequence[float], own: int) -> float:
        among = [sum(other <= v for other in fitted.known[:, k]) for k, v in enumerate(values)]
        return math.prod((1 - own + rank) / (images + 1 - own) for rank in among)

    products = [product(fitted.known[i], own=1) for i in range(images)]
    found = fitted.known_of(shares, features, texts)
    for row in range(25):
        length = np.linalg.norm(features[row])
        to_mean = max(features[row] @ fitted.prototypes.T) / length
        to_text = max(features[row] @ text / np.linalg.norm(text) for text in texts) / length
        new = product(np.float32([max(shares[row]), to_mean, to_text]), own=0)
        assert found[row] == pytest.approx((1 + sum(p <= new for p in products)) / (images + 1))
    assert 0 < found.min() < found.max() < 1


@pytest.mark.parametrize("reject", [0.05, 0.2])
def test_about_the_share_of_own_images_is_rejected_that_was_asked_for(reject: float) -> None:
    """On average over draws of which images are held out, from 500 of one kind."""
    rng = np.random.default_rng(0)
    logits, labels = drawn(500, 0)
    features = rng.normal(size=(500, DIM)) + 2 * np.eye(CLASSES, DIM)[labels]
    means, texts = np.eye(CLASSES, DIM), rng.normal(size=(CLASSES, DIM))
    cosines = nearest_cosines(features, means, texts)
    found = []
    for _ in range(60):
        order = rng.permutation(500)
        own, new = order[:100], order[100:]
        fitted = Decisions.of(
            *(logits[own], labels[own], cosines[own], 1.0),
            folds=0,
            chose=0,
            prototypes=means,
        )
        shares = probabilities(logits[new], fitted.temperature)
        found.append(np.mean(fitted.known_of(shares, features[new], texts) < reject))
    assert np.mean(found) == pytest.approx(reject, abs=0.015)


def test_a_class_without_images_has_its_text_for_a_mean() -> None:
    rng = np.random.default_rng(0)
    features, weights = rng.normal(size=(6, DIM)), rng.normal(size=(3, DIM))
    labels = np.array([0, 0, 2, 2, 2, 0])
    found = class_means(features, labels, weights)
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    for label, mean in enumerate(
        (rows[labels == 0].mean(0), weights[1], rows[labels == 2].mean(0))
    ):
        np.testing.assert_allclose(found[label], mean / np.linalg.norm(mean), rtol=1e-6)
