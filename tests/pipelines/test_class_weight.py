"""`fit --class-weight balanced`: where it takes effect, and where it is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.evaluate import EvaluateConfig, evaluate
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.options import command_line
from clip_adapter.pipelines.reporting.entries import pool
from clip_adapter.pipelines.reporting.runs import Run
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests.pipelines.tiny_cache import short, tiny_data, write_cache

DATA = tiny_data(train=(40, 6, 3, 2), test=60)


class Told(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("weights") / "f.h5", DATA)


def run(cache: Path, out: Path, **how: Any) -> FitConfig:
    usual: dict[str, Any] = {"method": "taskres", "shots": "all", "select": "none"}
    return short(cache, out, **usual | {"epochs": 60} | how)


def test_small_classes_are_found_more_often(cache: Path, tmp_path: Path) -> None:
    """On unequal training images; the largest class is said less often, the smallest more often."""
    results = {w: fit(run(cache, tmp_path / w, class_weight=w)) for w in ("none", "balanced")}
    plain, balanced = (evaluate(EvaluateConfig(cache, tmp_path / w)) for w in results)
    assert np.mean(balanced.predicted == 0) < np.mean(plain.predicted == 0)
    assert np.mean(balanced.predicted == 3) > np.mean(plain.predicted == 3)
    document = results["none"].plan.document()
    assert "class_weight" not in document
    assert results["balanced"].plan.document()["class_weight"] == "balanced"
    info = json.loads((tmp_path / "none" / "adapter.json").read_text())
    assert "class_weight" not in info["fitted"]
    assert load_adapter(tmp_path / "balanced").info.fitted["class_weight"] == "balanced"
    command = command_line(results["balanced"].plan, tmp_path / "balanced")
    assert "--class-weight balanced" in command
    runs = [Run(r.run, r.plan, r.provenance, {}, r.results) for r in results.values()]
    assert {entry.label for entry in pool(runs)} == {
        "taskres class-weight none", "taskres class-weight balanced"
    }  # fmt: skip


def test_it_goes_on_and_is_taken_over(cache: Path, tmp_path: Path) -> None:
    first = fit(run(cache, tmp_path / "a", class_weight="balanced", refit=True))
    assert fit(FitConfig(resume=tmp_path / "a")).results == first.results
    later = fit(FitConfig(cache=cache, out=tmp_path / "b", from_run=tmp_path / "a", baselines=()))
    assert later.plan.class_weight == "balanced"
    assert later.results[0].test_accuracy == first.results[0].test_accuracy
    with pytest.raises(UserError, match="so --class-weight contradicts it"):
        fit(
            replace(
                FitConfig(cache, tmp_path / "c", from_run=tmp_path / "a"), class_weight="balanced"
            )
        )


def test_where_it_has_no_effect(cache: Path, tmp_path: Path) -> None:
    """Closed forms are refused; where all classes have as many images it is said."""
    for method, words in (
        ("gda", "gda is not"),
        (("taskres", "gda", "ridge"), "gda, ridge are not"),
    ):
        config = FitConfig(cache, tmp_path / "x", method, (), class_weight="balanced")
        with pytest.raises(UserError, match=f"trained step by step, and {words}; leave it out"):
            fit(config)
    assert not (tmp_path / "x").exists()
    told = Told()
    fit(run(cache, tmp_path / "even", shots=2, class_weight="balanced"), told)
    assert any("--class-weight balanced has no effect: in every task" in n for n in told.notes)
    plain = fit(run(cache, tmp_path / "plain", shots=2))
    own = load_adapter(tmp_path / "even").arrays
    for name, array in load_adapter(tmp_path / "plain").arrays.items():
        np.testing.assert_allclose(own[name], array, rtol=1e-4, atol=1e-6)
    assert plain.kept is not None
