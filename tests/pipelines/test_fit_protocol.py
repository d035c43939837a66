"""How few-shot sets are drawn and judged, and what a run says of it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.record import unpacked
from clip_adapter.pipelines.fitting.run import FitResult
from tests.pipelines.run_files import nearest_of, results
from tests.pipelines.tiny_cache import short, tiny_data, write_cache

DATA = tiny_data()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA)


def tasks(result: FitResult) -> list[dict]:
    return json.loads((result.run / "tasks.json").read_text())


def zero_shot(cache: Path, out: Path, **values: object) -> FitResult:
    """A run without training, where only the draw matters."""
    usual = {"method": "zero-shot", "baselines": ()}
    return fit(FitConfig(cache=cache, out=out, **usual | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("repeat", [False, True])
def test_a_class_with_too_few_images(tmp_path: Path, capsys, repeat: bool):
    """Each once, as Dassl's repeat=False has it, or drawn with repetition; and that is said."""
    data = tiny_data(train=(9, 3, 9, 9))
    cache = write_cache(tmp_path / "features.h5", data)
    result = zero_shot(cache, tmp_path / "run", shots=4, repeat=repeat)
    print_run(result, verbose=True)
    how = "drawn with repetition" if repeat else "each is taken once"
    assert f"1 class has fewer than 4 training images: {how}" in capsys.readouterr().out
    labels = data.splits["train"][1]
    (document,) = tasks(result)
    drawn = [int(row.split("/")[1]) for row in document["support"]]
    assert drawn == with_small_classes(labels, 4, random.Random(1), repeat)
    small = [row for row in drawn if labels[row] == 1]
    assert (len(small), len(set(small)) < len(small)) == ((4, True) if repeat else (3, False))


def with_small_classes(
    labels: np.ndarray, shots: int, rng: random.Random, repeat: bool
) -> list[int]:
    """Dassl's generate_fewshot_dataset."""
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(row)
    drawn: list[int] = []
    for rows in groups.values():
        if len(rows) >= shots:
            drawn += rng.sample(rows, shots)
        else:
            drawn += rng.choices(rows, k=shots) if repeat else rows
    return drawn


def test_what_repetition_changes_is_trained_on(tmp_path: Path):
    cache = write_cache(tmp_path / "features.h5", tiny_data(train=(9, 3, 9, 9)))
    once, repeated = (
        fit(short(cache, tmp_path / str(repeat), alpha=0.5, repeat=repeat))
        for repeat in (False, True)
    )
    assert once.results[0].val_nll != repeated.results[0].val_nll
    assert (len(once.tasks[0].support), len(repeated.tasks[0].support)) == (15, 16)


def test_classes_without_training_images_are_named(tmp_path: Path, capsys):
    features, labels = DATA.splits["train"]
    there = labels != 2
    data = DATA.with_split("train", (features[:, there], labels[there]))
    cache = write_cache(tmp_path / "features.h5", data)
    result = fit(short(cache, tmp_path / "run", alpha=0.5))
    print_run(result, verbose=True)
    assert "1 class without a training image: 'class 2'" in capsys.readouterr().out
    assert result.tasks[0].absent_classes == (2,)
    assert result.kept, "the others can be fitted"


def test_few_validation_images_are_taken_once_and_said(tmp_path: Path, capsys):
    """And so are the classes that have none."""
    data = tiny_data(val=2)
    features, labels = data.splits["val"]
    there = labels != 3
    data = data.with_split("val", (features[:, there], labels[there]))
    cache = write_cache(tmp_path / "features.h5", data)
    result = zero_shot(cache, tmp_path / "run", shots=4)
    print_run(result)
    said = capsys.readouterr().out
    assert "3 classes have fewer than 4 validation images: each is taken once" in said
    assert "1 class without a validation image: 'class 3'" in said
    (document,) = tasks(result)
    assert len(document["validation"]) == 6 == len(set(document["validation"]))


@pytest.mark.parametrize("rule", ["few-shot-val", "full-val"])
def test_how_many_validation_images_a_rule_takes(cache: Path, tmp_path: Path, rule: str):
    result = zero_shot(cache, tmp_path / "run", select=rule, shots=9)
    (document,) = tasks(result)
    assert len(document["validation"]) == {"few-shot-val": 16, "full-val": 24}[rule]


def test_one_shot_cannot_be_cross_validated_and_says_so(cache: Path, tmp_path: Path, capsys):
    """Defaults are taken where they are among the values given, the first ones elsewhere."""
    grid = {"alpha": (0.3, 0.9), "learning_rate": (1e-4, 1e-3), "reduction": (2, 4)}
    run = short(
        cache, tmp_path / "run", shots=(1, 4), select="cv", baselines="linear-probe", **grid
    )
    result = fit(run)
    print_run(result, verbose=True)
    printed = capsys.readouterr().out
    assert "on the support set (at 1 shot a class has one image: nothing, the defaults)" in printed
    single = {row.method: row for row in result.results if row.shots == 1}
    assert all(row.val_accuracy is None and row.epoch is None for row in single.values())
    setting = single["clip-adapter"].setting
    assert setting
    assert (setting["alpha"], setting["learning_rate"], setting["reduction"]) == (0.3, 1e-4, 4)
    assert single["linear-probe"].setting == {"C": 0.316}
    assert all(row.val_accuracy is not None for row in result.results if row.shots == 4)


