"""`clip-adapter study`: several caches as one experiment, and what it says of them."""

import csv
import dataclasses
import itertools
import re
import signal
import time
import warnings
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.study import StudyConfig, main, parse, study
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.reporting.comparison import (
    Comparison,
    _figure,
    _tables,
    read_comparisons,
    write_comparison,
)
from clip_adapter.pipelines.reporting.figures import series
from tests import processes
from tests.pipelines.run_files import assert_same_end, summary
from tests.pipelines.tiny_cache import tiny_data, write_cache

NAMES = ("apples", "boats", "cars")
METHODS = ("zero-shot", "tip-adapter", "clip-adapter")
WORDS = [*("--method", "clip-adapter", "tip-adapter"), *("--baselines", "zero-shot")]
WORDS += [*("--shots", "1", "2"), *("--seeds", "1", "2"), *("--epochs", "3")]
WORDS += [*("--clip-adapter.alpha", "0.2", "0.6"), *("--tip-adapter.alpha", "1")]
WORDS += [*("--tip-adapter.beta", "1", "5")]


class Heard(Listener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    for seed, name in enumerate(NAMES):
        write_cache(folder / f"{name}.h5", tiny_data(train=(5,) * (3 + seed), seed=seed))
    return folder


def words(caches: Path, out: Path, names: tuple[str, ...] = NAMES) -> list[str]:
    return ["--caches", *(str(caches / f"{name}.h5") for name in names), "--out", str(out), *WORDS]


@pytest.fixture(scope="module")
def whole(caches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study that nothing stopped."""
    out = tmp_path_factory.mktemp("studies") / "whole"
    with pytest.raises(SystemExit) as ended:
        main(words(caches, out))
    assert ended.value.code == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "study.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def accuracies(out: Path) -> np.ndarray:
    """(data sets, methods, shots)."""
    numbers = [float(row["test_accuracy_mean"]) for row in rows(out)]
    return np.array(numbers).reshape(len(NAMES), len(METHODS), 2)


def tables(out: Path) -> list[tuple[str, list[list[str]]]]:
    """Title and rows of cells of each table of study.md."""
    found = []
    for block in (out / "study.md").read_text().strip().split("\n\n"):
        lines = block.splitlines()
        if not lines[0].startswith("|"):
            title = block
            continue
        found.append((title, [[c.strip() for c in ln[1:-1].split("|")] for ln in lines[2:]]))
    return found


def test_each_cache_is_fitted_as_by_fit_alone(caches: Path, whole: Path, tmp_path: Path) -> None:
    config = parse(words(caches, tmp_path)).fit
    for name in NAMES:
        run = fit(
            FitConfig(
                **{n: getattr(config, n) for n in ("method", "baselines", "shots", "seeds")},
                hyper=config.hyper,
                cache=caches / f"{name}.h5",
                out=tmp_path / name,
            )
        ).run
        assert_same_end(whole / name, run)
        own = [row for row in rows(whole) if row["dataset"] == name]
        assert len(own) == 6
        for line in summary(run):
            (mine,) = (
                r for r in own if (r["method"], r["shots"]) == (line["method"], line["shots"])
            )
            assert mine["test_accuracy_mean"] == line["test_accuracy_mean"]
            assert mine["test_accuracy_std"] == line["test_accuracy_std"]


def test_averages_ranks_and_differences(whole: Path) -> None:
    """By counting, from study.csv."""
    found, methods = accuracies(whole), [row["method"] for row in rows(whole)[:6:2]]
    assert sorted(methods) == sorted(METHODS)
    assert [row["dataset"] for row in rows(whole)[::6]] == list(NAMES)
    (average, ranks, differences, *each) = tables(whole)
    assert "average over 3 data sets: apples, boats, cars" in average[0]
    for method, shots in np.ndindex(3, 2):
        column = found[:, method, shots]
        assert average[1][method][0] == methods[method]
        assert average[1][method][1 + shots] == f"{100 * sum(column) / 3:.2f}"
        # A rank is 1 + how many are better + half of the others that are as good.
        ranked = [
            1 + np.sum(found[d, :, shots] > own) + (np.sum(found[d, :, shots] == own) - 1) / 2
            for d, own in enumerate(column)
        ]
        assert ranks[1][method][1 + shots] == f"{np.mean(ranked):.2f}"
    for one, other in itertools.permutations(range(3), 2):
        by_set = [np.mean(found[d, one] - found[d, other]) for d in range(3)]
        mean = sum(by_set) / 3
        error = (sum((value - mean) ** 2 for value in by_set) / 2) ** 0.5 / 3**0.5
        wins = sum(a > b for a, b in zip(found[:, one].flat, found[:, other].flat, strict=True))
        losses = sum(a < b for a, b in zip(found[:, one].flat, found[:, other].flat, strict=True))
        wanted = f"{100 * mean:+.2f} ± {100 * error:.2f} ({wins} : {losses})"
        assert differences[1][one][1 + other] == wanted
    assert [differences[1][n][1 + n] for n in range(3)] == [""] * 3
    assert [title.split(",")[0] for title, _ in each] == list(NAMES)
    first = rows(whole)[0]
    spread = [100 * float(first[f"test_accuracy_{part}"]) for part in ("mean", "std")]
    assert each[0][1][0][1] == f"{spread[0]:.2f} ± {spread[1]:.2f}"
    assert (whole / "study.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_text_wherever_they_are_shown(whole: Path, tmp_path: Path) -> None:
    names = ['=1+cmd|"\udcff"', "[x](javascript:alert(1))<b>\x1b[2J", "two\nlines|_x_ a_b"]
    write_comparison(tmp_path, {n: [whole / own] for n, own in zip(names, NAMES, strict=True)})
    shown = [row["dataset"] for row in rows(tmp_path)[::6]]
    assert shown[0].startswith("'=1") and shown[0].endswith('\\udcff"')
    assert shown[1].endswith("<b>\\x1b[2J") and shown[2].startswith("two\\nlines")
    page = (tmp_path / "study.md").read_text()
    assert r"\[x\](javascript:alert(1))&lt;b&gt;\\x1b\[2J" in page
    assert r"two\\nlines\|\_x\_ a\_b" in page and "\x1b" not in page


def test_a_method_without_a_number_on_a_data_set() -> None:
    """It has no average; the others have theirs, and pairs are compared where both have one."""
    nan = np.nan
    accuracy = np.array([[[0.5], [0.6]], [[0.7], [nan]], [[0.3], [0.8]]])
    measured = ("test accuracy", "test_accuracy")
    found = Comparison(*measured, ("a", "b", "c"), ("one", "two"), (1,), accuracy, accuracy)
    assert np.array_equal(found.average, [[0.5], [nan]], equal_nan=True)
    page = "\n".join(table.markdown() for table in _tables(found))
    assert page.count("| two | – |") == 3, "neither an average, nor a rank, nor a number on b"
    assert "nan" not in page
    mean, error, wins, losses = found.difference(1, 0)
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx(0.2)
    assert (wins, losses) == (2, 0)
    lost = Comparison(*measured, ("a",), ("one", "two"), (1,), np.array([[[0.5], [nan]]]), accuracy)
    assert np.isnan(lost.difference(0, 1)[0])


def test_the_figure_takes_any_name_and_every_method_looks_another() -> None:
    """Names are text, no mathematics; the legend of many long names leaves room for the axes."""
    methods = [f"method-{number} with all its arguments" for number in range(15)]
    accuracy = np.linspace(0, 1, 30).reshape(1, 15, 2)
    found = Comparison(
        "test accuracy", "test_accuracy", ("$\\frac{$",), methods, (1, 4), accuracy, accuracy
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a layout that leaves no room
        content = _figure(found)
    pixels = np.array(Image.open(BytesIO(content)).convert("RGB")).reshape(-1, 3)
    counts = Counter(map(tuple, pixels.tolist()))
    for number in range(7):
        colour = tuple(bytes.fromhex(series(number)["color"][1:]))
        assert counts[colour] > 50


def test_what_fails_is_named_and_leaves_the_others_whole(
    caches: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (caches / "broken.h5").write_bytes(b"no cache")
    line = words(caches, tmp_path / "out", ("missing", "apples", "broken", "cars"))
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert len(re.findall(r"warning: missing: .*missing\.h5", said)) == 1
    assert len(re.findall(r"warning: broken: .*broken\.h5", said)) == 1
    for name in ("apples", "cars"):
        assert_same_end(tmp_path / "out" / name, whole / name)
    assert rows(tmp_path / "out") == [row for row in rows(whole) if row["dataset"] != "boats"]


def test_a_cache_that_lacks_what_is_asked_for_is_named(caches: Path, tmp_path: Path) -> None:
    """One without a validation split, where that is what shall choose."""
    data = tiny_data(train=(5,) * 3).with_split("val", None)
    other = write_cache(tmp_path / "other.h5", data)
    asked = [*words(caches, tmp_path / "out", ("apples",)), "--select", "few-shot-val"]
    config, heard = parse(asked), Heard()
    found = study(StudyConfig((other, *config.caches), config.out, config.fit), heard)
    assert list(found.runs) == ["apples"]
    assert "validation split" in found.failed["other"]
    assert heard.warnings == [f"other: {found.failed['other']}"]


def test_where_nothing_can_be_fitted(caches: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No data set could be fitted"):
        study(parse(words(caches, tmp_path / "out", ("missing",))))
    assert not (tmp_path / "out" / "study.csv").exists()


def test_a_killed_study_goes_on_and_ends_alike(caches: Path, whole: Path, tmp_path: Path) -> None:
    """By SIGKILL while the second data set is being fitted."""
    out = tmp_path / "out"
    child = processes.start(["clip-adapter", "study", *words(caches, out)], tmp_path)
    try:
        deadline = time.monotonic() + 100
        while not (out / "boats" / "selected.jsonl").exists():
            assert child.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.kill()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (out / "study.csv").exists()
    finished = (out / "apples" / "results.csv").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(words(caches, out))
    assert ended.value.code == 0
    for name in ("study.csv", "study.md", "study.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert (out / "apples" / "results.csv").read_bytes() == finished, "nothing was fitted again"
    for name in NAMES:
        assert_same_end(out / name, whole / name)


def test_an_interrupted_study_says_how_to_go_on(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clip_adapter.pipelines.fitting.one_task import TaskRunner

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TaskRunner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
        study(parse(words(caches, tmp_path / "out")))


def test_another_command_does_not_go_on(caches: Path, whole: Path) -> None:
    """Also where it leaves out what the first one gave: its numbers would not be comparable."""
    for option, name in (
        ("--shots", "shots"),
        ("--seeds", "seeds"),
        ("--clip-adapter.alpha", "alpha"),
    ):
        line = words(caches, whole, ("apples",))
        at = line.index(option)
        heard = Heard()
        with pytest.raises(UserError, match=r"No data set could be fitted"):
            study(parse(line[:at] + line[at + 3 :]), heard)
        (warning,) = heard.warnings
        assert f"other arguments ({name})" in warning


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--caches", "A study needs --caches to fit on, or --runs that are finished."),
        ("", "A study needs --caches to fit on, or --runs that are finished."),
        ("--caches a.h5 sub/a.h5", "names several files 'a'; a data set is called by its file's"),
        *((f"--caches sub/{name}.h5", "rename the file") for name in (".", "..", "study.md")),
        ("--caches .", "rename the file"),
        ("--caches a.h5 --cache b.h5", "--cache is for `fit`; a study takes --caches and --out."),
        ("--caches a.h5 --resume run", "--resume is for `fit`"),
        ("--caches a.h5 --verbose", "--verbose is for `fit`"),
        ("--caches a.h5 --shot 1", "--shot"),
        ("--runs nowhere", "nowhere holds no run of `fit`, nor a study (there is no run.json)."),
        ("--runs nowhere --shots 1", "--caches needs at least one cache."),
    ],
)
def test_bad_arguments_are_a_sentence(
    line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("clip-adapter study: ") and said.count("\n") == 1
    assert sentence in said
    assert list(tmp_path.iterdir()) == []


def test_help_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--caches CACHE" in capsys.readouterr().out


def test_nothing_is_half_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that cannot be written whole leaves the earlier one."""
    runs = {name: [whole / name] for name in NAMES}
    write_comparison(tmp_path, runs)
    before = (tmp_path / "study.png").read_bytes()
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target.name == "study.png":
            assert (tmp_path / "study.png").read_bytes() == before
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space"):
        write_comparison(tmp_path, {"apples": [whole / "apples"]})
    assert (tmp_path / "study.png").read_bytes() == before
    (found,) = read_comparisons(runs)
    assert found.datasets == list(NAMES)


def test_jobs_of_a_cluster_pool(caches: Path, whole: Path, tmp_path: Path) -> None:
    """A run folder for each seed and data set, and a study of the third data set."""
    asked = parse(words(caches, tmp_path)).fit
    jobs = []
    for seed, name in itertools.product((1, 2), NAMES[:2]):
        job = dataclasses.replace(
            asked, cache=caches / f"{name}.h5", seeds=(seed,), out=tmp_path / f"{name}-{seed}"
        )
        jobs.append(fit(job).run)
    with pytest.raises(SystemExit):
        main(words(caches, tmp_path / "third", NAMES[2:]))
    out = tmp_path / "pooled"
    with pytest.raises(SystemExit) as ended:
        main(["--runs", *map(str, jobs), str(tmp_path / "third"), "--out", str(out)])
    assert ended.value.code == 0
    for name in ("study.csv", "study.md", "study.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    # With other arguments it is another method, not another seed.
    other = dataclasses.replace(
        asked, cache=caches / "apples.h5", out=tmp_path / "other", repeat=True, shots=(1,)
    )
    jobs.append(fit(other).run)
    found = study(StudyConfig((), tmp_path / "both", FitConfig(), tuple(jobs)))
    methods = {row["method"] for row in rows(found.folder)}
    assert {"clip-adapter repeat true", "clip-adapter repeat false"} <= methods


def test_methods_with_other_arguments_on_other_data_sets_are_not_averaged(
    caches: Path, tmp_path: Path
) -> None:
    runs = [
        fit(
            FitConfig(
                cache=caches / f"{name}.h5",
                out=tmp_path / name,
                baselines="zero-shot",  # type: ignore[arg-type]
                shots=2,  # type: ignore[arg-type]
                hyper={"alpha": alpha, "epochs": 2},
            )
        ).run
        for name, alpha in (("apples", 0.2), ("boats", 0.6))
    ]
    found = study(StudyConfig((), tmp_path / "out", FitConfig(), tuple(runs)))
    (comparison,) = read_comparisons(found.runs)
    assert comparison.methods == ["zero-shot", "clip-adapter alpha 0.2", "clip-adapter alpha 0.6"]
    assert np.isnan(comparison.average[1:]).all() and not np.isnan(comparison.average[0]).any()


def test_base_to_new(caches: Path, tmp_path: Path) -> None:
    line = [*words(caches, tmp_path / "out", NAMES[:2]), "--train-classes", "base"]
    at = line.index("--method")
    line[at : at + 3] = ["--method", "clip-adapter"]
    del line[line.index("--tip-adapter.alpha") : line.index("--train-classes")]
    line[line.index("--clip-adapter.alpha")] = "--alpha"
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 0
    for row in rows(tmp_path / "out"):
        (own,) = (
            line
            for line in summary(tmp_path / "out" / row["dataset"])
            if (line["method"], line["shots"]) == (row["method"], row["shots"])
        )
        for measure in ("test_accuracy", "new_accuracy", "harmonic_mean"):
            assert own[f"{measure}_mean"] and row[f"{measure}_mean"] == own[f"{measure}_mean"]
    titles = [title for title, _ in tables(tmp_path / "out")]
    assert [title.split(" (%)")[0] for title in titles[::5]] == [
        *("Base accuracy", "New accuracy", "Harmonic mean")
    ]
    # Beside runs on all classes it would be another measure.
    runs = (tmp_path / "out" / "apples", tmp_path / "all")
    fit(
        dataclasses.replace(
            parse(words(caches, tmp_path)).fit, cache=caches / "apples.h5", out=runs[1]
        )
    )
    with pytest.raises(UserError, match="are not comparable"):
        study(StudyConfig((), tmp_path / "mixed", FitConfig(), runs))
