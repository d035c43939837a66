"""Tip-Adapter-F: its keys against PyTorch, and what is tried once they are trained."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from clip_adapter.adapters.engine.evaluation import Evaluation
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import fit, rungs_of, search
from clip_adapter.adapters.method import Setting, Task
from clip_adapter.adapters.registry import METHODS
from tests.adapters.tasks import (
    CLASSES,
    Notes,
    exact,
    separable_task,
    unit,
    validation_accuracy,
    validation_nll,
    zero_shot,
)
from tests.adapters.test_closed_forms import tip_adapter, tip_keys

TIP_ADAPTER_F = METHODS["tip-adapter-f"]
GRID = {"beta": (0.5, 1.0, 5.5), "alpha": (0.0, 3.0, 20.0)}


def values(**given: tuple) -> dict:
    return TIP_ADAPTER_F.values({**GRID, "alpha_init": (4.0,), **given})


def trained_in_torch(task: Task, epochs: int, learning_rate: float = 1e-3) -> np.ndarray:
    """Keys after so many of 20 epochs, in each of which all images make one step."""
    task = exact(task)
    images, labels = torch.tensor(unit(task.features[0])), torch.tensor(task.labels).long()
    before = torch.tensor(zero_shot(task, task.features[0]))
    values = torch.eye(CLASSES, dtype=torch.float64)[labels]
    keys = torch.tensor(tip_keys(task), requires_grad=True)
    optimizer = torch.optim.AdamW([keys], lr=learning_rate, eps=1e-4, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(epochs):
        optimizer.zero_grad()
        cache = torch.exp(-1.0 * (1 - images @ keys.T)) @ values
        torch.nn.functional.cross_entropy(before + 4.0 * cache, labels).backward()
        optimizer.step()
        schedule.step()
    return keys.detach().numpy()


@pytest.mark.parametrize("epochs", [1, 2, 3, 20])
def test_the_keys_are_trained_as_in_pytorch(epochs: int, engine: Engine):
    task = separable_task(noise=3.0, data_seed=4)
    (setting, *_) = TIP_ADAPTER_F.settings(values())
    found = fit(TIP_ADAPTER_F, setting, epochs, task, engine)["keys"]
    expected, start = trained_in_torch(task, epochs), tip_keys(exact(task))
    moved = np.abs(expected - start).max()
    assert moved > 5e-4 * min(epochs, 5)
    # Steps of 1e-3 each, which AdamW takes in the gradient's direction whatever its length.
    np.testing.assert_allclose(found - start, expected - start, atol=2e-3 * moved)


def by_setting(found: Iterable[Evaluation]) -> dict[tuple, Evaluation]:
    return {tuple(e.setting.items()): e for e in found}


def expected_score(task: Task, keys: np.ndarray, setting: Setting) -> tuple[float, float]:
    logits = tip_adapter(exact(task), setting, keys)(exact(task).validation_features)
    return validation_accuracy(logits, task), validation_nll(logits, task)


def test_other_settings_are_tried_on_keys_trained_once(engine: Engine):
    task = separable_task(noise=3.0, data_seed=4)
    trained: list[float] = []
    counting = Engine(progress=trained.append)
    found = list(search(TIP_ADAPTER_F, values(), [task], counting, Notes()))
    assert [e.setting for e in found] == TIP_ADAPTER_F.settings(values())
    assert sum(trained) == pytest.approx(1), "each point has a run of its own"
    keys = trained_in_torch(task, 20)
    assert len({e.accuracy for e in found}) > 3, "all points are alike"
    for evaluation in found:
        accuracy, nll = expected_score(task, keys, evaluation.setting)
        assert evaluation.accuracy == pytest.approx(accuracy, abs=1e-6)
        assert evaluation.nll == pytest.approx(nll, rel=1e-3, abs=1e-4)
        assert evaluation.epochs_run == evaluation.epoch == 20
    best = max(found, key=lambda e: e.score)
    again = fit(TIP_ADAPTER_F, best.setting, best.epoch, task, engine)
    kept = best.arrays()
    assert all(np.array_equal(kept[name], again[name]) for name in ("keys", "labels"))


def test_each_fold_judges_on_the_keys_that_it_trained(engine: Engine):
    folds = [separable_task(noise=3.0, data_seed=4), separable_task(noise=3.0, data_seed=1)]
    found = list(search(TIP_ADAPTER_F, values(), folds, engine, Notes()))
    keys = [trained_in_torch(fold, 20) for fold in folds]
    for evaluation in found:
        scores = [
            expected_score(f, k, evaluation.setting) for f, k in zip(folds, keys, strict=True)
        ]
        accuracy, nll = np.mean(scores, axis=0)
        assert evaluation.accuracy == pytest.approx(accuracy, abs=1e-6)
        assert evaluation.nll == pytest.approx(nll, rel=1e-3, abs=1e-4)
        assert evaluation.arrays is None


LEARNING_RATES = (1e-4, 1e-3, 1e-2, 3e-2)


def test_halving_judges_runs_by_the_best_of_their_settings(engine: Engine):
    task = separable_task(noise=3.0, data_seed=4)
    tried = values(learning_rate=LEARNING_RATES)
    full = by_setting(search(TIP_ADAPTER_F, tried, [task], engine, Notes()))
    halved = list(search(TIP_ADAPTER_F, tried, [task], engine, Notes(), halving=True))
    first, *_, last = rungs_of(TIP_ADAPTER_F.settings(tried)[0], halving=True)
    at_first = [e for e in halved if e.epochs_run == first]
    assert len(at_first) == len(full)
    best = {
        rate: max(e.score for e in at_first if e.setting["learning_rate"] == rate)
        for rate in LEARNING_RATES
    }
    going_on = {e.setting["learning_rate"] for e in halved if e.epochs_run > first}
    assert going_on == set(sorted(best, key=lambda rate: best[rate])[-2:])
    at_last = by_setting(e for e in halved if e.epochs_run == last)
    assert len(at_last) == len(GRID["beta"]) * len(GRID["alpha"])
    for setting, evaluation in at_last.items():
        assert evaluation.score == full[setting].score


def test_what_is_known_is_not_trained_again():
    task = separable_task(noise=3.0, data_seed=4)
    tried = values(learning_rate=LEARNING_RATES)
    trained: list[float] = []
    counting = Engine(progress=trained.append)
    found = list(search(TIP_ADAPTER_F, tried, [task], counting, Notes()))
    assert sum(trained) == pytest.approx(4)
    # Interrupted within the second run.
    interrupted = Notes(found=found[: len(found) // 4 + 3])
    again = list(search(TIP_ADAPTER_F, tried, [task], counting, interrupted))
    assert sum(trained) == pytest.approx(7)
    assert {s: e.score for s, e in by_setting(again).items()} == {
        s: e.score for s, e in by_setting(found).items()
    }


def test_a_run_that_diverged_has_no_setting_that_did_well(engine: Engine):
    task = separable_task(noise=3.0, data_seed=4)
    found = list(search(TIP_ADAPTER_F, values(learning_rate=(3e38,)), [task], engine, Notes()))
    assert len(found) == 9
    assert all(e.failed for e in found)


def test_where_nothing_chooses_it_classifies_as_it_was_trained():
    (setting,) = TIP_ADAPTER_F.settings(TIP_ADAPTER_F.values({}, one=True))
    assert setting["beta"] == setting["beta_init"]
    assert setting["alpha"] == setting["alpha_init"]
