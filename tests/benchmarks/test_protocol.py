"""The figures behind the defaults: the script runs, and its tables say what was measured."""

from pathlib import Path

import numpy as np
import pytest
from protocol import main
from protocol_grid import (
    LADDER,
    TEMPERATURES,
    Run,
    by_accuracy,
    by_likelihood,
    grid,
    one_standard_error,
    tempered,
)
from protocol_runs import Study, better_mean
from protocol_sets import PETS, SETS, DataSet, caches_in, drawn, texture
from protocol_tables import Row, over_sets, spread, table
from scipy.special import log_softmax

EPOCHS = 5
"""The same everywhere, so that programs are compiled once."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    path = tmp_path_factory.mktemp("small") / "small.h5"
    drawn(path, 8, **PETS | {"traits": 6}, blur=0.2, bias=0.05, drift=0.1, dim=64)
    return DataSet("small", path)


def cells(tables: str, row: str) -> list[str]:
    """Of the first row that begins so."""
    line = next(line for line in tables.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_setting_of_the_grid_is_what_fit_fits(small: DataSet):
    study = Study(small, (2,), (3,), epochs=EPOCHS)
    asked = {"alpha": 0.4, "learning_rate": 1e-3}
    (result,) = study.results(hyper=asked).values()
    assert result.test_accuracy is not None
    assert result.val_nll is not None
    named = [("AdamW 0.001", 0.4), ("authors' SGD 0.002", 0.2)]
    ((run, authors),) = grid(small, (2,), (3,), EPOCHS, named).values()
    assert run.test == pytest.approx(100 * result.test_accuracy)
    assert run.right.mean() == pytest.approx(result.val_accuracy)
    assert run.likely.mean() == pytest.approx(result.val_nll, rel=5e-3)
    assert [authors.test] == pytest.approx([*study.tests(select="none", preset="paper").values()])


def test_rules():
    """Losses at the temperature in the middle and at another one; the smallest rate first."""

    def run(name: str, right: int, as_is: list[float], other: list[float]) -> Run:
        losses = np.full((len(TEMPERATURES), 4), 9.0)
        losses[len(TEMPERATURES) // 2], losses[0] = as_is, other
        return Run(name, 0.2, 0.0, losses, np.arange(4) < right)

    bad = run("bad", 2, [2.0] * 4, [3.0] * 4)
    near = run("near", 3, [1.1, 1.5, 0.6, 1.3], [9.0] * 4)
    surer = run("surer", 4, [1.0] * 4, [9.0] * 4)
    best = run("best", 4, [5.0] * 4, [0.9, 1.2, 0.8, 0.9])
    runs = [bad, near, surer, best]
    assert by_accuracy(runs) is by_likelihood(runs) is best
    likeliest_but_less_accurate = run("odd", 3, [0.1] * 4, [9.0] * 4)
    assert by_accuracy([*runs, likeliest_but_less_accurate]) is best
    # 0.175 ± 0.15 above the best one is beyond a standard error, 0.05 ± 0.09 is not.
    assert one_standard_error(runs) is surer
    logits, labels = np.array([[3, 1, 0], [0, 2, 1]], np.float32), np.array([0, 2], np.int32)
    for temperature, losses in zip(TEMPERATURES, tempered(logits, labels), strict=True):
        right = -log_softmax(logits / temperature, axis=1)[[0, 1], labels]
        np.testing.assert_allclose(losses, right, rtol=1e-6)


def test_tables():
    one = {(1, 1): 60.0, (1, 2): 64.0, (4, 1): 70.0, (4, 2): 70.0}
    other = {(1, 1): 61.0, (1, 2): 61.0, (4, 1): 71.0, (4, 2): np.nan}
    rows = [Row("one", one), Row("apart", one, other)]
    printed = table("made up", rows)
    assert printed.startswith("| made up | 1 shot | 4 shots |\n")
    assert cells(printed, "one") == ["62.00 ± 2.00", "70.00 ± 0.00"]
    assert cells(printed, "apart") == ["+1.00 ± 2.00", "1 of 2 diverged"]
    lower = {task: value - 10 for task, value in one.items() if task[0] == 1}
    assert cells(over_sets("all", [rows, [Row("one", lower)]]), "one") == ["57.00 ± 5.00", "70.00"]
    assert spread([-1.5]) == "−1.50"
    assert better_mean(one, {**other, (4, 2): 68.0})[1, 1] == 60.0


@pytest.mark.parametrize("name", ["like-pets", "like-caltech"])
def test_what_breaks_on_real_features_breaks_on_those_drawn_like_them(name: str, tmp_path: Path):
    """At large logit scales, with names that say what sets classes apart, the rate 1e-3 lets the
    bottleneck outgrow the blend; what `fit` does without options does not fall below zero-shot."""
    data = DataSet(name, SETS[name](tmp_path))
    study = Study(data, (1, 4), (1, 2))
    growing = grid(data, study.shots, study.seeds, named=[(LADDER[-1], 0.4)])
    default, zero_shot = study.tests(), study.zero_shot.values[1, 1]
    for shots in study.shots:
        assert (
            np.mean([test for task, test in default.items() if task[0] == shots]) > zero_shot - 0.3
        )
        # Beyond that bar by more than other machines' rounding bridges.
        harmed = [runs[0].test for task, runs in growing.items() if task[0] == shots]
        assert np.mean(harmed) < zero_shot - 0.6


def test_textures_turn_with_their_direction():
    """Gradients of a grating lie along its normal."""
    rng = np.random.default_rng(0)
    for angle, axis in ((0.0, 0), (90.0, 1)):
        images = [texture("sine", angle, rng).astype(float) for _ in range(20)]
        along, across = (
            np.mean([np.var(image.mean(axis=1 - a)) for image in images]) for a in (axis, 1 - axis)
        )
        assert along > 4 * across


def test_the_script_prints_its_tables(small: DataSet, capsys: pytest.CaptureFixture[str]):
    """On a folder of caches; more shots than there are images are left out, and said to be."""
    folder = small.path.parent
    parts = ("default", "epoch", "methods")
    asked = f"--shots 2 99 --seeds 1 --epochs {EPOCHS} --methods gda coop --parts"
    main(["--caches", str(folder), *asked.split(), *parts])
    printed = capsys.readouterr().out
    name = caches_in([folder])[0].name
    assert printed.startswith("## Real features\n")
    for part in parts:
        assert f"| {name}, {part} | 2 shots |\n" in printed
    assert "99 shots; the largest class has 32" in printed
    assert "coop, which needs" in printed
    assert "nan" not in printed
