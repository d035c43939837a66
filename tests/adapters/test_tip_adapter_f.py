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
from tests.adapters.closed_tasks import NoJournal, numpy_task, on_device, rows, score
from tests.adapters.test_tip_adapter import reference_keys, reference_logits

TIP_ADAPTER_F = METHODS["tip-adapter-f"]
GRID = {"beta": (0.5, 1.0, 5.5), "alpha": (0.0, 3.0, 20.0)}


def values(**given: tuple) -> dict:
    return TIP_ADAPTER_F.values({**GRID, "alpha_init": (4.0,), **given})


def trained_in_torch(task: Task, epochs: int, learning_rate: float = 1e-3) -> np.ndarray:
    """Keys after so many of 20 epochs, in each of which all images make one step."""
    images, labels = torch.tensor(rows(task.features[0])), torch.tensor(task.labels)
    weights = torch.tensor(rows(task.head.weights))
    values = torch.eye(len(weights), dtype=torch.float64)[labels]
    keys = torch.tensor(reference_keys(task), requires_grad=True)
    optimizer = torch.optim.AdamW([keys], lr=learning_rate, eps=1e-4, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(epochs):
        optimizer.zero_grad()
        cache = torch.exp(-1.0 * (1 - images @ keys.T)) @ values
        logits = task.head.logit_scale * images @ weights.T + task.head.logit_bias + 4.0 * cache
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        schedule.step()
    return keys.detach().numpy()


@pytest.mark.parametrize("epochs", [1, 2, 3, 20])
def test_the_keys_are_trained_as_in_pytorch(epochs: int, engine: Engine):
    task = numpy_task(noise=1.5)
    (setting, *_) = TIP_ADAPTER_F.settings(values())
    found = fit(TIP_ADAPTER_F, setting, epochs, on_device(task), engine)["keys"]
    expected, start = trained_in_torch(task, epochs), reference_keys(task)
    moved = np.abs(expected - start).max()
    assert moved > 5e-4 * min(epochs, 5)
    # Steps of 1e-3 each, which AdamW takes in the gradient's direction whatever its length.
    np.testing.assert_allclose(found - start, expected - start, atol=2e-3 * moved)


def by_setting(found: Iterable[Evaluation]) -> dict[tuple, Evaluation]:
    return {tuple(e.setting.items()): e for e in found}


def expected_score(task: Task, keys: np.ndarray, setting: Setting) -> tuple[float, float]:
    logits = reference_logits(
        task, keys, setting["beta"], setting["alpha"], task.validation_features
    )
    return score(logits, task.validation_labels)


def test_other_settings_are_tried_on_keys_trained_once(engine: Engine):
    task = numpy_task(noise=1.5, validation=20)
    trained: list[float] = []
    counting = Engine(progress=trained.append)
    found = list(search(TIP_ADAPTER_F, values(), [on_device(task)], counting, NoJournal()))
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
    again = fit(TIP_ADAPTER_F, best.setting, best.epoch, on_device(task), engine)
    kept = best.arrays()
    assert all(np.array_equal(kept[name], again[name]) for name in ("keys", "labels"))


def test_each_fold_judges_on_the_keys_that_it_trained(engine: Engine):
    """Two folds of different sizes: their validation images are pooled."""
    folds = [
        numpy_task(noise=1.5, validation=20),
        numpy_task(noise=1.5, validation=5, seed=1),
    ]
    tasks = [on_device(fold) for fold in folds]
    found = list(search(TIP_ADAPTER_F, values(), tasks, engine, NoJournal()))
    keys = [trained_in_torch(fold, 20) for fold in folds]
    for evaluation in found:
        scores = [
            expected_score(f, k, evaluation.setting) for f, k in zip(folds, keys, strict=True)
        ]
        accuracy, nll = np.average(scores, axis=0, weights=[100, 25])
        assert evaluation.accuracy == pytest.approx(accuracy, abs=1e-6)
        assert evaluation.nll == pytest.approx(nll, rel=1e-3, abs=1e-4)
        assert evaluation.arrays is None


LEARNING_RATES = (1e-4, 1e-3, 1e-2, 3e-2)


def test_halving_judges_runs_by_the_best_of_their_settings(engine: Engine):
    task = on_device(numpy_task(noise=1.5, validation=20))
    tried = values(learning_rate=LEARNING_RATES)
    full = by_setting(search(TIP_ADAPTER_F, tried, [task], engine, NoJournal()))
    halved = list(search(TIP_ADAPTER_F, tried, [task], engine, NoJournal(), halving=True))
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


class Remembering(NoJournal):
    """Knows what it is given."""

    def __init__(self, found: Iterable[Evaluation]) -> None:
        super().__init__()
        self.found = {(tuple(e.setting.items()), e.epochs_run): e for e in found}

    def known(self, setting: Setting, epochs_run: int) -> Evaluation | None:
        return self.found.get((tuple(setting.items()), epochs_run))


def test_what_is_known_is_not_trained_again():
    task = on_device(numpy_task(noise=1.5, validation=20))
    tried = values(learning_rate=LEARNING_RATES)
    trained: list[float] = []
    counting = Engine(progress=trained.append)
    found = list(search(TIP_ADAPTER_F, tried, [task], counting, NoJournal()))
    assert sum(trained) == pytest.approx(4)
    # Interrupted within the second run.
    interrupted = Remembering(found[: len(found) // 4 + 3])
    again = list(search(TIP_ADAPTER_F, tried, [task], counting, interrupted))
    assert sum(trained) == pytest.approx(7)
    assert {s: e.score for s, e in by_setting(again).items()} == {
        s: e.score for s, e in by_setting(found).items()
    }


def test_a_run_that_diverged_has_no_setting_that_did_well(engine: Engine):
    task = on_device(numpy_task(noise=1.5))
    found = list(search(TIP_ADAPTER_F, values(learning_rate=(3e38,)), [task], engine, NoJournal()))
    assert len(found) == 9
    assert all(e.failed for e in found)


def test_where_nothing_chooses_it_classifies_as_it_was_trained():
    (setting,) = TIP_ADAPTER_F.settings(TIP_ADAPTER_F.values({}, one=True))
    assert setting["beta"] == setting["beta_init"]
    assert setting["alpha"] == setting["alpha_init"]
