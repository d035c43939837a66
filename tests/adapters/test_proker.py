"""ProKeR against its formula in float64 NumPy, one linear system a point."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_adapter.adapters.engine import closed_form
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit, search
from clip_adapter.adapters.method import Head, Task
from clip_adapter.adapters.methods import proker
from clip_adapter.adapters.registry import METHODS
from tests.adapters.closed_tasks import NoJournal, numpy_task, on_device, rows, score

PROKER = METHODS["proker"]
GRID = {"beta": (0.1, 1.5, 20.0), "ridge": (1e-3, 0.05, 1.0, 10.0)}


def residual(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(support rows, what zero-shot CLIP leaves of their labels), all views."""
    views, _, dim = task.features.shape
    images, weights = rows(task.features).reshape(-1, dim), rows(task.head.weights)
    return images, np.eye(len(weights))[np.tile(task.labels, views)] - images @ weights.T


def reference(task: Task, beta: float, ridge: float, features: np.ndarray) -> np.ndarray:
    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.exp(-beta * (1 - left @ right.T))

    support, left_over = residual(task)
    system = kernel(support, support) / ridge + np.eye(len(support))
    images = rows(features)
    duals = np.linalg.solve(system, left_over)
    return images @ rows(task.head.weights).T + kernel(images, support) @ duals


def repeated(task: Task) -> Task:
    return task._replace(
        features=np.repeat(task.features, 3, axis=1), labels=np.repeat(task.labels, 3)
    )


TASKS = {
    "one view": numpy_task(),
    "views": numpy_task(views=3),
    "one shot": numpy_task(shots=1),
    "a class without images": numpy_task(empty=(2,)),
    "each image three times": repeated(numpy_task()),
}


@pytest.mark.parametrize("point", [(1.5, 0.05), (0.1, 1e-3), (20.0, 10.0)], ids=str)
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_fit_and_logits_are_the_formula(task: Task, point: tuple[float, float], engine: Engine):
    setting = dict(zip(("beta", "ridge"), point, strict=True))
    arrays = fit(PROKER, setting, None, on_device(task), engine)
    classify = make_classify(PROKER, setting, arrays, on_device(task).head)
    expected = reference(task, *point, task.validation_features)
    np.testing.assert_allclose(classify(task.validation_features), expected, atol=2e-5)


def test_each_point_of_the_grid_is_what_a_loop_in_float64_finds(engine: Engine):
    task = numpy_task(noise=1.5, validation=20)
    found = list(search(PROKER, GRID, [on_device(task)], engine, NoJournal()))
    expected = {
        (beta, ridge): score(
            reference(task, beta, ridge, task.validation_features), task.validation_labels
        )
        for beta in GRID["beta"]
        for ridge in GRID["ridge"]
    }
    assert [(e.setting["beta"], e.setting["ridge"]) for e in found] == list(expected)
    assert len({accuracy for accuracy, _ in expected.values()}) > 3, "all points are alike"
    for evaluation, (accuracy, nll) in zip(found, expected.values(), strict=True):
        assert evaluation.accuracy == pytest.approx(accuracy)
        assert evaluation.nll == pytest.approx(nll, rel=1e-3, abs=1e-4)


def test_a_search_that_takes_long_is_announced():
    task = numpy_task()._replace(
        features=np.empty((1, 16000, 1)),
        validation_labels=np.empty(4000),
        head=Head(np.empty((1000, 1)), 20.0, 0.0),
    )
    assert "whole grid of 2,000 points takes about 27 CPU minutes" in proker.note(task)


