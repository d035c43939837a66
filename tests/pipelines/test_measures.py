"""Beside accuracy: balanced accuracy, the worst tenth, what guessing reaches, tests of pairs."""

import csv
import json
import re
import shutil
from io import StringIO
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import balanced_accuracy_score

from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.report import ReportConfig, report
from clip_adapter.pipelines.commands.study import StudyConfig, study
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.predictions import Predictions, read_predictions
from clip_adapter.pipelines.fitting.results import Spread, TaskResult, summarise
from clip_adapter.pipelines.fitting.run import FitResult
from clip_adapter.pipelines.reporting.entries import pool
from clip_adapter.pipelines.reporting.runs import load_runs
from clip_adapter.pipelines.reporting.sections.pairs import pairwise
from tests.pipelines.run_files import selected, summary
from tests.pipelines.tiny_cache import tiny_data, write_cache

UNEVEN = tiny_data(test=(40, 8, 5, 2), noise=2.5)
NAMES = ["nominal", "crack", "dent", "rust"]
METHODS = ("zero-shot", "linear-probe", "tip-adapter")
SEEDS = tuple(range(1, 12))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """Three methods on uneven test classes at 11 seeds, of which the two lowest are a tenth."""
    folder = tmp_path_factory.mktemp("uneven")
    cache = write_cache(folder / "uneven.h5", UNEVEN, NAMES)
    tasks = {"shots": (1, 2), "seeds": SEEDS, "select": "none"}
    tasks["hyper"] = {"tip-adapter.alpha": (30.0,)}
    return fit(FitConfig(cache=cache, out=folder / "run", method=METHODS, baselines=(), **tasks))


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    folder = tmp_path_factory.mktemp("even")
    cache = write_cache(folder / "even.h5", tiny_data(), NAMES)
    tasks = {"shots": 1, "seeds": SEEDS[:9], "select": "none"}
    tasks["hyper"] = {"tip-adapter.alpha": (30.0,)}
    return fit(FitConfig(cache=cache, out=folder / "run", method=METHODS, baselines=(), **tasks))


