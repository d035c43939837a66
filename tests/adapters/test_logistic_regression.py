"""Logistic regression along C against scikit-learn and a dense Newton's method in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from clip_adapter.adapters.methods.logistic import objective as logistic_objective
from clip_adapter.adapters.methods.logistic import path as logistic_regression
from clip_adapter.adapters.methods.logistic.objective import LogisticObjective
from clip_adapter.adapters.methods.logistic.path import (
    LADDER,
    ROUNDING,
    TOLERANCE,
    LogisticRegressionPath,
    Solution,
)

Data = tuple[np.ndarray, np.ndarray]
DECADES = [1e-6, 1e-3, 1.0, 1e3, 1e6]


def clusters(
    images: int, dim: int, classes: int, noise: float, scale: float = 1.0, offset: float = 0.0
) -> Data:
    rng = np.random.default_rng(0)
    labels = np.arange(images) % classes
    centres = rng.normal(size=(classes, dim))
    features = centres[labels] + noise * rng.normal(size=(images, dim)) + offset
    return (scale * features).astype(np.float32), labels


def fit_path(data: Data, cs: Sequence[float]) -> list[Solution]:
    path = LogisticRegressionPath(*data, 5)
    return [path.solve(c) for c in cs]


def twice(data: Data) -> Data:
    return np.concatenate([data[0]] * 2), np.concatenate([data[1]] * 2)


def contradicted(data: Data) -> Data:
    """Each image twice, with different labels: nothing separates them."""
    features, labels = twice(data)
    labels[: len(labels) // 2] = (labels[: len(labels) // 2] + 1) % (labels.max() + 1)
    return features, labels


def one_direction_tiny(data: Data) -> Data:
    features, labels = data[0].copy(), data[1]
    features[:, 0] *= 1e-6
    return features, labels


CASES = {
    "more images than dimensions": clusters(24, 4, 3, 2.0),
    "more dimensions than images": clusters(9, 12, 3, 1.0),
    "as many as images": clusters(8, 8, 2, 1.0),
    "one image a class": clusters(4, 10, 4, 1.0),
    "one dimension": clusters(16, 1, 2, 1.0),
    "one dimension, four classes": clusters(12, 1, 4, 0.1),
    "rows twice": twice(clusters(6, 10, 3, 1.0)),
    "contradictions": contradicted(clusters(6, 10, 3, 1.0)),
    "tiny": clusters(12, 16, 3, 1.0, scale=1e-3),
    "huge": clusters(12, 16, 3, 1.0, scale=30.0),
    "huge, inseparable": clusters(30, 3, 3, 2.0, scale=30.0),
    "a narrow cone": clusters(12, 16, 3, 0.5, offset=10.0),
    "one tiny direction": one_direction_tiny(clusters(24, 4, 3, 2.0)),
    "uneven classes": (clusters(20, 6, 3, 1.0)[0], np.array([0] * 16 + [1] * 3 + [2])),
    "constant features": (np.full((6, 5), 0.1, np.float32), np.arange(6) % 2),
    "zero features": (np.zeros((6, 5), np.float32), np.array([0, 0, 0, 1, 1, 2])),
}


def objective(data: Data, c: float, kernel: np.ndarray, bias: np.ndarray) -> float:
    logits = data[0].astype(np.float64) @ kernel + bias
    losses = logsumexp(logits - logits[np.arange(len(logits)), data[1]][:, None], axis=1)
    return c * losses.sum() + 0.5 * (kernel**2).sum()


def dense_newton(data: Data, c: float) -> tuple[float, np.ndarray]:
    """The least objective and its kernel, by damped Newton steps with the whole Hessian."""
    features, labels = data[0].astype(np.float64), data[1]
    scale = np.abs(features).max() or 1.0
    rows = np.concatenate([features / scale, np.ones((len(labels), 1))], axis=1)
    classes, width = labels.max() + 1, rows.shape[1]
    ridge = np.repeat(np.r_[np.ones(width - 1), 0.0][:, None], classes, axis=1).ravel()
    targets = np.eye(classes)[labels]
    solution = np.zeros(width * classes)

    def value(flat: np.ndarray, c: float) -> float:
        logits = rows @ flat.reshape(width, classes)
        own = logits[np.arange(len(labels)), labels]
        return c * logsumexp(logits - own[:, None], axis=1).sum() + 0.5 * ridge @ flat**2

    target = c * scale**2
    for step_c in np.geomspace(min(1e-6, target), target, 20):
        for _ in range(60):
            chances = softmax(rows @ solution.reshape(width, classes), axis=1)
            gradient = step_c * (rows.T @ (chances - targets)).ravel() + ridge * solution
            weights = chances[:, :, None] * (np.eye(classes) - chances[:, None, :])
            hessian = step_c * np.einsum("nd,nkl,ne->dkel", rows, weights, rows)
            hessian = hessian.reshape(len(solution), -1) + np.diag(ridge)
            step = -np.linalg.lstsq(hessian, gradient, rcond=1e-15)[0]
            length = 1.0
            here = value(solution, step_c)
            while value(solution + length * step, step_c) > here and length > 1e-9:
                length /= 2
            solution += length * step if length > 1e-9 else 0.0
            if -gradient @ step <= 1e-13 * here:
                break
    kernel = solution.reshape(width, classes)[:-1] / scale
    return value(solution, target) / scale**2, kernel


@pytest.mark.parametrize("c", DECADES)
@pytest.mark.parametrize("case", CASES)
def test_the_minimum_is_reached_and_certified(case: str, c: float):
    data = CASES[case]
    found = LogisticRegressionPath(*data, data[1].max() + 1).solve(c)
    reached = objective(data, c, found.kernel, found.bias)
    least, kernel = dense_newton(data, c)
    assert found.solved
    assert least * (1 - 1e-8) <= reached <= least * (1 + TOLERANCE)
    assert reached - least <= (found.relative_gap + 1e-8) * reached, "the certificate is false"
    assert found.objective == pytest.approx(reached, rel=1e-8)
    certified = max(1e-3 * np.linalg.norm(found.kernel), np.sqrt(2 * ROUNDING * reached))
    assert np.linalg.norm(found.kernel - kernel) <= 1.01 * certified + 1e-12


@pytest.mark.parametrize("c", [1e-3, 0.316, 30.0])
@pytest.mark.parametrize(("images", "dim"), [(60, 40), (40, 60)])
def test_it_is_scikit_learns_logistic_regression(images: int, dim: int, c: float):
    features, labels = data = clusters(images, dim, 5, 3.0)
    reference = LogisticRegression(C=c, tol=1e-12, max_iter=10000, solver="newton-cg")
    reference.fit(features.astype(np.float64), labels)
    kernel, bias = reference.coef_.T, reference.intercept_
    found = LogisticRegressionPath(*data, 5).solve(c)
    assert found.objective == pytest.approx(objective(data, c, kernel, bias), rel=TOLERANCE)
    # f grows by at least ½‖ΔK‖² from its minimum.
    distance = np.linalg.norm(found.kernel - kernel)
    assert distance <= np.sqrt(2 * found.relative_gap * found.objective) + 1e-5
    logits = [
        features @ k + b - (features @ k + b).mean(1, keepdims=True)
        for k, b in [(found.kernel, found.bias), (kernel, bias)]
    ]
    assert np.abs(logits[0] - logits[1]).max() < 0.01


@pytest.mark.parametrize("c", DECADES)
def test_a_class_without_images_changes_nothing_for_the_others(c: float):
    features, labels = clusters(12, 16, 3, 1.0)
    without = LogisticRegressionPath(features, labels, 3).solve(c)
    found = LogisticRegressionPath(features, np.array([0, 2, 4])[labels], 6).solve(c)
    assert np.array_equal(found.kernel[:, [0, 2, 4]], without.kernel)
    assert not found.kernel[:, [1, 3, 5]].any()
    assert np.isfinite(found.bias).all()
    logits = features @ found.kernel + found.bias
    assert logits[:, [1, 3, 5]].max() < logits[:, [0, 2, 4]].min() - 30


def test_of_a_single_class_there_is_nothing_to_learn():
    found = LogisticRegressionPath(np.eye(3), [1, 1, 1], 2).solve(1e6)
    assert found.solved
    assert found.objective == 0.0
    assert not found.kernel.any()
    assert found.bias[1] > found.bias[0] + 30


def test_a_solution_depends_on_the_data_and_c_alone():
    data = clusters(30, 40, 5, 1.0)
    cs = [1e4, 3e-7, 0.316, 1e6, 30.0, 2e6, 1.0, 1e-6]
    together = fit_path(data, cs)
    backwards = fit_path(data, cs[::-1])[::-1]
    alone = [LogisticRegressionPath(*data, 5).solve(c) for c in cs]
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert one.solved
        for name, value in vars(one).items():
            assert np.array_equal(value, getattr(other, name))
            assert np.array_equal(value, getattr(third, name))


def test_a_start_elsewhere_ends_at_the_same_minimum(monkeypatch: pytest.MonkeyPatch):
    data = clusters(30, 40, 5, 1.0)
    warm = fit_path(data, LADDER)
    for c, one in zip(LADDER, warm, strict=True):
        # Without rungs below it, a value starts where nothing is known.
        monkeypatch.setattr(logistic_regression, "LADDER", [c])
        cold = LogisticRegressionPath(*data, 5).solve(c)
        assert cold.objective == pytest.approx(one.objective, rel=TOLERANCE)
        distance = np.linalg.norm(cold.kernel - one.kernel)
        gaps = cold.relative_gap**0.5 + one.relative_gap**0.5
        assert distance <= gaps * np.sqrt(2 * one.objective) * 1.001 + 1e-9
    assert cold.newton_steps > warm[-1].newton_steps


def test_what_is_not_solved_says_so(monkeypatch: pytest.MonkeyPatch):
    data = clusters(30, 40, 5, 1.0)
    least = LogisticRegressionPath(*data, 5).solve(1e6).objective
    monkeypatch.setattr(logistic_regression, "MAX_NEWTON_STEPS", 1)
    hard = LogisticRegressionPath(*data, 5).solve(1e6)
    assert not hard.solved
    above = objective(data, 1e6, hard.kernel, hard.bias) - least
    assert TOLERANCE * hard.objective < above <= hard.relative_gap * hard.objective


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch):
    data = clusters(31, 40, 5, 1.0)
    whole = fit_path(data, DECADES)
    monkeypatch.setattr(logistic_objective, "BLOCK", 7 * 5)
    for one, other in zip(whole, fit_path(data, DECADES), strict=True):
        assert other.solved
        assert other.objective == pytest.approx(one.objective, rel=TOLERANCE)


def test_the_number_of_blas_threads_is_put_back(monkeypatch: pytest.MonkeyPatch):
    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    inside = []
    evaluate = LogisticObjective.evaluate

    def watched(self: LogisticObjective, point: np.ndarray, c: float) -> logistic_objective.State:
        inside.append(threads())
        return evaluate(self, point, c)

    monkeypatch.setattr(LogisticObjective, "evaluate", watched)
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        path = LogisticRegressionPath(*clusters(12, 16, 3, 1.0), 3)
        path.solve(1.0)
        assert threads() == before
    assert set(before) == {2}
    assert {count for counts in inside for count in counts} == {1}


@pytest.fixture
def inner() -> tuple[LogisticObjective, Data, np.ndarray]:
    """A problem that is centred, as the bound needs it, and a point far from its minimum."""
    features, labels = clusters(20, 4, 3, 1.0)
    rows = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    rng = np.random.default_rng(1)
    biased = np.column_stack([rows, np.ones(len(rows))])
    return LogisticObjective(biased, labels), (rows, labels), rng.normal(size=(5, 3))


def test_value_gradient_and_hessian(inner: tuple[LogisticObjective, Data, np.ndarray]):
    function, data, point = inner
    nudges = 1e-5 * np.eye(15).reshape(15, 5, 3)

    def value(point: np.ndarray) -> float:
        return objective(data, 2.0, point[:-1], point[-1])

    def gradient(point: np.ndarray) -> np.ndarray:
        return function.evaluate(point, 2.0).gradient.ravel()

    slopes = [(value(point + nudge) - value(point - nudge)) / 2e-5 for nudge in nudges]
    np.testing.assert_allclose(gradient(point), slopes, rtol=1e-6)
    bends = np.array([gradient(point + nudge) - gradient(point - nudge) for nudge in nudges]) / 2e-5
    state = function.evaluate(point, 2.0)
    assert state.objective == pytest.approx(value(point))
    columns = [function.times_hessian(np.float32(1e5 * nudge), 2.0).ravel() for nudge in nudges]
    np.testing.assert_allclose(columns, bends, rtol=1e-4, atol=1e-4)
    diagonal = function.hessian_diagonal(2.0).ravel()
    np.testing.assert_allclose(diagonal, bends.diagonal(), rtol=1e-4)
    step = function.bias_step(state.gradient, 2.0)
    assert not step[:-1].any()
    np.testing.assert_allclose(bends[-3:, -3:] @ step[-1], -state.gradient[-1], atol=1e-4)


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 10.0])
def test_the_bound_holds_anywhere(
    inner: tuple[LogisticObjective, Data, np.ndarray], size: float, c: float
):
    function, data, point = inner
    least, _ = dense_newton(data, c)
    state = function.evaluate(size * point, c)
    assert state.objective - least <= state.gap
