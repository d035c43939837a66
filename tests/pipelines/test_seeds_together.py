"""`fit --placement vectorised`: seeds begin together, and the run is that of one by one."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from clip_adapter.adapters.engine.program import Program
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.predictions import read_predictions
from clip_adapter.pipelines.fitting.results import TaskResult
from tests.pipelines.run_files import files, killed_after
from tests.pipelines.tiny_cache import short, tiny_data, write_cache

pytestmark = pytest.mark.usefixtures("pictures_drawn_once")
SEEDS = (1, 2, 3)
GRID = {"alpha": (0.2, 0.6), "learning_rate": (0.01, 0.1)}
HOW: dict[str, dict[str, Any]] = {
    "full": GRID | {"method": ("clip-adapter", "taskres")},
    "halving": GRID | {"search": "halving"},
    "cv": {"select": "cv", "shots": 2},
    "none": {"select": "none"},
}


def run(cache: Path, out: Path, **how: Any) -> tuple[list[TaskResult], int]:
    """The results, and how often settings were begun with."""
    calls, call = [0], Program.initial_states

    def counting(self: Program, *inputs: Any) -> Any:
        calls[0] += 1
        return call(self, *inputs)

    with patch.object(Program, "initial_states", counting):
        results = fit(short(cache, out, seeds=SEEDS, placement="vectorised", **how)).results
    return list(results), calls[0]


def assert_same(
    found: list[TaskResult], expected: list[TaskResult], one: Path, other: Path
) -> None:
    """What was chosen bit for bit, what was computed to rounding."""
    assert len(found) == len(expected) >= len(SEEDS)
    for a, b in zip(found, expected, strict=True):
        assert (a.key, a.setting, a.epoch, a.tried) == (b.key, b.setting, b.epoch, b.tried)
        assert (a.val_accuracy, a.test_accuracy) == (b.val_accuracy, b.test_accuracy)
        assert (a.val_nll or 0) == pytest.approx(b.val_nll or 0, rel=1e-4)
        ours, theirs = (read_predictions(folder, *a.key) for folder in (one, other))
        assert np.array_equal(ours.predicted, theirs.predicted)
        np.testing.assert_allclose(ours.confidence, theirs.confidence, atol=1e-4)
    assert files(one).keys() == files(other).keys()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("seeds") / "features.h5", tiny_data())


@pytest.mark.parametrize("how", HOW)
def test_the_run_is_that_of_one_by_one(how: str, cache: Path, tmp_path: Path) -> None:
    found, calls = run(cache, tmp_path / "together", **HOW[how])
    with patch.object(Engine, "begin", lambda *_: None):
        expected, alone = run(cache, tmp_path / "alone", **HOW[how])
    assert calls < alone
    assert_same(found, expected, tmp_path / "together", tmp_path / "alone")


@pytest.mark.parametrize(("steps", "what"), [(6, "add_fit"), (2, "add_result")])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(
    steps: int, what: str, cache: Path, tmp_path: Path
) -> None:
    """Within a task of which some fits are kept, and between the first task and its peers."""
    expected, _ = run(cache, tmp_path / "whole", **HOW["full"])
    with killed_after(steps, what):
        run(cache, tmp_path / "run", **HOW["full"])
    found = fit(FitConfig(resume=tmp_path / "run")).results
    assert_same([*found], expected, tmp_path / "run", tmp_path / "whole")