@pytest.mark.parametrize("room", [1, 50_000, 1 << 28])
def test_one_eigendecomposition_serves_all_ridges(monkeypatch: pytest.MonkeyPatch, room: int):
    """There is one for each β and not one for each (β, λ), however few λ find room side by side:
    counted as they are computed."""
    decomposed: list[tuple[int, ...]] = []

    def on_the_host(matrix: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        decomposed.append(matrix.shape)
        values, vectors = np.linalg.eigh(np.asarray(matrix))
        return values, vectors

    def counted(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        shapes = jax.ShapeDtypeStruct(matrix.shape[:1], matrix.dtype), matrix
        return jax.pure_callback(on_the_host, shapes, matrix, vmap_method="sequential")

    monkeypatch.setattr(jnp.linalg, "eigh", counted)
    task = on_device(numpy_task(shots=3))
    axes = {"beta": (0.1, 1.0), "ridge": tuple(PROKER.hyper["ridge"].tried)}
    # A record of its own: programs are kept by their method, and this one is not as it should be.
    monkeypatch.setattr(closed_form, "SIDE_BY_SIDE_BYTES", room)
    scores = closed_form.grid_scores(replace(PROKER), {}, axes, task)
    assert decomposed == [(15, 15)] * 2
    monkeypatch.undo()
    whole = closed_form.grid_scores(PROKER, {}, axes, task)
    assert scores.score.shape == (2, 100, 2)
    np.testing.assert_allclose(scores.score, whole.score, rtol=1e-4)
    assert np.ptp(whole.score[..., 1], axis=1).min() > 1e-3, "all points are alike"


@pytest.mark.parametrize(
    ("shots", "beta", "ridge"),
    [
        (1, 3, 0.05),
        (2, 2.6, 0.05),
        (4, 1.5, 0.05),
        (8, 1.66, 0.07),
        (16, 1.7, 0.1),
        (9, 1.66, 0.07),
    ],
)
def test_where_nothing_chooses_it_takes_the_authors_values_for_the_shots(
    shots: int, beta: float, ridge: float, engine: Engine
):
    task = numpy_task(shots=shots)
    (setting,) = PROKER.settings(PROKER.values({}, one=True))
    arrays = fit(PROKER, setting, None, on_device(task), engine)
    assert arrays["beta"] == pytest.approx(beta)
    classify = make_classify(PROKER, setting, arrays, on_device(task).head)
    expected = reference(task, beta, ridge, task.validation_features)
    np.testing.assert_allclose(classify(task.validation_features), expected, atol=2e-5)


def test_a_large_support_set_is_approximated_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, engine: Engine
):
    task = numpy_task(shots=11)
    exact = reference(task, 1.5, 0.5, task.validation_features)
    assert proker.note(on_device(task)) == ""
    monkeypatch.setattr(proker, "MOST_ROWS", 54)
    monkeypatch.setattr(proker, "RANDOM_FEATURES", 1000)
    assert "55 support rows are more than 54, so 1,000 random" in proker.note(on_device(task))
    setting = {"beta": 1.5, "ridge": 0.5}
    arrays = fit(PROKER, setting, None, on_device(task), engine)
    found = make_classify(PROKER, setting, arrays, on_device(task).head)(task.validation_features)
    without = rows(task.validation_features) @ rows(task.head.weights).T
    assert np.abs(found - exact).max() < 0.1 * np.abs(exact - without).max()

    frequencies, phases = arrays["points"].astype(np.float64), arrays["phases"]
    assert frequencies.shape == (1000, 12)
    block = frequencies[:12] / np.linalg.norm(frequencies[:12], axis=1, keepdims=True)
    np.testing.assert_allclose(block @ block.T, np.eye(12), atol=1e-5)

    def mapped(images: np.ndarray) -> np.ndarray:
        return np.cos(images @ frequencies.T + phases) * np.sqrt(2 / 1000)

    # Ridge regression on these features, through 55 × 55 as in the kernel's formula.
    support, left_over = residual(task)
    system = mapped(support) @ mapped(support).T / 0.5 + np.eye(55)
    images = rows(task.validation_features)
    corrected = mapped(images) @ mapped(support).T @ np.linalg.solve(system, left_over)
    np.testing.assert_allclose(found, without + corrected, atol=1e-4)


def test_all_zero_features_are_finite(engine: Engine):
    task = numpy_task()
    task = on_device(task._replace(features=np.zeros_like(task.features)))
    arrays = fit(PROKER, {"beta": 1.5, "ridge": 0.05}, None, task, engine)
    assert all(np.isfinite(array).all() for array in arrays.values())
