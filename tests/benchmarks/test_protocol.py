"""The figures behind the defaults: the script runs, and its tables say what was measured."""

from pathlib import Path

import numpy as np
import pytest
from protocol import main
from protocol_runs import ALPHAS, Learned, Measured, Outcome, Run, Searched, fixed_runs
from protocol_sets import SETS, DataSet, drawn, texture
from protocol_tables import (
    alpha_table,
    epoch_tables,
    halving_table,
    learned_tables,
    preferred,
    spread,
)

from clip_adapter.adapters.clip_adapter import CLIP_ADAPTER
from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.search import fit

EPOCHS = 5
"""The same everywhere, so that programs are compiled once."""
NOISE = {"within": 0.45, "beyond": 0.35}


def cells(tables: str, row: str) -> list[str]:
    """Of the first row that begins so."""
    line = next(line for line in tables.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def zero_shot(data: DataSet) -> float:
    features, labels = data.test
    return float(np.mean((features @ data.weights.T).argmax(axis=1) == labels))


def test_a_run_watched_on_validation_ends_where_one_that_is_not_ends(tmp_path: Path):
    data = SETS["noisy-images"](tmp_path)
    engine, task = Engine(), data.task(shots=1, seed=1)
    runs = fixed_runs(engine, data, task, EPOCHS)
    assert [run.alpha for run in runs] == list(ALPHAS)
    (setting,) = CLIP_ADAPTER.settings(
        CLIP_ADAPTER.values({"alpha": (runs[1].alpha,), "epochs": (EPOCHS,)})
    )
    assert setting["epoch"] == "last"
    arrays = fit(CLIP_ADAPTER, setting, None, task, engine)
    features, labels = data.test
    logits = CLIP_ADAPTER.logits(np, arrays, setting, features, task.head)
    right = 100 * np.mean(np.asarray(logits).argmax(axis=1) == labels)
    assert runs[1].last.test == pytest.approx(right)
    assert all(run.best.val >= run.last.val for run in runs)


def test_the_tables_say_what_was_measured():
    def task(seed: int, last: list[float], best: list[float]) -> Measured:
        """Validation prefers the second α; the best epoch is 10 points too hopeful."""
        vals = (50.0, 80.0, 60.0, 70.0)
        runs = [
            Run(alpha, Outcome(val, 1.0, one), Outcome(val + 10, 1.0, other))
            for alpha, val, one, other in zip(ALPHAS, vals, last, best, strict=True)
        ]
        learned = [
            Learned(start, rate, start + rate, Outcome(0.0, 1.0, start * 100))
            for start in (0.2, 0.8)
            for rate in (0.01, 0.05, 0.1, 0.2)
        ]
        searched = Searched(Outcome(80, 1, 70), Outcome(78, 1, 71), same=seed == 1)
        return Measured("made up", 4, seed, runs, learned, searched)

    tasks = [task(1, [60, 70, 74, 76], [60, 69, 74, 76]), task(2, [60, 70, 74, 76], [60] * 4)]
    assert cells(epoch_tables(tasks), "made up") == [
        "−5.50 ± 4.50",  # −1 and −10
        "−5.12 ± 4.87",  # −0.25 and −10
        "+10.00 ± 0.00",
        "+25.50 ± 4.50",  # 90 − 69 and 90 − 60
        "30.0",
    ]
    assert cells(alpha_table(tasks), "made up")[:2] == ["70.0", "−10.00 ± 0.00"]
    assert cells(alpha_table(tasks), "made up")[-1] == "+0.00 ± 0.00"
    at_a_tenth = ["0.30", "0.90", "0.60", "−56.00 ± 0.00", "+4.00 ± 0.00", "−20.00 ± 0.00"]
    assert cells(learned_tables(tasks), "0.1") == at_a_tenth
    assert cells(learned_tables(tasks), "made up (best 0.8)") == at_a_tenth
    assert cells(halving_table(tasks), "all") == ["2", "1", "−2.00 ± 0.00", "+1.00 ± 0.00"]


def test_means_and_choices():
    assert spread([1, 3]) == "+2.00 ± 1.00"
    assert spread([-1.5]) == "−1.50"
    same, surer, worse = Outcome(50, 2.0, 1), Outcome(50, 1.0, 2), Outcome(49, 0.1, 3)
    assert preferred([same, worse, surer]) is surer


def test_names_help_as_far_as_texts_share_them_and_test_labels_are_right():
    good = drawn("good", 64, 8, named=0.5, unnamed=0.0, **NOISE)
    poor = drawn("poor", 64, 8, named=0.02, unnamed=0.3, **NOISE)
    assert zero_shot(good) > 0.8 > 0.4 > zero_shot(poor)
    wrong = drawn("wrong", 64, 8, named=0.5, unnamed=0.0, mislabelled=0.25, **NOISE)
    differing = np.mean(wrong.train[1] != good.train[1])
    assert differing == pytest.approx(0.25, abs=0.1)
    np.testing.assert_array_equal(wrong.test[1], good.test[1])


def test_textures_turn_with_their_direction():
    """Gradients of a grating lie along its normal."""
    rng = np.random.default_rng(0)
    for angle, axis in ((0.0, 0), (90.0, 1)):
        images = [texture("sine", angle, rng).astype(float) for _ in range(20)]
        along, across = (
            np.mean([np.var(image.mean(axis=1 - a)) for image in images]) for a in (axis, 1 - axis)
        )
        assert along > 4 * across


def test_the_script_prints_its_tables(capsys: pytest.CaptureFixture[str]):
    small = f"--sets noisy-images --shots 1 --seeds 1 --epochs {EPOCHS} --searched-shots 1"
    main(small.split())
    printed = capsys.readouterr().out
    assert printed.startswith(f"1 tasks, {EPOCHS} epochs")
    for title in ("The epoch that is kept", "α", "A learned α", "Halving"):
        assert f"#### {title}\n" in printed
    assert "nan" not in printed
