"""What `fit --verbose` and the page say beside accuracies."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.make_plan import make_plan
from clip_adapter.pipelines.fitting.predictions import Predictions, predictions_path
from clip_adapter.pipelines.fitting.results import TaskResult
from clip_adapter.pipelines.reporting.beside_the_mean import beside_guessing, beside_the_mean
from clip_adapter.pipelines.reporting.entries import pool
from clip_adapter.pipelines.reporting.runs import Run

LABELS = np.array([0] * 5 + [1] * 10 + [3] * 4, np.int32)
NAMES, IDS = ["ant", "b\x1bee", "unseen", "cat"], [str(n) for n in range(19)]
# Images of class 0, 1 and 3 that are right, at 4 shots with seed 1 and 2.
RIGHT = {"clip-adapter": [(1, 9, 4), (2, 10, 4)], "zero-shot": [(5, 1, 2), (5, 1, 2)]}
RIGHT["linear-probe"] = [(5, 9, 4), (5, 10, 4)]


@pytest.fixture
def said(tmp_path: Path) -> list[str]:
    plan = make_plan(FitConfig(shots=(2, 4), seeds=(1, 2)), "0" * 64)
    results = []
    for method, counts in RIGHT.items():
        for seed, some in enumerate(counts, 1):
            right = np.concatenate(
                [np.arange(n) < k for n, k in zip((5, 10, 4), some, strict=True)]
            )
            predicted = np.where(right, LABELS, (LABELS + 1) % 4).astype(np.int32)
            kept = Predictions(LABELS, predicted, np.ones(19, np.float32), IDS, NAMES)
            path = tmp_path / predictions_path(method, 4, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept.content())
            tested = {"test_accuracy": kept.accuracy, "test_images": 19}
            row = TaskResult(method, 4, seed, "none", {}, **tested)
            better = {"clip-adapter": 0.6, "zero-shot": 0.5, "linear-probe": 0.55}[method]
            results += [replace(row, shots=2, test_accuracy=better), row]
    about: Any = SimpleNamespace(class_names=NAMES)
    entries = pool([Run(tmp_path, plan, about, {}, results)])
    return [*beside_guessing(entries), *beside_the_mean(entries)]


def test_the_majority_rate(said: list[str]):
    assert said[0].startswith("52.63 % is reached by always saying 'b\\x1bee',")


def test_the_classes_it_does_worst_on(said: list[str]):
    """Over the seeds; a class without test images is none of them, nor is one that is all right."""
    assert said[1] == ("clip-adapter at 4 shots does worst on 'ant' (30.0 %), 'b\\x1bee' (95.0 %)")


def test_a_baseline_that_did_better(said: list[str]):
    """Where its mean is higher, and only there; the other baseline is not named."""
    better = "the baseline linear-probe did better than clip-adapter"
    assert said[2:] == [f"{better} at 4 shots (97.37 % against 78.95 %)"]
