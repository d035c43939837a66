"""Nothing is chosen by looking at data that the rule forbids, and test is looked at once."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.adapters.registry import METHODS
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.run import FitResult
from tests.pipelines.run_files import (
    adapters,
    choices,
    files,
    grid_rows,
    nearest_of,
    results,
    selected,
)
from tests.pipelines.tiny_cache import TinyData, short, tiny_data, write_cache
from tests.pipelines.toy_methods import GROWING

pytestmark = pytest.mark.usefixtures("thin_grids")
DATA = tiny_data()
RULES = ["few-shot-val", "full-val", "cv", "none"]
SERVED = tuple(name for name, method in METHODS.items() if set(method.needs) <= {"text"})


def fitted(folder: Path, name: str, data: TinyData, rule: str, **values: Any) -> FitResult:
    """Every method that a plain cache can serve; CLIP-Adapter with a grid if something chooses."""
    folder = folder / name
    folder.mkdir(parents=True)
    cache = write_cache(folder / "features.h5", data)
    grid = {"clip-adapter.alpha": 0.3 if rule == "none" else (0.3, 0.9)}
    trained = {name: METHODS[name].hyper for name in SERVED if METHODS[name].is_trained}
    for method, table in trained.items():
        short_run = {"epochs": 10, "learning_rate": 0.01}
        grid |= {f"{method}.{n}": value for n, value in short_run.items() if n in table}
    run = short(cache, folder / "run", method=SERVED, select=rule, **values)
    return fit(replace(run, hyper=grid))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FitResult]:
    """The run on the true labels under a rule."""
    folder = tmp_path_factory.mktemp("clean")
    return lru_cache(lambda rule: fitted(folder, rule, DATA, rule))


def assert_chosen_alike(one: Path, other: Path) -> None:
    assert choices(one) == choices(other)
    assert adapters(one) == adapters(other)
    kept = selected(one)[0]["select"] != "none"
    assert len(adapters(one)) == len(SERVED) + kept
    assert results(one) == results(other)
    assert files(one).keys() == files(other).keys()


def noise_but_for(data: TinyData, split: str, drawn: np.ndarray) -> TinyData:
    features, labels = data.splits[split]
    others = np.setdiff1d(np.arange(len(labels)), drawn)
    assert len(others)
    noisy = features.copy()
    noisy[:, others] = np.random.default_rng(3).normal(size=noisy[:, others].shape)
    return data.with_split(split, (noisy, labels))


def forbidden(rule: str, run: FitResult) -> TinyData:
    """The data with everything spoilt that a rule may not look at."""
    (task,) = run.tasks
    data = DATA.shuffled_labels("test").noisy_features("test")
    data = noise_but_for(data, "train", task.support)
    if rule == "few-shot-val":
        return noise_but_for(data, "val", task.validation)
    return data if rule == "full-val" else data.shuffled_labels("val").noisy_features("val")


@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_forbids_takes_no_part(
    tmp_path: Path, clean: Callable[[str], FitResult], rule: str
):
    """The test split, images that were not drawn, and validation where it does not choose."""
    poisoned = fitted(tmp_path, rule, forbidden(rule, clean(rule)), rule)
    assert_chosen_alike(clean(rule).run, poisoned.run)
    for before, after in zip(clean(rule).results, poisoned.results, strict=True):
        assert before.test_accuracy and after.test_accuracy is not None
        assert after.test_accuracy < before.test_accuracy - 0.1


@pytest.mark.parametrize("rule", ["cv", "none"])
def test_without_a_validation_set_no_val_split_is_needed(
    tmp_path: Path, clean: Callable[[str], FitResult], rule: str
):
    absent = fitted(tmp_path, "absent", DATA.with_split("val", None), rule)
    assert_chosen_alike(clean(rule).run, absent.run)
    assert selected(clean(rule).run) == selected(absent.run)


@pytest.mark.parametrize("rule", ["few-shot-val", "full-val"])
def test_with_a_validation_set_it_does_choose(
    tmp_path: Path, clean: Callable[[str], FitResult], rule: str
):
    """Otherwise the tests above would show nothing."""
    poisoned = fitted(tmp_path, "poisoned", DATA.shuffled_labels("val"), rule)
    assert choices(clean(rule).run) != choices(poisoned.run)
    assert adapters(clean(rule).run) != adapters(poisoned.run)


def test_test_images_are_classified_once_for_each_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Counted where they are read: a block of them for each method, and none while it chooses."""
    from clip_adapter.cache.reader import FeatureCache
    from clip_adapter.pipelines.fitting.data import Data

    read: list[str] = []
    features, blocks = FeatureCache.features, Data.test_blocks

    def listening(self, split, rows, views=None):  # type: ignore[no-untyped-def]
        read.append(split)
        return features(self, split, rows, views)

    scored: list[str] = []

    def counted(self, method):  # type: ignore[no-untyped-def]
        scored.append(method.name)
        return blocks(self, method)

    monkeypatch.setattr(FeatureCache, "features", listening)
    monkeypatch.setattr(Data, "test_blocks", counted)
    result = fitted(tmp_path, "run", DATA, "few-shot-val", seeds=(1, 2))
    assert scored == list(SERVED) * 2
    assert read.count("test") == 1, "read again"
    assert all(row.tried >= 1 and row.test_images == 60 for row in result.results)


def test_the_chosen_setting_is_the_best_on_validation(clean: Callable[[str], FitResult]):
    run = clean("few-shot-val").run
    every = [*results(run), *grid_rows(run)]
    for row in selected(run):
        rows = [r for r in every if r["method"] == row["method"]]
        if not rows:
            assert not METHODS[row["method"]].hyper or row["tried"] == 1
            continue
        best = min(rows, key=lambda r: (-float(r["val_accuracy"]), float(r["val_nll"])))
        if METHODS[row["method"]].near_zero_shot:
            best = nearest_of(rows)
        for name in ("val_accuracy", "val_nll"):  # a grid has them in 32 bits
            assert row[name] == pytest.approx(float(best[name]), rel=1e-6)
        assert (row["epoch"] or 0) == int(best.get("best_epoch", row["epoch"] or 0))
        assert row["setting"] is not None
        for name, value in row["setting"].items():
            assert str(value) == best[name]
        assert row["tried"] == row["compared"] == len(rows)


def test_halving_never_chooses_what_diverged_in_a_later_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The largest rate is the best at the first rung of 6 epochs, and is no number after 18."""
    monkeypatch.setitem(METHODS, GROWING.name, GROWING)
    cache = write_cache(tmp_path / "features.h5", DATA)
    rates = (0.001, 0.05, 0.002, 0.003)
    growing = {"method": "growing", "search": "halving", "epochs": 60}
    result = fit(short(cache, tmp_path / "run", learning_rate=rates, **growing))
    rungs: dict[str, list[tuple[str, str]]] = {}
    for row in results(result.run):
        rungs.setdefault(row["epochs_run"], []).append((row["learning_rate"], row["status"]))
    assert rungs == {
        "6": [(str(rate), "ok") for rate in rates],
        "18": [("0.05", "failed"), ("0.003", "ok")],
        "60": [("0.003", "ok")],
    }
    (row,) = result.results
    assert row.setting and row.setting["learning_rate"] == 0.003
    assert (row.tried, row.diverged, row.compared, row.indistinguishable) == (4, 1, 1, 1)
    # Where nothing else is left there is no choice, though it was sound at the first rung.
    alone = fit(short(cache, tmp_path / "alone", learning_rate=0.05, **growing))
    (row,) = alone.results
    assert row.setting is None and "diverged" in row.note and alone.kept is None
