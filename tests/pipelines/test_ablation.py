"""`--ablate`, an analysis that chooses nothing, and `--refit`, the adapter for use."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import fit as fit_arrays
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Head, Task
from clip_adapter.adapters.registry import METHODS
from clip_adapter.pipelines.commands.fit import fit, main
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.results import TaskResult
from clip_adapter.pipelines.fitting.run_folder import SELECTED, read_selected
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter, load_adapter
from tests.pipelines.run_files import files, killed_after
from tests.pipelines.tiny_cache import TinyData, short, tiny_data, write_cache

DATA = tiny_data(train=(6, 6, 6), noise=2.2, test=20)
QUICK = {"epochs": 3, "shots": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA)


def alone(cache: Path, out: Path, **values: Any) -> float:
    """Test accuracy of a run without ablation."""
    result = fit(short(cache, out, **QUICK | values))
    (row,) = result.results
    assert row.test_accuracy is not None
    return row.test_accuracy


def held_rows(run: Path) -> list[TaskResult]:
    return [row for row in read_selected(run) if row.held]


def shown(rows: Any) -> dict[Value, float]:
    return {value: row.test_accuracy for row in rows for value in row.held.values()}


def test_every_value_has_the_accuracy_of_a_fit_with_it_alone(cache: Path, tmp_path: Path) -> None:
    """Numbers and words; what else there is to choose is chosen for each value anew."""
    grid = {"learning_rate": (0.003, 0.03)}
    plain = fit(short(cache, tmp_path / "plain", alpha=(0.2, 0.6), **grid, **QUICK))
    both = fit(
        short(cache, tmp_path / "both", alpha=(0.2, 0.6), ablate=("alpha", "lr"), **grid, **QUICK)
    )
    own = [row for row in both.ablations if "alpha" in row.held]
    assert shown(own) == {
        value: alone(cache, tmp_path / f"alpha-{value}", alpha=value, **grid)
        for value in (0.2, 0.6)
    }
    rates = [row for row in both.ablations if "learning_rate" in row.held]
    assert [*shown(rates)] == [0.003, 0.03]
    assert {row.setting["learning_rate"] for row in rates} == {0.003, 0.03}  # type: ignore[index]
    # Nothing is chosen by it.
    assert both.results == plain.results
    one, other = files(plain.run), files(both.run)
    assert {name for name in other if one.get(name) != other[name]} == {
        *("run.json", "results.csv", SELECTED)
    }, "the adapters, predictions, tables and the picture of the grid are those without ablation"


def test_all_ratios_of_the_table_by_default(cache: Path, tmp_path: Path) -> None:
    result = fit(short(cache, tmp_path / "run", ablate="alpha", alpha=0.4, **QUICK))
    words = ("learned", "hypernet")
    assert [*shown(result.ablations)] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, *words]
    for word in words:
        found = shown(result.ablations)[word]
        assert found == alone(cache, tmp_path / word, alpha=word)
    asked = FitConfig(cache=cache, out=tmp_path / "zero", method="zero-shot", baselines=(), shots=2)
    zero_shot = fit(asked)
    assert shown(result.ablations)[0.0] == zero_shot.results[0].test_accuracy
    assert result.results[0].setting["alpha"] == 0.4  # type: ignore[index]
    assert load_adapter(result.run).info.setting["alpha"] == 0.4


def test_a_hyper_parameter_that_has_one_value_for_all_settings(cache: Path, tmp_path: Path) -> None:
    result = fit(short(cache, tmp_path / "run", ablate="branch", alpha=0.6, **QUICK))
    found = shown(result.ablations)
    assert list(found) == ["image", "text", "both"]
    for branch in found:
        assert found[branch] == alone(cache, tmp_path / str(branch), branch=branch, alpha=0.6)
    assert load_adapter(result.run).info.setting["branch"] == "image"
    given = fit(
        short(cache, tmp_path / "given", ablate="branch", branch=("text", "image"), **QUICK)
    )
    assert [*shown(given.ablations)] == ["text", "image"]
    assert given.results[0].setting["branch"] == "image"  # type: ignore[index]


def test_each_method_shots_and_seed_has_its_rows(cache: Path, tmp_path: Path) -> None:
    methods = ("tip-adapter", "clip-adapter")
    values = {"epochs": 2, "tip-adapter.alpha": (0.5, 1.0), "tip-adapter.beta": 1.0}
    values |= {"clip-adapter.alpha": (0.2, 0.6)}
    config = FitConfig(
        cache=cache,
        out=tmp_path / "run",
        method=methods,
        baselines=(),
        shots=(1, 2),
        seeds=(1, 2),
        ablate="alpha",
        hyper=values,
    )
    result = fit(config)
    keys = [(r.method, r.held["alpha"], r.shots, r.seed) for r in result.ablations]
    pairs = {"tip-adapter": (0.5, 1.0), "clip-adapter": (0.2, 0.6)}
    assert sorted(keys) == sorted(
        (method, value, shots, seed)
        for method, own in pairs.items()
        for value in own
        for shots in (1, 2)
        for seed in (1, 2)
    )


def test_with_nothing_that_chooses(cache: Path, tmp_path: Path) -> None:
    """The given values are those to show; the run itself takes the default."""
    result = fit(
        short(cache, tmp_path / "run", ablate="alpha", alpha=(0.3, 0.8), select="none", **QUICK)
    )
    assert result.results[0].setting["alpha"] == 0.2  # type: ignore[index]
    assert shown(result.ablations) == {
        value: alone(cache, tmp_path / f"{value}", alpha=value, select="none")
        for value in (0.3, 0.8)
    }


@pytest.mark.usefixtures("thin_grids")
def test_the_factor_method_shows_every_method_that_the_cache_can_serve(
    cache: Path, tmp_path: Path
) -> None:
    plain = fit(short(cache, tmp_path / "plain", alpha=(0.2, 0.6), **QUICK))
    given = {"ablate": "method", "alpha": (0.2, 0.6), **QUICK}
    result = fit(short(cache, tmp_path / "run", **given))
    servable = [name for name, method in METHODS.items() if set(method.needs) <= {"text"}]
    assert sorted(shown(result.ablations)) == sorted(servable)
    assert result.results == plain.results and result.kept == plain.kept
    assert load_adapter(result.run).info.method == "clip-adapter"
    found = shown(result.ablations)
    assert found["clip-adapter"] == plain.results[0].test_accuracy, "with the values given"
    for other in ("gda", "taskres"):
        asked = FitConfig(cache=cache, out=tmp_path / other, method=other, baselines=(), shots=2)
        assert found[other] == fit(asked).results[0].test_accuracy, "with its own defaults"


def test_the_factor_method_of_several_methods_shows_those(cache: Path, tmp_path: Path) -> None:
    names = ("tip-adapter", "gda")
    asked = FitConfig(cache=cache, out=tmp_path / "run", method=names, shots=2, ablate="method")
    result = fit(asked)
    own = {row.method: row.test_accuracy for row in result.results}
    assert shown(result.ablations) == {name: own[name] for name in names}


def test_it_goes_on_where_it_was_interrupted(cache: Path, tmp_path: Path) -> None:
    def config(out: Path) -> FitConfig:
        return short(
            cache, out, ablate="lr", learning_rate=(0.001, 0.01, 0.1), seeds=(1, 2), **QUICK
        )

    whole, run = fit(config(tmp_path / "whole")), tmp_path / "run"
    assert len(whole.ablations) == 6
    with killed_after(2 + 2, "add_result"):
        fit(config(run))
    assert len(held_rows(run)) == 2
    assert not (run / "adapter.json").exists()
    with killed_after(3, "add_result"):  # what has a row is not run again: four are left
        fit(FitConfig(resume=run))
    fit(FitConfig(resume=run))
    for name in (SELECTED, "summary.csv"):
        assert (run / name).read_bytes() == (whole.run / name).read_bytes()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--ablate temperature", "--ablate temperature: none of these methods has that."),
        ("--ablate weight_decay", "--ablate weight_decay needs several values; name them with --"),
        ("--ablate weight_decay --weight-decay 0.1", "--ablate weight_decay needs several values"),
        ("--ablate alpha --alpha 0.2 3", "alpha is 3.0, not a number in [0, 1]"),
        ("--ablate beta", "--ablate beta has no effect without --branch"),
    ],
)
def test_bad_factors_are_a_sentence(
    line: str, sentence: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["--cache", str(cache), "--out", str(out), *line.split()])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not out.exists()


def test_the_table_says_what_it_is(cache: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        words = "--shots 1 2 --epochs 2 --baselines --alpha 0.4 --ablate branch"
        main(["--cache", str(cache), "--out", str(tmp_path / "run"), *words.split()])
    printed = capsys.readouterr().out
    assert "an analysis, which chooses nothing" in " ".join(printed.split())
    rows = held_rows(tmp_path / "run")
    table = printed[printed.index("ablation of branch") :]
    for branch in ("image", "text", "both"):
        (line,) = (ln for ln in table.splitlines() if ln.split()[:1] == [branch])
        for row in rows:
            if row.held["branch"] == branch:
                assert f"{100 * row.test_accuracy:.2f}" in line  # type: ignore[operator]


# --refit


def everything(data: TinyData, classes: int, views: int, seed: int) -> Task:
    """Every labelled image of the first classes, put together from what the cache was made of."""
    parts, labels = [], []
    for split in ("train", "val", "test"):
        features, own = data.splits[split]
        inside = own < classes
        stored = [features[min(view, len(features) - 1)][inside] for view in range(views)]
        parts.append(np.stack(stored))
        labels.append(own[inside])
    text = data.text[:classes].astype(np.float64)
    text /= np.linalg.norm(text, axis=-1, keepdims=True)
    weights = text.mean(axis=1)
    weights /= np.linalg.norm(weights, axis=-1, keepdims=True)
    head = Head(weights.astype(np.float32), np.float32(20), np.float32(0.5))
    task = Task(
        features=np.concatenate(parts, axis=1),
        labels=np.concatenate(labels).astype(np.int32),
        validation_features=np.zeros((0, data.text.shape[2]), np.float32),
        validation_labels=np.zeros(0, np.int32),
        head=head,
        seed=np.int32(seed),
    )
    return jax.tree.map(jnp.asarray, task)


def assert_fitted_on(saved: SavedAdapter, method: str, task: Task) -> None:
    wanted = fit_arrays(METHODS[method], saved.info.setting, None, task, Engine())
    assert saved.arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.allclose(saved.arrays[name], array, rtol=1e-4, atol=1e-5), name


VIEWS = tiny_data(train=(4, 4, 4, 4), val=2, test=6, views=3)


@pytest.mark.parametrize("method", ["clip-adapter", "tip-adapter"])
def test_refit_takes_every_labelled_image(method: str, cache: Path, tmp_path: Path) -> None:
    trained = {"epochs": 3, "learning_rate": 0.01} if method == "clip-adapter" else {}
    asked = FitConfig(
        cache=cache, method=method, baselines=("zero-shot",), shots=2, seeds=(3,), hyper=trained
    )
    plain = fit(dataclasses.replace(asked, out=tmp_path / "plain"))
    again = fit(dataclasses.replace(asked, out=tmp_path / "refit", refit=True))
    assert again.results == plain.results, "the accuracies are those of before"
    assert again.kept and again.kept.setting == plain.kept.setting  # type: ignore[union-attr]
    saved = load_adapter(again.run)
    images = sum(len(labels) for _, labels in DATA.splits.values())
    assert saved.info.fitted["refitted_on"] == images == 18 + 18 + 60
    assert "refitted_on" not in load_adapter(plain.run).info.fitted
    assert_fitted_on(saved, method, everything(DATA, 3, 1, 3))
    task = f"adapters/{method}/shots-2-seed-3/adapter.safetensors"
    assert files(again.run)[task] == files(plain.run)[task], "the tasks' own are kept as well"
    assert files(again.run)["adapter.safetensors"] != files(plain.run)["adapter.safetensors"]


def test_refit_with_views_and_with_base_classes(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "views.h5", VIEWS)
    result = fit(short(cache, tmp_path / "views", refit=True, augment=True, **QUICK))
    saved = load_adapter(result.run)
    assert saved.info.fitted["refitted_on"] == 16 + 8 + 24
    assert_fitted_on(saved, "clip-adapter", everything(VIEWS, 4, 3, 1))
    base = fit(short(cache, tmp_path / "base", refit=True, train_classes="base", **QUICK))
    saved = load_adapter(base.run)
    assert saved.info.fitted["refitted_on"] == (16 + 8 + 24) // 2
    assert len(saved.weights) == 2
    assert_fitted_on(saved, "clip-adapter", everything(VIEWS, 2, 1, 1))


def test_refit_of_a_best_epoch_trains_as_long(cache: Path, tmp_path: Path) -> None:
    """Without validation images there is no best epoch: it is that of the selection."""
    result = fit(
        short(cache, tmp_path / "run", refit=True, epoch="best", evaluate_every=1, **QUICK)
    )
    saved = load_adapter(result.run)
    epoch = result.results[0].epoch
    assert saved.info.fitted["epoch"] == epoch
    wanted = fit_arrays(
        METHODS["clip-adapter"],
        saved.info.setting | {"epoch": "last"},
        epoch,
        everything(DATA, 3, 1, 1),
        Engine(),
    )
    for name, array in wanted.items():
        assert np.allclose(saved.arrays[name], array, rtol=1e-4, atol=1e-5), name
