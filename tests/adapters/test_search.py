"""What a search says of each setting and what it hands over, for CLIP-Adapter."""

import itertools

import jax
import numpy as np
import pytest

from clip_adapter.adapters.engine.evaluation import DIVERGED, Evaluation, Score
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify, pooled
from clip_adapter.adapters.engine.search import fit, search
from clip_adapter.adapters.method import Task
from clip_adapter.adapters.optimisation import evaluated_epochs
from tests.adapters.tasks import (
    CLIP_ADAPTER,
    EACH_EPOCH,
    SHORT,
    Notes,
    separable_task,
    setting_of,
    validation_accuracy,
    validation_nll,
)

ALPHAS, RATES = (0.2, 0.7), (1e-3, 1e-2, 1e30)
GIVEN = {"alpha": ALPHAS, "learning_rate": RATES}


@pytest.fixture(scope="module")
def task() -> Task:
    return separable_task(noise=2.5, seed=2)


@pytest.fixture(scope="module")
def found(engine: Engine, task: Task) -> list[Evaluation]:
    """Of runs that keep their best epoch; test_conformance.py has the others."""
    values = CLIP_ADAPTER.values(GIVEN | {name: (value,) for name, value in EACH_EPOCH.items()})
    return list(search(CLIP_ADAPTER, values, [task], engine, Notes()))


def test_a_search_tries_the_product_of_the_values(found: list[Evaluation]):
    tried = [(e.setting["alpha"], e.setting["learning_rate"]) for e in found]
    assert tried == [(alpha, rate) for alpha in ALPHAS for rate in RATES]
    assert {evaluation.epochs_run for evaluation in found} == {SHORT["epochs"]}


def test_what_is_handed_over_is_the_adapter_that_was_judged(
    found: list[Evaluation], engine: Engine, task: Task
):
    sound = [evaluation for evaluation in found if not evaluation.failed]
    assert len({evaluation.epoch for evaluation in sound}) > 1
    for evaluation in sound:
        arrays = evaluation.arrays()
        classify = make_classify(CLIP_ADAPTER, evaluation.setting, arrays, task.head)
        logits = classify(task.validation_features)
        assert validation_accuracy(logits, task) == pytest.approx(evaluation.accuracy)
        assert validation_nll(logits, task) == pytest.approx(evaluation.nll, rel=1e-3, abs=1e-4)
        again = fit(CLIP_ADAPTER, evaluation.setting, evaluation.epoch, task, engine)
        assert arrays.keys() == again.keys()
        assert all(arrays[name].tobytes() == again[name].tobytes() for name in arrays)


def test_settings_that_diverge_are_marked_and_rank_last(found: list[Evaluation]):
    assert [evaluation.failed for evaluation in found] == [False, False, True] * 2
    worst = min(evaluation.score for evaluation in found if not evaluation.failed)
    assert all(evaluation.score < worst for evaluation in found if evaluation.failed)


def test_over_folds_the_mean_chooses_the_epoch(engine: Engine):
    parts = [separable_task(noise=3.0, seed=2, data_seed=number) for number in (0, 2, 10)]
    setting = setting_of(alpha=0.9, learning_rate=0.2, **EACH_EPOCH)
    values = {name: (value,) for name, value in setting.items()}
    (evaluation,) = search(CLIP_ADAPTER, CLIP_ADAPTER.values(values), parts, engine, Notes())
    histories = []
    for part in parts:
        (chunk,) = engine.run(CLIP_ADAPTER, [setting], part)
        histories.append(np.asarray(chunk.state.history[0], np.float64))
    mean = np.mean(histories, axis=0)
    rule = [(-round(accuracy, 6), nll) for accuracy, nll in mean]
    best = min(range(len(rule)), key=rule.__getitem__)
    own = {min(range(len(mean)), key=lambda i, h=h: (-h[i, 0], h[i, 1])) for h in histories}
    assert best not in {*own, mean[:, 1].argmin()}, "another rule would choose it: too little"
    assert evaluation.epoch == evaluated_epochs(setting)[best]
    assert evaluation.accuracy == pytest.approx(mean[best, 0], rel=1e-6)
    assert evaluation.nll == pytest.approx(mean[best, 1], rel=1e-6)
    assert evaluation.arrays is None


def test_one_fold_that_diverges_fails_the_setting(engine: Engine):
    parts = [separable_task(), separable_task(data_seed=1)]
    parts[1] = parts[1]._replace(features=parts[1].features.at[0, 0].set(np.nan))
    values = {name: (value,) for name, value in setting_of(**SHORT).items()}
    (evaluation,) = search(CLIP_ADAPTER, CLIP_ADAPTER.values(values), parts, engine, Notes())
    assert evaluation.failed


def test_better_is_one_order_also_within_a_program():
    pairs = [Score(a, b) for a in (0.25, 0.5) for b in (-2.0, -1.0)] + [DIVERGED]
    for one, other in itertools.product(pairs, repeat=2):
        assert bool(jax.jit(Score.beats)(one, other)) == (one > other)
    assert pairs[0] < pairs[1] < pairs[2] < pairs[3] > DIVERGED
    assert max([*pairs, Score(0.5, -1.0)], key=lambda score: score) is pairs[3], "not the earlier"


def test_equal_numbers_of_right_images_are_equal_accuracies():
    """7 + 8 of 10 and 10 + 5 of 10 in float32 means, and 1 + 5 of folds of different size."""
    tenths = np.float32([[0.7, 1.0], [0.8, 2.0]]), np.float32([[1.0, 1.0], [0.5, 2.0]])
    alike = [task_of(10), task_of(10)]
    assert [pooled(judged, alike).tolist() for judged in tenths] == [[0.75, 1.5], [0.75, 1.5]]
    accuracy, nll = pooled(np.float32([[1 / 3, 3.0], [5 / 7, 1.0]]), [task_of(3), task_of(7)])
    assert accuracy == 0.6
    assert nll == pytest.approx((3 * 3 + 7 * 1) / 10)


def task_of(images: int) -> Task:
    return separable_task()._replace(validation_labels=np.zeros(images, np.int32))