def test_where_nothing_chooses_defaults_are_taken(cache: Path, tmp_path: Path, capsys):
    result = fit(
        FitConfig(
            cache=cache,
            out=tmp_path / "run",
            shots=4,
            select="none",
            baselines="linear-probe",
            hyper={"epochs": 10},
        )
    )
    rows = {row.method: row for row in result.results}
    assert rows["clip-adapter"].setting and rows["clip-adapter"].setting["alpha"] == 0.2
    assert rows["linear-probe"].setting == {"C": 0.316}
    assert all((row.val_accuracy, row.tried) == (None, 1) for row in result.results)
    assert results(result.run) == [], "nothing was tried"
    print_run(result, verbose=True)
    printed = capsys.readouterr().out
    assert "selected on nothing (defaults)" in printed
    assert "chosen settings" not in printed


GRID = {"alpha": (0.0, 0.4, 1.0), "learning_rate": (1e-3, 1e-1)}


def told_apart(result: FitResult, validation: list[int]) -> tuple[int, int]:
    """(settings compared, those that McNemar's test does not tell from the chosen one), by scipy,
    from what results.csv says of every validation image."""
    kept = [validation.index(row) for row in dict.fromkeys(validation)]
    rows = [row for row in results(result.run) if row["method"] == "clip-adapter"]
    longest = max(int(row["epochs_run"]) for row in rows)
    rows = [row for row in rows if int(row["epochs_run"]) == longest]
    best = nearest_of(rows, kept)

    def right(row: dict[str, str]) -> np.ndarray:
        return unpacked(row["images"]).right[kept]

    alike = 0
    for row in rows:
        only_best = int((right(best) & ~right(row)).sum())
        disagreed = int((right(best) != right(row)).sum())
        alike += disagreed == 0 or binomtest(only_best, disagreed).pvalue >= 0.05
    return len(rows), alike


@pytest.mark.parametrize("select", ["few-shot-val", "full-val", "cv"])
def test_settings_that_validation_does_not_tell_apart(tmp_path: Path, capsys, select: str):
    cache = write_cache(tmp_path / "features.h5", tiny_data(noise=1.0, val=12))
    result = fit(short(cache, tmp_path / "run", shots=9, select=select, **GRID))
    (row,) = result.results
    (task,) = result.tasks
    images = sorted(task.support) if select == "cv" else task.validation.tolist()
    compared, alike = told_apart(result, images)
    assert (row.compared, row.indistinguishable) == (compared, alike) == (6, alike)
    assert 1 <= alike < 6, "choose data on which some are told apart"
    print_run(result, verbose=True)
    assert f"{alike} of 6" in capsys.readouterr().out


def test_an_image_drawn_repeatedly_counts_once(tmp_path: Path):
    """Two images for each class, drawn four times: the repeated ones bear no new witness."""
    data = tiny_data(noise=1.0, val=2)
    cache = write_cache(tmp_path / "features.h5", data)
    result = fit(short(cache, tmp_path / "run", shots=4, repeat=True, **GRID))
    (row,) = result.results
    (task,) = result.tasks
    validation = task.validation.tolist()
    assert len(validation) == 16 > len(set(validation))
    assert (row.compared, row.indistinguishable) == told_apart(result, validation)
    counted_each = told_apart(result, list(range(16)))[1]
    assert row.indistinguishable > counted_each, "choose data on which repetition matters"


def test_the_error_of_the_test_set_stands_beside_a_single_seed(cache: Path, tmp_path: Path, capsys):
    one = zero_shot(cache, tmp_path / "one", shots=2)
    accuracy, images = one.results[0].test_accuracy, len(DATA.splits["test"][1])
    assert accuracy is not None and one.results[0].test_images == images
    error = (accuracy * (1 - accuracy) / images) ** 0.5
    print_run(one, verbose=True)
    printed = capsys.readouterr().out
    assert "test accuracy (%), ± standard error of the test images, one seed" in printed
    assert f"{100 * accuracy:.2f} ± {100 * error:.2f}" in printed
    two = zero_shot(cache, tmp_path / "two", shots=2, seeds=(1, 2))
    print_run(two, verbose=True)
    printed = capsys.readouterr().out
    assert "mean ± standard deviation over seeds\n" in printed
    assert f"{100 * accuracy:.2f} ± 0.00" in printed


def test_all_shots_judge_on_the_whole_validation_split(cache: Path, tmp_path: Path, capsys):
    result = zero_shot(cache, tmp_path / "run", shots=(2, "all"), method="gda")
    documents = tasks(result)
    assert [len(document["support"]) for document in documents] == [8, 36]
    assert [len(document["validation"]) for document in documents] == [8, 24]
    print_run(result, verbose=True)
    assert "(at `all` shots: the whole validation split)" in capsys.readouterr().out
