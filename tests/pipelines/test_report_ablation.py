"""What `clip-adapter report` shows of `fit --ablate`."""

import csv
import json
import re
import shutil
import statistics
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.report import ReportConfig, report
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.run_folder import SELECTED
from clip_adapter.pipelines.reporting.accuracies import Ablation, ablations
from clip_adapter.pipelines.reporting.entries import pool
from clip_adapter.pipelines.reporting.runs import load_runs
from clip_adapter.pipelines.reporting.sections.accuracy import ablation_section
from tests.pipelines.tiny_cache import tiny_data, write_cache


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one` (seeds 1, 2), `more` (seed 3 of the same), `other` (another decay), and `methods`
    (`alpha` of two methods, and the methods themselves)."""
    folder = tmp_path_factory.mktemp("ablations")
    stated: dict[str, Any] = {"cache": write_cache(folder / "features.h5", tiny_data())}
    stated |= {"shots": (1, 4), "seeds": (1, 2), "baselines": (), "ablate": "alpha"}
    hyper = {"epochs": 3, "alpha": (0.8, 0.2, "learned")}
    fit(FitConfig(out=folder / "one", hyper=hyper, **stated))
    fit(FitConfig(out=folder / "more", hyper=hyper, **stated | {"seeds": 3}))
    fit(FitConfig(out=folder / "other", hyper=hyper | {"weight_decay": 0.1}, **stated))
    pairs = {"tip-adapter.alpha": (0.5, 1.0), "clip-adapter.alpha": (0.5, "learned")}
    both = {"method": ("tip-adapter", "clip-adapter"), "ablate": ("alpha", "method")}
    pairs |= {"tip-adapter.beta": 1.0, "epochs": 3}
    fit(FitConfig(out=folder / "methods", hyper=pairs, **stated | both))
    return folder


def cell(run: Path, value: object, shots: int, *more: Path) -> str:
    """Mean ± deviation of the rows in selected.jsonl."""
    lines = [line for path in (run, *more) for line in (path / SELECTED).read_text().splitlines()]
    found = [
        row["test_accuracy"]
        for row in map(json.loads, lines)
        if (row["held"].get("alpha"), row["shots"]) == (value, shots)
    ]
    return f"{100 * statistics.mean(found):.2f} ± {100 * statistics.stdev(found):.2f}"


def pooled(*runs: Path) -> list[Ablation]:
    return ablations(pool(load_runs(runs)))


def printed(capsys: pytest.CaptureFixture[str], form: str, *runs: Path) -> str:
    report(ReportConfig(runs, form, html="none"))  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_a_row_for_each_value_numbers_by_size_then_words(runs: Path) -> None:
    (found,) = pooled(runs / "one")
    assert found.table.head == ["alpha", "1 shot", "4 shots"]
    values = {"0.2": 0.2, "0.8": 0.8, "learned": "learned"}
    assert found.table.rows == [
        [words, cell(runs / "one", value, 1), cell(runs / "one", value, 4)]
        for words, value in values.items()
    ]


def test_runs_of_other_seeds_pool_and_others_are_named(runs: Path) -> None:
    one, more, other = (runs / name for name in ("one", "more", "other"))
    (both,) = pooled(one, more)
    assert both.table.rows[0] == ["0.2", cell(one, 0.2, 1, more), cell(one, 0.2, 4, more)]
    assert [both.entries[0].seeds(shots) for shots in (1, 4)] == [(1, 2, 3)] * 2
    (every,) = pooled(one, other, more)
    names = [f"clip-adapter weight-decay {decay}" for decay in ("0.01", "0.1")]
    assert [row[0] for row in every.table.rows] == [
        f"{name} {value}" for name in names for value in ("0.2", "0.8", "learned")
    ]
    assert [row[1:] for row in every.table.rows[:3]] == [row[1:] for row in both.table.rows]
    (picture,) = ablation_section(every).pictures
    for name in names:
        assert name[:20] in picture.inline, "a line each"


def test_a_number_that_contradicts_another_is_not_averaged_away(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "edited"
    shutil.copytree(runs / "one", copy)
    text = (copy / SELECTED).read_text()
    lines = text.splitlines(keepends=True)
    place, row = next((n, r) for n, r in enumerate(map(json.loads, lines)) if r["held"])
    lines[place] = json.dumps(row | {"test_accuracy": 0.0625}) + "\n"
    (copy / SELECTED).write_text("".join(lines))
    (found,) = pooled(runs / "one", copy)
    assert {entry.label for entry in found.entries} == {"clip-adapter", "clip-adapter (edited)"}


def test_several_methods_and_the_factor_method(runs: Path) -> None:
    alpha, method = pooled(runs / "methods")
    assert [row[0] for row in alpha.table.rows] == [
        *("tip-adapter 0.5", "tip-adapter 1", "clip-adapter 0.5", "clip-adapter learned")
    ]
    assert [row[0] for row in method.table.rows] == ["tip-adapter", "clip-adapter"]
    sections = [ablation_section(one) for one in (alpha, method)]
    assert [section.title for section in sections] == ["Ablation of alpha", "Ablation of method"]
    drawn = sections[0].pictures[0].inline
    for words in ("tip-adapter, 1 shot", "tip-adapter, 4 shots", "clip-adapter, 1 shot"):
        assert drawn.count(f">{words}<") == 1, "a line of the legend each"
    assert sections[1].pictures[0].inline.count(">4 shots<") == 1


def test_the_page_says_that_it_chooses_nothing(runs: Path, tmp_path: Path) -> None:
    report(ReportConfig((runs / "one",), html=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    section = page[page.index("<h2>Ablation of alpha</h2>") :]
    section = " ".join(section[: section.index("</section>")].split())
    assert "test accuracy is seen at every value of alpha" in section
    assert "everything else was selected on validation. It chooses nothing" in section
    assert cell(runs / "one", "learned", 4) in section
    assert (tmp_path / "figures" / "ablation-alpha.svg").exists()
    report(ReportConfig((runs / "one",), html="none"))


@pytest.mark.parametrize("form", ["text", "md", "tex"])
def test_the_table_follows_in_every_format(runs: Path, capsys: Any, form: str) -> None:
    text = printed(capsys, form, runs / "one")
    first, _, rest = text.partition("ablation of alpha")
    if form == "tex":  # a caption stands below
        rest = first.split(r"\begin{table}")[2]
        assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
        assert text.count("usepackage") == 1
    rest = rest.replace(r"$\pm$", "±")
    for value in (0.2, 0.8, "learned"):
        (line,) = (ln for ln in rest.splitlines() if re.match(rf"[| ]*{value}\b", ln))
        assert cell(runs / "one", value, 1) in line and cell(runs / "one", value, 4) in line


def test_csv_tells_the_rows_apart(runs: Path, capsys: Any) -> None:
    rows = list(csv.DictReader(StringIO(printed(capsys, "csv", runs / "one"))))
    assert [row["factor"] for row in rows] == [""] * 2 + ["alpha"] * 6
    (row,) = (r for r in rows if (r["value"], r["shots"]) == ("learned", "4"))
    mean, deviation = (100 * float(row[name]) for name in ("mean", "std"))
    assert f"{mean:.2f} ± {deviation:.2f}" == cell(runs / "one", "learned", 4)
    assert (row["entry"], row["seeds"], row["test_images"]) == ("clip-adapter", "1 2", "60")


def test_of_base_classes_it_says_so(tmp_path: Path, capsys: Any) -> None:
    cache = write_cache(tmp_path / "features.h5", tiny_data())
    hyper = {"epochs": 2, "alpha": (0.2, 0.8)}
    stated: dict[str, Any] = {"baselines": (), "shots": 2, "train_classes": "base"}
    fit(FitConfig(cache=cache, out=tmp_path / "run", hyper=hyper, ablate="alpha", **stated))
    text = " ".join(printed(capsys, "text", tmp_path / "run").split())
    assert "ablation of alpha: test accuracy of the base classes (%)" in text


def test_damage_is_one_sentence(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path / "run")
    path = tmp_path / "run" / SELECTED
    lines = path.read_text().splitlines(keepends=True)
    held = next(line for line in lines if '"alpha": 0.8}' in line and '"held": {"' in line)
    rest = [line for line in lines if line != held]
    for content, words in (
        ([*lines, held], "is damaged"),
        ([*rest, held.replace('"held": {"alpha"', '"held": {"beta"')], "is damaged"),
        ([*rest, held.replace('"held": {"alpha": 0.8}', '"held": {"alpha": 0.7}')], "is damaged"),
        ([*rest, held.replace('{"alpha": 0.8}', '{"alpha": [0.8]}')], "cannot be read"),
        (rest[:-1], "2 fits of 16 to go; go on with: fit --resume"),
    ):
        path.write_text("".join(content))
        with pytest.raises(UserError, match=words) as caught:
            report(ReportConfig((tmp_path / "run",)))
        assert "\n" not in str(caught.value)
