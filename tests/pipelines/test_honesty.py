"""Nothing is chosen by looking at data that the rule forbids, and test is looked at once."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from clip_adapter.adapters.clip_adapter_method import ClipAdapterMethod
from clip_adapter.pipelines.fit import FitConfig, FitResult, fit
from tests.pipelines.run_files import adapters, choices, results, selected
from tests.pipelines.tiny_cache import TinyData, tiny_data, write_cache

DATA = tiny_data()
RULES = ["few-shot-val", "full-val", "cv", "none"]


def fitted(folder: Path, name: str, data: TinyData, rule: str) -> FitResult:
    folder = folder / name
    folder.mkdir()
    config = FitConfig(
        cache=write_cache(folder / "features.h5", data),
        out=folder / "run",
        shots=(4,),
        seeds=(1,),
        baselines=("linear-probe",),
        alpha=(0.3,) if rule == "none" else (0.3, 0.9),
        lr=(0.01,),
        epochs=10,
        evaluate_every=2,
        select=rule,
    )
    return fit(config)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FitResult]:
    """The run on the true labels under a rule."""
    folder = tmp_path_factory.mktemp("clean")
    return lru_cache(lambda rule: fitted(folder, rule, DATA, rule))


def assert_chosen_alike(one: Path, other: Path) -> None:
    assert choices(one) == choices(other)
    assert adapters(one) == adapters(other)
    assert len(adapters(one)) == 2
    assert results(one) == results(other)
    names = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(other) for path in sorted(other.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("rule", RULES)
def test_the_test_split_takes_no_part(tmp_path: Path, clean: Callable[[str], FitResult], rule: str):
    poisoned = fitted(tmp_path, rule, DATA.shuffled_labels("test").noisy_features("test"), rule)
    assert_chosen_alike(clean(rule).run, poisoned.run)
    for before, after in zip(clean(rule).selected, poisoned.selected, strict=True):
        assert after["test_accuracy"] < before["test_accuracy"] - 0.1


@pytest.mark.parametrize("rule", ["cv", "none"])
def test_without_a_validation_set_the_val_split_takes_no_part(
    tmp_path: Path, clean: Callable[[str], FitResult], rule: str
):
    poisoned = fitted(tmp_path, "poisoned", DATA.shuffled_labels("val").noisy_features("val"), rule)
    assert_chosen_alike(clean(rule).run, poisoned.run)
    assert selected(clean(rule).run) == selected(poisoned.run)
    absent = fitted(tmp_path, "absent", DATA.with_split("val", None), rule)
    assert_chosen_alike(clean(rule).run, absent.run)


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
    test_features = DATA.splits["test"][0][0]
    classified = []
    whole = ClipAdapterMethod.logits

    def listening(self, setting, arrays, features, *rest):  # type: ignore[no-untyped-def]
        classified.append(np.array_equal(features, test_features))
        return whole(self, setting, arrays, features, *rest)

    monkeypatch.setattr(ClipAdapterMethod, "logits", listening)
    result = fitted(tmp_path, "run", DATA, "few-shot-val")
    (row,) = (row for row in result.selected if row["method"] == "clip-adapter")
    assert row["tried"] == 2
    assert classified == [True]


def test_the_chosen_setting_is_the_best_on_validation(clean: Callable[[str], FitResult]):
    run = clean("few-shot-val").run
    for row in selected(run):
        rows = [
            r for r in results(run) if (r["method"], r["seed"]) == (row["method"], str(row["seed"]))
        ]
        best = min(rows, key=lambda r: (-float(r["val_accuracy"]), float(r["val_nll"])))
        assert row["val_accuracy"] == float(best["val_accuracy"])
        assert row["val_nll"] == float(best["val_nll"])
        assert (row["epoch"] or 0) == int(best["best_epoch"])
        for name in ("alpha", "C"):
            assert str(row.get(name, "")) == best[name]
        # Settings within √(p(1 − p)/n) of the best, n = 16 validation images.
        p = row["val_accuracy"]
        near = [r for r in rows if float(r["val_accuracy"]) >= p - np.sqrt(p * (1 - p) / 16)]
        assert row["within_one_standard_error"] == len(near)
        assert row["tried"] == len(rows)
