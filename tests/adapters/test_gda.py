"""GDA against its formula in float64 NumPy, through the D × D pseudo-inverse."""

import numpy as np
import pytest

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit, search
from clip_adapter.adapters.method import Head, Task
from clip_adapter.adapters.methods.gda import NEIGHBOURS
from clip_adapter.adapters.registry import METHODS
from tests.adapters.closed_tasks import NoJournal, numpy_task, on_device, rows, score

GDA = METHODS["gda"]
ALPHAS = (1e-4, 1e-2, 0.1, 1.0, 100.0)


def reference(images: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, ...]:
    """(kernel, bias) of images of which each class has some."""
    count, dim = images.shape
    means = np.stack([images[labels == c].mean(axis=0) for c in range(classes)])
    centred = images - means[labels]
    covariance = centred.T @ centred / (count - 1)
    shrunk = (count - 1) * covariance + np.trace(covariance) * np.eye(dim)
    precision = dim * np.linalg.pinv(shrunk, hermitian=True)
    kernel = precision @ means.T
    return kernel, np.log(1 / classes) - np.einsum("cd,dc->c", means, kernel) / 2


def flattened(task: Task) -> tuple[np.ndarray, np.ndarray]:
    views, _, dim = task.features.shape
    return rows(task.features).reshape(-1, dim), np.tile(task.labels, views)


def zero_shot(task: Task, images: np.ndarray) -> np.ndarray:
    return task.head.logit_scale * rows(images) @ rows(task.head.weights).T + task.head.logit_bias


TASKS = {
    "more images than dimensions": numpy_task(dim=6, shots=8),
    "fewer": numpy_task(dim=40),
    "as many": numpy_task(dim=20, shots=4),
    "views": numpy_task(dim=40, views=3),
    "one shot with views": numpy_task(shots=1, views=3),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_fit_and_logits_are_the_formula(task: Task, engine: Engine):
    kernel, bias = reference(*flattened(task), 5)
    arrays = fit(GDA, {"alpha": 0.3}, None, on_device(task), engine)
    np.testing.assert_allclose(arrays["kernel"], kernel, atol=1e-5 * np.abs(kernel).max())
    np.testing.assert_allclose(arrays["bias"], bias, rtol=1e-5)
    classify = make_classify(GDA, {"alpha": 0.3}, arrays, on_device(task).head)
    images = task.validation_features
    expected = zero_shot(task, images) + 0.3 * (rows(images) @ kernel + bias)
    np.testing.assert_allclose(classify(images), expected, atol=1e-5 * np.abs(expected).max())


def test_each_point_of_the_grid_is_what_a_loop_in_float64_finds(engine: Engine):
    task = numpy_task(noise=1.5, dim=40, validation=20)
    found = list(search(GDA, {"alpha": ALPHAS}, [on_device(task)], engine, NoJournal()))
    kernel, bias = reference(*flattened(task), 5)
    images = task.validation_features
    expected = [
        score(
            zero_shot(task, images) + alpha * (rows(images) @ kernel + bias),
            task.validation_labels,
        )
        for alpha in ALPHAS
    ]
    assert len({accuracy for accuracy, _ in expected}) > 2, "all points are alike"
    for evaluation, (accuracy, nll) in zip(found, expected, strict=True):
        assert evaluation.accuracy == pytest.approx(accuracy)
        assert evaluation.nll == pytest.approx(nll, rel=1e-3, abs=1e-4)


def repeated(task: Task) -> Task:
    """Each image three times."""
    return task._replace(
        features=np.repeat(task.features, 3, axis=1), labels=np.repeat(task.labels, 3)
    )


@pytest.mark.parametrize(
    "task", [numpy_task(shots=1), repeated(numpy_task(shots=1))], ids=["one shot", "repeated"]
)
def test_without_spread_it_is_zero_shot(task: Task, engine: Engine):
    arrays = fit(GDA, {"alpha": 100.0}, None, on_device(task), engine)
    assert not arrays["kernel"].any()
    assert np.unique(arrays["bias"]).size == 1
    classify = make_classify(GDA, {"alpha": 100.0}, arrays, on_device(task).head)
    found = classify(task.validation_features)
    expected = zero_shot(task, task.validation_features) + 100 * np.log(1 / 5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_class_without_images_takes_the_mean_of_its_neighbours(engine: Engine):
    task = numpy_task(classes=6, shots=30, empty=(2, 5))
    images, labels = flattened(task)
    found = fit(GDA, {"alpha": 1.0}, None, on_device(task), engine)
    means = np.zeros((6, 12))
    for c in range(6):
        own = images[labels == c]
        if c in (2, 5):
            own = images[np.argsort(-(images @ task.head.weights[c]))[:NEIGHBOURS]]
        means[c] = own.mean(axis=0)
    centred = images - means[labels]
    trace = (centred**2).sum() / (len(images) - 1)
    kernel = 12 * np.linalg.inv(centred.T @ centred + trace * np.eye(12)) @ means.T
    np.testing.assert_allclose(found["kernel"], kernel, atol=1e-5 * np.abs(kernel).max())


def test_new_classes_are_made_from_their_nearest_neighbours(engine: Engine):
    task = numpy_task(shots=30)
    images, _ = flattened(task)
    weights = rows(np.random.default_rng(5).normal(size=(3, 12)))
    near = [images[np.argsort(-(images @ w))[:NEIGHBOURS]] for w in weights]
    means = np.stack(
        [
            np.concatenate([n, np.tile(w, (16, 1))]).mean(0)
            for n, w in zip(near, weights, strict=True)
        ]
    )
    precision = np.zeros((12, 12))
    for own, w in zip(near, weights, strict=True):
        covariance = (own - w).T @ (own - w) / (NEIGHBOURS - 1)
        shrunk = (NEIGHBOURS - 1) * covariance + np.trace(covariance) * np.eye(12)
        precision += 12 * np.linalg.pinv(shrunk) / 3
    kernel = precision @ means.T
    bias = np.log(1 / 3) - np.einsum("cd,dc->c", means, kernel) / 2
    head = Head(weights, 20.0, 0.25)
    fitted = fit(GDA, {"alpha": 1.0}, None, on_device(task), engine)
    found = GDA.for_classes(fitted, {"alpha": 1.0}, on_device(task), head)
    np.testing.assert_allclose(found["kernel"], kernel, atol=1e-4 * np.abs(kernel).max())
    np.testing.assert_allclose(found["bias"], bias, rtol=1e-4)


@pytest.mark.parametrize(("shots", "weight"), [(2, 0.0031748), (4, 0.010079), (16, 0.10159)])
def test_the_weight_grows_with_the_images_where_nothing_chooses(
    shots: int, weight: float, engine: Engine
):
    task = on_device(numpy_task(shots=shots))
    found = fit(GDA, GDA.default_setting(GDA.values({}, one=True)), None, task, engine)
    assert found["weight"] == pytest.approx(weight, rel=1e-4)


def test_all_zero_features_are_finite(engine: Engine):
    task = numpy_task()
    features = np.zeros_like(task.features)
    for some in (features, np.where(task.labels[None, :, None] == 1, 0, task.features)):
        arrays = fit(GDA, {"alpha": 1.0}, None, on_device(task._replace(features=some)), engine)
        assert all(np.isfinite(array).all() for array in arrays.values())
