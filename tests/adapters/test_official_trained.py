"""Trained methods on the embedded features, beside what the official code reached there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import search
from clip_adapter.adapters.registry import METHODS
from tests.adapters.closed_tasks import NoJournal
from tests.adapters.official_targets import SEEDS, Splits, official
from tests.adapters.tasks import needed, setting_of

OFFICIAL = official("trained")


@pytest.fixture(scope="module")
def splits(digits_cache: Path) -> Splits:
    return Splits.of(digits_cache)


def accuracies(splits: Splits, name: str, shots: int, engine: Engine, **given: Any) -> np.ndarray:
    method = METHODS[name]
    setting = setting_of(method, **given)
    tasks = [needed(method, splits.task(shots, seed)) for seed in SEEDS]
    return np.array([splits.accuracy(method, setting, task, engine) for task in tasks])


@pytest.mark.parametrize("shots", [1, 16])
@pytest.mark.parametrize("name", ["taskres", "clap", "zs-lp"])
def test_they_classify_as_the_official_code_does(
    name: str, shots: int, splits: Splits, engine: Engine
):
    """One step an epoch on all images: the batch order means nothing, and all agree but for
    images on the edge, of which two are allowed."""
    given = {"alpha": 0.5, "epochs": 100 if shots < 8 else 200} if name == "taskres" else {}
    found = accuracies(splits, name, shots, engine, **given)
    np.testing.assert_allclose(
        found, OFFICIAL[name][str(shots)], atol=2.5 / len(splits.test.labels)
    )


@pytest.mark.parametrize("shots", [1, 16])
def test_lp_plus_plus_lies_within_the_spread_over_seeds(shots: int, splits: Splits, engine: Engine):
    """Of steps that do equally well on validation the official code takes the last one, this the
    likeliest."""
    found = accuracies(splits, "lp++", shots, engine)
    wanted = np.array(OFFICIAL["lp++"][str(shots)])
    assert abs(found.mean() - wanted.mean()) <= wanted.std(ddof=1)


@pytest.mark.parametrize("shots", [1, 16])
def test_tip_adapter_f_lies_within_the_spread_over_seeds(
    shots: int, splits: Splits, engine: Engine
):
    """The official code takes the best epoch, and the first of equally good points of its search;
    this takes the last epoch, and of equally good points the likeliest."""
    method = METHODS["tip-adapter-f"]
    found = []
    for seed in SEEDS:
        task = splits.task(shots, seed)
        tried = search(method, method.values({}), [task], engine, NoJournal())
        best = max(tried, key=lambda evaluation: evaluation.score)
        found.append(splits.accuracy(method, best.setting, task, engine))
    wanted = np.array(OFFICIAL["tip-adapter-f"][str(shots)])
    assert abs(np.mean(found) - wanted.mean()) <= wanted.std(ddof=1)