def printed(run: Path, form: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    report(ReportConfig((run,), form, html="none"))  # type: ignore[arg-type]
    return capsys.readouterr().out


def page(run: Path) -> str:
    report(ReportConfig((run,), html=run / "page.html"))
    return " ".join(re.sub("<[^>]*>", " ", (run / "page.html").read_text()).split())


def test_balanced_accuracy_is_scikit_learns_and_the_worst_tenth_is_of_the_lowest(result: FitResult):
    rows = selected(result.run)
    for row in rows:
        own = read_predictions(result.run, row["method"], row["shots"], row["seed"])
        expected = balanced_accuracy_score(own.labels, own.predicted)
        assert row["balanced_accuracy"] == pytest.approx(expected)
        assert row["uneven"] is True
        assert row["balanced_accuracy"] != row["test_accuracy"]
    for line in summary(result.run):
        of_this = [
            r for r in rows if (r["method"], str(r["shots"])) == (line["method"], line["shots"])
        ]
        mean = fmean(r["balanced_accuracy"] for r in of_this)
        assert float(line["balanced_accuracy_mean"]) == pytest.approx(mean)
        lowest = sorted(r["test_accuracy"] for r in of_this)[:2]
        assert float(line["worst_tenth"]) == pytest.approx(fmean(lowest))


@pytest.mark.parametrize(("seeds", "lowest"), [(9, 0), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_a_tenth_is_rounded_up_and_there_is_none_of_nine(seeds: int, lowest: int):
    values = [0.5 + n / 100 for n in range(seeds)][::-1]
    rows = [TaskResult("gda", 1, n, "none", {}, test_accuracy=v) for n, v in enumerate(values)]
    rows.append(TaskResult("gda", 1, seeds, "none"))  # one that diverged counts in nothing
    expected = Spread(fmean(values[-lowest:])) if lowest else None
    (row,) = summarise(rows)
    assert (row.worst_tenth and round(row.worst_tenth.mean, 9)) == (
        expected and round(expected.mean, 9)
    )


def test_a_class_without_images_has_no_recall_and_makes_nothing_uneven():
    labels, sure = np.array([0, 0, 2, 2], np.int32), np.ones(4, np.float32)
    own = Predictions(labels, np.array([0, 1, 2, 2], np.int32), sure, (), ())
    assert (own.balanced_accuracy, own.uneven) == (0.75, False)


def test_fit_and_report_show_both_beside_accuracy(result: FitResult, capsys):
    print_run(result, verbose=True)
    said = capsys.readouterr().out
    text, tex = (printed(result.run, form, capsys) for form in ("text", "tex"))
    rows = list(csv.DictReader(StringIO(printed(result.run, "csv", capsys))))
    shown = page(result.run)
    for row in result.summary:
        measures = {"balanced": row.balanced_accuracy, "worst tenth": row.worst_tenth}
        for kind, spread in measures.items():
            assert spread is not None
            number = f"{100 * spread.mean:.2f}"
            for place in (said, text, tex, shown):
                assert number in place
            assert re.search(rf"{row.method} {kind} .*{number}", said)
            (cell,) = (
                r
                for r in rows
                if (r["entry"], r["kind"], r["shots"]) == (row.method, kind, str(row.shots))
            )
            assert float(cell["mean"]) == pytest.approx(spread.mean)
    meant = "balanced: mean recall over the classes; worst tenth: mean of the lowest tenth over"
    assert all(meant in " ".join(place.split()) for place in (said, text, tex, shown))


def test_study_shows_both_beside_accuracy_and_averages_them_with_even_classes(
    result: FitResult, even: FitResult, tmp_path: Path
):
    study(StudyConfig((), tmp_path, FitConfig(), (result.run, even.run)))
    told = (tmp_path / "study.md").read_text()
    lines = {(r.method, r.shots): r for r in result.summary}
    others = {(r.method, r.shots): r for r in even.summary}
    for method in METHODS:
        one, other = lines[method, 1], others[method, 1]
        assert one.balanced_accuracy and one.worst_tenth and other.balanced_accuracy
        both = fmean((one.balanced_accuracy.mean, other.balanced_accuracy.mean))
        assert f"| {method} balanced | {100 * both:.2f} | – |" in told
        assert f"| {method} worst tenth | {100 * one.worst_tenth.mean:.2f} | " in told
        assert f"| {method} worst tenth | – | – |" in told, "of nine seeds there is none"
    with (tmp_path / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"balanced_accuracy_mean", "balanced_accuracy_std", "worst_tenth_mean"} <= rows[0].keys()


def test_where_classes_are_even_and_seeds_few_nothing_is_added(even: FitResult, capsys):
    print_run(even, verbose=True)
    places = [capsys.readouterr().out]
    places += [printed(even.run, form, capsys) for form in ("text", "tex", "md", "csv")]
    places.append(page(even.run))
    study(StudyConfig((), even.run.parent / "out", FitConfig(), (even.run,)))
    places += [(even.run.parent / "out" / f"study.{kind}").read_text() for kind in ("md", "csv")]
    for place in places:
        assert "balanced" not in place and "worst tenth" not in place
    for row in selected(even.run):
        assert row["balanced_accuracy"] == pytest.approx(row["test_accuracy"])
    share = "25.00 % is reached by always saying the same class; all have as many test images"
    assert share in places[0] and share in places[5]


def test_worse_than_the_most_frequent_class_is_the_headline(
    result: FitResult, tmp_path: Path, capsys
):
    """Where it is so; its share, and balanced accuracy, stand on the page in any case."""
    wrong = UNEVEN.shuffled_labels("test")
    cache = write_cache(tmp_path / "wrong.h5", wrong, NAMES)
    asked = {"method": "tip-adapter", "baselines": ("zero-shot",), "shots": 1, "select": "none"}
    bad = fit(FitConfig(cache=cache, out=tmp_path / "bad", **asked))
    print_run(bad, verbose=True)
    accuracy = 100 * bad.summary[1].test_accuracy.mean  # type: ignore[union-attr]
    assert accuracy < 70
    worse = f"tip-adapter at 1 shot is worse than always saying 'crack' ({accuracy:.2f} %)"
    assert worse in capsys.readouterr().out
    shown = page(bad.run)
    assert "Worse than always saying &#39;crack&#39;. " in shown
    share = f"{100 * 40 / 55:.2f} % is reached by always saying "
    assert f"{share}&#39;crack&#39;, the most frequent class of the test." in shown
    balanced = bad.summary[1].balanced_accuracy
    assert balanced and f"recall over the classes, is {100 * balanced.mean:.2f} %" in shown
    # Of these methods zero-shot comes first, and no validation prefers another.
    zero = result.summary[0].test_accuracy
    assert zero and ("Worse than" in page(result.run)) == (zero.mean < 40 / 55)


def test_any_two_methods_are_tested_on_the_images_that_they_share(result: FitResult, capsys):
    """By hand: an image counts for the method that is right on it in more of the seeds."""
    entries = pool(load_runs([result.run]))
    one, two = pairwise(entries, (1, 2))
    assert (one.shots, two.shots) == (1, 2)
    pairs = [("zero-shot", "linear-probe"), ("zero-shot", "tip-adapter")]
    pairs += [("linear-probe", "tip-adapter")]
    assert [(d.one.label, d.other.label) for d in two.differences] == pairs
    for found, corrected in zip(two.differences, two.corrected, strict=True):
        right, theirs = (
            np.sum([read_predictions(result.run, name, 2, seed).right for seed in SEEDS], axis=0)
            for name in (found.one.label, found.other.label)
        )
        better, worse = int(np.sum(right > theirs)), int(np.sum(right < theirs))
        tosses = np.random.default_rng(0).binomial(better + worse, 0.5, 200_000)
        as_uneven = np.abs(2 * tosses - better - worse) >= abs(better - worse)
        assert found.p == pytest.approx(as_uneven.mean(), abs=0.005)
        assert found.gained.mean() == pytest.approx((right - theirs).mean() / len(SEEDS))
        assert found.p <= corrected <= 3 * found.p + 1e-12
    text, shown = printed(result.run, "text", capsys), page(result.run)
    rows = list(csv.DictReader(StringIO(printed(result.run, "csv", capsys))))
    assert "difference in test accuracy in points at 2 shots, row minus column" in text
    assert "at 1 shot, row minus column" not in text and "at 1 shot, row minus column" in shown
    against = [row for row in rows if row["factor"] == "against"]
    assert len(against) == 6 and not any(row["p"] for row in rows if row not in against)
    last = against[-1]
    assert (last["entry"], last["value"], last["shots"]) == ("linear-probe", "tip-adapter", "2")
    assert float(last["p_holm"]) == two.corrected[-1]
    assert float(last["mean"]) == two.differences[-1].gained.mean()


def test_latex_marks_the_best_of_each_kind_and_has_labels(result: FitResult, capsys):
    tex = printed(result.run, "tex", capsys)
    accuracies, pairs = tex.split(r"\end{table}")[:2]
    assert r"\label{tab:tiny-accuracy}" in accuracies and r"\label{tab:tiny-pairs}" in pairs
    assert r"\textbf" not in pairs
    for kind, measure in (
        ("", "test_accuracy"),
        (" balanced", "balanced_accuracy"),
        (" worst tenth", "worst_tenth"),
    ):
        for column, shots in ((1, 1), (2, 2)):
            means = {
                row.method: f"{100 * getattr(row, measure).mean:.2f}"
                for row in result.summary
                if row.shots == shots
            }
            best = {method for method, mean in means.items() if mean == max(means.values())}
            for method, mean in means.items():
                (line,) = re.findall(rf"^{method}{kind} & .*", accuracies, re.MULTILINE)
                cell = line.removesuffix(r" \\").split(" & ")[column]
                marked = rf"\textbf{{{mean}"
                assert cell.startswith(marked if method in best else mean)


def test_predictions_name_their_images_and_classes(result: FitResult):
    """As docs/researcher.md reads them, with safetensors alone."""
    tensors = load_file(result.run / "predictions" / "tip-adapter" / "shots-2-seed-3.safetensors")
    ids, names = (json.loads(tensors[name].tobytes()) for name in ("ids", "class_names"))
    labels = UNEVEN.splits["test"][1]
    assert ids == [f"test/{row}" for row in range(len(labels))] and names == NAMES
    own = read_predictions(result.run, "tip-adapter", 2, 3)
    assert (own.ids, own.class_names) == (ids, names)


def test_predictions_of_base_classes_name_those(tmp_path: Path):
    cache = write_cache(tmp_path / "features.h5", UNEVEN, NAMES)
    asked = {"method": "zero-shot", "baselines": (), "shots": 1, "train_classes": "base"}
    found = fit(FitConfig(cache=cache, out=tmp_path / "run", **asked))
    own = read_predictions(found.run, "zero-shot", 1, 1)
    base = np.flatnonzero(UNEVEN.splits["test"][1] < 2)
    assert own.ids == [f"test/{row}" for row in base] and own.class_names == NAMES[:2]


def test_without_predictions_no_two_methods_are_tested(result: FitResult, tmp_path: Path, capsys):
    run = shutil.copytree(result.run, tmp_path / "run")
    text = printed(run, "text", capsys)
    shutil.rmtree(run / "predictions")
    assert printed(run, "text", capsys) == text[: text.index("\ndifference in test")]
