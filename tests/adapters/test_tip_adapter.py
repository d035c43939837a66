"""Tip-Adapter against its formula in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit, search
from clip_adapter.adapters.method import Arrays, Setting, Task
from clip_adapter.adapters.registry import METHODS
from tests.adapters.closed_tasks import NoJournal, numpy_task, on_device, rows, score

TIP_ADAPTER = METHODS["tip-adapter"]
GRID = {"beta": (0.1, 1.3, 5.5, 40.0), "alpha": (0.0, 3.0, 20.0)}


def reference_keys(task: Task) -> np.ndarray:
    return rows(rows(task.features).mean(axis=0))


def reference_logits(
    task: Task, keys: np.ndarray, beta: float, alpha: float, images: np.ndarray
) -> np.ndarray:
    """The formula, one image and one key at a time."""
    head = task.head
    logits = head.logit_scale * rows(images) @ rows(head.weights).T + head.logit_bias
    for image, row in zip(rows(images), logits, strict=True):
        for key, label in zip(keys, task.labels, strict=True):
            row[label] += alpha * np.exp(-beta * (1 - image @ key))
    return logits


TASKS = {
    "one view": numpy_task(),
    "views": numpy_task(views=3),
    "one shot": numpy_task(shots=1),
    "a class without images": numpy_task(empty=(2,)),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_fit_and_logits_are_the_formula(task: Task, engine: Engine):
    setting = {"beta": 5.5, "alpha": 1.5}
    arrays = fit(TIP_ADAPTER, setting, None, on_device(task), engine)
    keys = reference_keys(task)
    np.testing.assert_allclose(arrays["keys"], keys, atol=1e-6)
    classify = make_classify(TIP_ADAPTER, setting, arrays, on_device(task).head)
    expected = reference_logits(task, keys, 5.5, 1.5, task.validation_features)
    np.testing.assert_allclose(classify(task.validation_features), expected, atol=2e-5)


def test_each_point_of_the_grid_is_what_a_loop_in_float64_finds(engine: Engine):
    task = numpy_task(noise=1.5, validation=20)
    found = list(search(TIP_ADAPTER, GRID, [on_device(task)], engine, NoJournal()))
    keys = reference_keys(task)
    expected = {
        (beta, alpha): score(
            reference_logits(task, keys, beta, alpha, task.validation_features),
            task.validation_labels,
        )
        for beta in GRID["beta"]
        for alpha in GRID["alpha"]
    }
    assert [(e.setting["beta"], e.setting["alpha"]) for e in found] == list(expected)
    assert len({accuracy for accuracy, _ in expected.values()}) > 3, "all points are alike"
    for evaluation, (accuracy, nll) in zip(found, expected.values(), strict=True):
        assert evaluation.accuracy == pytest.approx(accuracy)
        assert evaluation.nll == pytest.approx(nll, rel=1e-3, abs=1e-4)
    best = max(found, key=lambda evaluation: evaluation.score)
    assert (best.setting["beta"], best.setting["alpha"]) == max(
        expected, key=lambda point: (expected[point][0], -expected[point][1])
    )


def test_all_zero_features_are_finite(engine: Engine):
    task = numpy_task()
    features = task.features.copy()
    features[:, 0] = 0
    task = on_device(task._replace(features=features))
    arrays = fit(TIP_ADAPTER, {"beta": 5.5, "alpha": 1.0}, None, task, engine)
    classify = make_classify(TIP_ADAPTER, {"beta": 5.5, "alpha": 1.0}, arrays, task.head)
    assert np.isfinite(classify(np.zeros((2, task.features.shape[-1])))).all()


def zero_shot(task: Task) -> np.ndarray:
    head = task.head
    return head.logit_scale * rows(task.validation_features) @ head.weights.T + head.logit_bias


def test_without_weight_it_is_zero_shot(engine: Engine):
    task = numpy_task()
    setting: Setting = {"beta": 5.5, "alpha": 0.0}
    arrays: Arrays = fit(TIP_ADAPTER, setting, None, on_device(task), engine)
    found = TIP_ADAPTER.logits(jnp, arrays, setting, task.validation_features, task.head)
    np.testing.assert_allclose(jax.device_get(found), zero_shot(task), atol=2e-5)
