"""CLIP-Adapter as a method: what a search says of each setting and what it hands over."""

import numpy as np
import pytest

from clip_adapter.adapters.clip_adapter_method import ClipAdapterMethod, dynamic_part, static_part
from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.method import Evaluation, Grid, Search, pooled
from clip_adapter.adapters.methods import METHODS
from clip_adapter.adapters.training import Task
from tests.adapters.tasks import SHORT, separable_task, start_arrays

METHOD = ClipAdapterMethod()
GRID = Grid(alpha=(0.2, 0.7), learning_rate=(1e-3, 1e-2, 1e30), schedule=SHORT)


@pytest.fixture(scope="module")
def task() -> Task:
    return separable_task(noise=2.5, seed=2)


@pytest.fixture(scope="module")
def found(engine: Engine, task: Task) -> list[Evaluation]:
    return list(METHOD.search(Search(GRID, [task]), engine))


def test_a_search_tries_the_product_of_the_grid(found: list[Evaluation]):
    tried = [(e.setting["alpha"], e.setting["learning_rate"]) for e in found]
    assert tried == [(a, rate) for a in GRID.alpha for rate in GRID.learning_rate]
    assert METHOD.evaluations(GRID) == len(found)
    assert {evaluation.epochs_run for evaluation in found} == {SHORT.epochs}


def test_what_is_handed_over_is_the_adapter_that_was_judged(
    found: list[Evaluation], engine: Engine, task: Task
):
    sound = [evaluation for evaluation in found if not evaluation.failed]
    assert len({evaluation.epoch for evaluation in sound}) > 1, "one epoch for all: too little"
    for evaluation in sound:
        arrays = evaluation.arrays()
        logits = METHOD.logits(
            evaluation.setting, arrays, task.validation_features, task.weights, 20.0, 0.25
        )
        labels = np.asarray(task.validation_labels)
        assert np.mean(logits.argmax(axis=1) == labels) == pytest.approx(evaluation.accuracy)
        logits = logits.astype(np.float64)
        nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
        assert nll.mean() == pytest.approx(evaluation.nll, rel=1e-4)
        again = METHOD.fit(evaluation.setting, evaluation.epoch, task, engine)
        assert arrays.keys() == again.keys()
        assert all(arrays[name].tobytes() == again[name].tobytes() for name in arrays)


def test_settings_that_diverge_are_marked_and_rank_last(found: list[Evaluation]):
    assert [evaluation.failed for evaluation in found] == [False, False, True] * 2
    worst = min(evaluation.score for evaluation in found if not evaluation.failed)
    assert all(evaluation.score < worst for evaluation in found if evaluation.failed)


def test_over_folds_the_mean_chooses_the_epoch(engine: Engine):
    parts = [separable_task(noise=3.0, seed=2, data_seed=number) for number in (2, 4, 9)]
    grid = Grid(alpha=(0.9,), learning_rate=(0.2,), schedule=SHORT)
    (evaluation,) = METHOD.search(Search(grid, parts), engine)
    histories = []
    for part in parts:
        setting = evaluation.setting
        (chunk,) = engine.run(*static_part(setting), part, [dynamic_part(setting)])
        histories.append(np.asarray(chunk.state.history[0], np.float64))
    mean = np.mean(histories, axis=0)
    rule = [(-round(accuracy, 6), nll) for accuracy, nll in mean]
    best = min(range(len(rule)), key=rule.__getitem__)
    own = {min(range(len(mean)), key=lambda i, h=h: (-h[i, 0], h[i, 1])) for h in histories}
    assert best not in {*own, mean[:, 1].argmin()}, "another rule would choose it: too little"
    assert evaluation.epoch == SHORT.evaluated_epochs()[best]
    assert evaluation.accuracy == pytest.approx(mean[best, 0], rel=1e-6)
    assert evaluation.nll == pytest.approx(mean[best, 1], rel=1e-6)
    assert evaluation.arrays is None


def test_one_fold_that_diverges_fails_the_setting(engine: Engine):
    parts = [separable_task(), separable_task(data_seed=1)]
    parts[1] = parts[1]._replace(features=parts[1].features.at[0, 0].set(np.nan))
    grid = Grid(alpha=(0.5,), schedule=SHORT)
    (evaluation,) = METHOD.search(Search(grid, parts), engine)
    assert evaluation.failed


def test_trained_ratios_are_described(task: Task):
    """The mean and the spread over images (α) and classes (β), by the formula."""
    setting = METHOD.single(Grid("both", ("learned",), ("hypernet",), schedule=SHORT))
    parameters, _ = start_arrays(*static_part(setting), task, dynamic_part(setting))
    rng = np.random.default_rng(0)
    arrays = parameters | {
        "image/ratio/logit": np.float32(0.7),
        "text/ratio/direction": rng.normal(size=(32, 1)).astype(np.float32),
        "text/ratio/logit": np.float32(-0.5),
    }
    numbers = METHOD.describe(setting, arrays, task.features[0], task.weights)
    w = np.asarray(task.weights, np.float64)
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    hidden = np.maximum(w @ arrays["text/ratio/hidden/kernel"], 0)
    beta = 1 / (1 + np.exp(0.5 - hidden @ arrays["text/ratio/direction"]))
    assert numbers == pytest.approx(
        {
            "alpha_mean": 1 / (1 + np.exp(-0.7)),
            "alpha_std": 0,
            "beta_mean": beta.mean(),
            "beta_std": beta.std(),
        },
        rel=1e-5,
        abs=1e-6,
    )
    fixed = METHOD.single(Grid(schedule=SHORT))
    both = start_arrays(*static_part(fixed), task, dynamic_part(fixed))
    assert METHOD.describe(fixed, both[0] | both[1], task.features[0], task.weights) == {}


def test_zero_shot_is_judged_by_the_cosines(engine: Engine, task: Task):
    (evaluation,) = METHODS["zero-shot"].search(Search(Grid(), [task]), engine)
    f = np.asarray(task.validation_features, np.float64)
    w = np.asarray(task.weights, np.float64)
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    logits = 20 * f @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T + 0.25
    labels = np.asarray(task.validation_labels)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    assert evaluation.accuracy == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
    assert evaluation.nll == pytest.approx(nll.mean(), rel=1e-4)


def test_equal_numbers_of_right_images_are_equal_accuracies():
    """7 + 8 of 10 and 10 + 5 of 10 in float32 means, and 1 + 5 of folds of different size."""
    tenths = np.float32([[0.7, 1.0], [0.8, 2.0]]), np.float32([[1.0, 1.0], [0.5, 2.0]])
    alike = [task_of(10), task_of(10)]
    assert [pooled(judged, alike).tolist() for judged in tenths] == [[0.75, 1.5], [0.75, 1.5]]
    accuracy, nll = pooled(np.float32([[1 / 3, 3.0], [5 / 7, 1.0]]), [task_of(3), task_of(7)])
    assert accuracy == 0.6
    assert nll == pytest.approx((3 * 3 + 7 * 1) / 10)


def task_of(images: int) -> Task:
    labels = np.zeros(images, np.int32)
    return separable_task()._replace(validation_labels=labels)
