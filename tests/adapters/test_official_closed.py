"""Closed forms on the embedded default's features, beside what the official code reached there."""

from pathlib import Path

import pytest

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import search
from clip_adapter.adapters.methods.tip_adapter import even
from clip_adapter.adapters.registry import METHODS
from tests.adapters.closed_tasks import NoJournal
from tests.adapters.official_targets import SEEDS, Splits, official

OFFICIAL = official("closed")
GRIDS = {
    "tip-adapter": {"beta": even(50, 200), "alpha": even(50, 200)},
    "gda": {"alpha": METHODS["gda"].hyper["alpha"].tried},
}


@pytest.fixture(scope="module")
def splits(digits_cache: Path) -> Splits:
    return Splits.of(digits_cache)


@pytest.mark.parametrize("shots", [1, 4, 16])
@pytest.mark.parametrize("name", GRIDS)
def test_they_choose_and_classify_as_the_official_code_does(
    name: str, shots: int, splits: Splits, engine: Engine
):
    """What validation chose there is among the best points here, and has the same test accuracy;
    an image on the edge is allowed."""
    method = METHODS[name]
    for seed, wanted in zip(SEEDS, OFFICIAL[name][str(shots)], strict=True):
        task = splits.task(shots, seed)
        found = list(search(method, GRIDS[name], [task], engine, NoJournal()))
        best = max(e.accuracy for e in found)
        chosen = min(found, key=lambda e: sum(abs(e.setting[n] - wanted[n]) for n in e.setting))
        assert chosen.setting == pytest.approx({n: wanted[n] for n in chosen.setting}, abs=1e-3)
        assert chosen.accuracy == pytest.approx(best, abs=1.5 / len(task.validation_labels))
        accuracy = splits.accuracy(method, chosen.setting, task, engine)
        assert accuracy == pytest.approx(wanted["accuracy"], abs=1.5 / len(splits.test.labels))
