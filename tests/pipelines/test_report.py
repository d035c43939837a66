"""`clip-adapter report`: several runs in one table."""

import csv
import json
import re
import shutil
import statistics
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len

from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.report import ReportConfig, report
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.reporting.entries import pool
from clip_adapter.pipelines.reporting.runs import load_runs
from tests.pipelines.tiny_cache import tiny_data, write_cache

DATA = tiny_data()
SHORT: dict = {"shots": (2, 4), "seeds": (1, 2), "baselines": ("zero-shot", "linear-probe")}
Run = Callable[..., Path]
Report = Callable[..., str]


def short(**hyper: object) -> dict:
    return {"epochs": 5, "learning_rate": 0.01, **hyper}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `low`, `high` (another α), `more` (`low` with another seed), `other` (another method and
    rule) and `foreign` (a cache)."""
    folder = tmp_path_factory.mktemp("runs")
    stated = SHORT | {"cache": write_cache(folder / "features.h5", DATA)}
    low = short(alpha=0.2)
    fit(FitConfig(out=folder / "low", hyper=low, **stated))
    fit(FitConfig(out=folder / "high", hyper=short(alpha=0.8), **stated))
    fit(FitConfig(out=folder / "more", hyper=low, **stated | {"seeds": 3, "shots": 4}))
    other = {"seeds": 3, "select": "full-val", "method": "tip-adapter"}
    few = {"alpha": (1.0, 2.0), "beta": (1.0, 5.0)}
    fit(FitConfig(out=folder / "other", hyper=few, **stated | other))
    foreign = write_cache(folder / "foreign.h5", DATA.shuffled_labels("test"))
    plain = {"method": "zero-shot", "baselines": (), "shots": 2}
    fit(FitConfig(cache=foreign, out=folder / "foreign", **plain))
    return folder


@pytest.fixture
def printed(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Report:
    """(names of runs, width, format) → what is printed."""

    def read(*names: str | Path, width: int = 200, form: str = "text") -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        paths = tuple(runs / name for name in names)
        report(ReportConfig(paths, form, html="none"))  # type: ignore[arg-type]
        return capsys.readouterr().out

    return read


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows that --format csv printed."""
    return list(csv.DictReader(StringIO(text)))


def table(text: str) -> dict[str, dict[str, str]]:
    """The printed means: row → column → mean, with the names in full and without marks."""
    head, _, below = text.partition(" ───")
    columns = re.findall(r"\S+ shots?", head.splitlines()[-1])
    rows: dict[str, dict[str, str]] = {}
    for line in below.splitlines()[1:]:
        if not line.startswith("  "):
            break
        name, *cells = re.split("   +", line.strip()) if line[2] != " " else ["", line.strip()]
        cells = [cell for cell in cells if cell]
        if cells and re.match(r"\d|–", cells[-1]):
            means = (cell.split()[0] for cell in cells)
            rows[name] = dict(zip(columns, means, strict=True))
        else:  # the rest of a long name
            name = [*rows][-1]
            rows[f"{name} {line.strip()}"] = rows.pop(name)
    return {re.sub("( [*†])+$", "", name): row for name, row in rows.items()}


def accuracies(run: Path, method: str, shots: int) -> list[float]:
    lines = map(json.loads, (run / "selected.jsonl").read_text().splitlines())
    return [
        row["test_accuracy"] for row in lines if (row["method"], row["shots"]) == (method, shots)
    ]


def changed(run: Path, copy: Path, accuracy: float) -> Path:
    """A copy of a run in which the adapter has another accuracy at 2 shots and seed 1."""
    shutil.copytree(run, copy)
    lines = []
    for line in (run / "selected.jsonl").read_text().splitlines():
        row = json.loads(line)
        if (row["method"], row["shots"], row["seed"]) == ("clip-adapter", 2, 1):
            row["test_accuracy"] = accuracy
        lines.append(json.dumps(row) + "\n")
    (copy / "selected.jsonl").write_text("".join(lines))
    return copy


def mean(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.2f}"


APART = {"low": 0.2, "high": 0.8}


def test_a_row_per_run_and_a_common_baseline_once(runs: Path, printed: Report):
    rows = table(printed("low", "high"))
    sources = {name: ("low", name) for name in ("zero-shot", "linear-probe")}
    sources |= {f"clip-adapter alpha {a}": (run, "clip-adapter") for run, a in APART.items()}
    assert rows == {
        name: {f"{shots} shots": mean(accuracies(runs / run, method, shots)) for shots in (2, 4)}
        for name, (run, method) in sources.items()
    }
    means = [float(row["4 shots"]) for row in rows.values()]
    assert means == sorted(means, reverse=True), "the best first, at the most shots"


def test_other_seeds_and_shots_of_the_same_pool(runs: Path, printed: Report):
    """Over the seeds of both runs, and what it is over is said."""
    text = printed("low", "more")
    rows = table(text)
    assert sorted(rows) == ["clip-adapter", "linear-probe", "zero-shot"]
    pooled = [x for run in ("low", "more") for x in accuracies(runs / run, "clip-adapter", 4)]
    assert len(pooled) == 3
    own = accuracies(runs / "low", "clip-adapter", 2)
    assert rows["clip-adapter"] == {"2 shots": mean(own), "4 shots": mean(pooled)}
    assert f"{mean(pooled)} ± {100 * statistics.stdev(pooled):.2f}" in text
    assert "clip-adapter: seeds 1, 2 at 2; 1, 2, 3 at 4 shots" in text
    assert "of one seed" not in text
    assert "(of one seed ± standard error of the test images)" in printed("low", "other")
    assert printed("low", "low") == printed("low"), "a run named twice counts once"


def test_it_says_what_the_numbers_rest_on(printed: Report):
    text = printed("low")
    assert "tiny-clip (nothing) on tiny: 4 classes, 60 test images" in text
    assert "test split: made up" in text
    assert "seeds 1, 2\n" in text
    rule = "selected on min(shots, 4) validation images per class"
    assert f"{rule}; test computed for the selected setting only\n" in text


def test_other_methods_and_rules_stand_beside_each_other(printed: Report):
    """What nothing is chosen of has no rule; what is chosen by another is another column."""
    text = printed("low", "other")
    rows = table(text)
    assert {n for n in rows if n.startswith(("zero", "linear"))} == {
        *("zero-shot", "linear-probe select few-shot-val", "linear-probe select full-val")
    }
    assert "tip-adapter: selected on the whole validation split\n" in text
    assert rows["tip-adapter"]["2 shots"] != "–"


def test_runs_on_half_of_the_classes_say_so(runs: Path, tmp_path: Path, printed: Report):
    stated = {"cache": runs / "features.h5", "train_classes": "base", "shots": 2, "seeds": 1}
    baselines = {"baselines": ("zero-shot",), "hyper": short(alpha=0.2)}
    result = fit(FitConfig(out=tmp_path / "base", **stated, **baselines)).results[1]
    rows = table(printed(tmp_path / "base"))
    kinds = ("base", "new", "H")
    assert {*rows} == {f"{name} {k}" for name in ("zero-shot", "clip-adapter") for k in kinds}
    assert result.new_accuracy is not None and result.harmonic_mean is not None
    assert rows["clip-adapter new"] == {"2 shots": mean([result.new_accuracy])}
    assert rows["clip-adapter H"] == {"2 shots": mean([result.harmonic_mean])}


def test_no_row_hides_another(runs: Path, tmp_path: Path, printed: Report):
    """Where the same arguments gave other numbers, the folder tells the rows apart."""
    changed(runs / "low", tmp_path / "edited", 0.0625)
    rows = table(printed("low", tmp_path / "edited"))
    for name, run in (("clip-adapter", "low"), ("clip-adapter (edited)", tmp_path / "edited")):
        assert rows[name]["2 shots"] == mean(accuracies(runs / run, "clip-adapter", 2))


@pytest.mark.parametrize("width", [-3, 0, 1])
def test_a_terminal_of_no_width_is_none(printed: Report, width: int):
    assert "zero-shot" in printed("low", width=width)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_it_folds_to_the_width_of_the_terminal(printed: Report, width: int):
    text = printed("low", "high", "other", width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert text == re.sub(" +$", "", text, flags=re.MULTILINE), "no line ends in blanks"
    wide = re.findall(r"\d+\.\d\d(?= ±)", printed("low", "high", "other"))
    assert sorted(re.findall(r"\d+\.\d\d(?= ±)", text)) == sorted(wide)


def test_csv_has_a_row_for_each_cell(runs: Path, printed: Report):
    found = rows_of(printed("low", "high", form="csv"))
    assert [row["factor"] for row in found] == [""] * 4 * 2 + ["against"] * 6 * 2
    row = next(r for r in found if (r["entry"], r["shots"]) == ("clip-adapter alpha 0.8", "4"))
    own = accuracies(runs / "high", "clip-adapter", 4)
    assert float(row["mean"]) == pytest.approx(statistics.mean(own))
    assert float(row["std"]) == pytest.approx(statistics.stdev(own))
    assert (row["seeds"], row["kind"], row["test_images"]) == ("1 2", "all", "60")


@pytest.fixture
def odd(runs: Path, tmp_path: Path) -> Path:
    """A run whose folder, data set and numbers make a column of an awkward name."""
    run = changed(runs / "low", tmp_path / "50% & a_b|<b>", 0.0)
    shutil.copytree(runs / "low", tmp_path / "plain")
    document = json.loads((run / "provenance.json").read_text())
    document["dataset"]["name"] = r"a $\input{x}$ ~ *set* <script>"
    (tmp_path / "plain" / "provenance.json").write_text(json.dumps(document))
    return tmp_path


def test_markdown_says_names_as_they_are(odd: Path, printed: Report):
    text = printed(odd / "plain", odd / "50% & a_b|<b>", form="md")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert r"(50% &amp; a\_b\|&lt;b&gt;) |" in text
    assert r"a \$\\input\{x\}\$ \~ \*set\* &lt;script&gt;:" in text
    assert lines[:2] == ["| method | 2 shots | 4 shots |", "| --- | ---: | ---: |"]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:6]} == {4}
    assert f"| {mean(accuracies(odd / 'plain', 'linear-probe', 2))} ± " in lines[3]


def test_latex_says_names_as_they_are(odd: Path, printed: Report):
    text = printed(odd / "plain", odd / "50% & a_b|<b>", form="tex")
    assert r"(50\% \& a\_b|\textless{}b\textgreater{})" in text
    assert r"a \$\textbackslash{}input\{x\}\$ \textasciitilde{} *set*" in text
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {2}
    assert len(rows) == 1 + 4
    own = accuracies(odd / "plain", "linear-probe", 4)
    assert rf"{mean(own)} $\pm$ {100 * statistics.stdev(own):.2f}" in text


def test_a_name_commands_no_terminal(odd: Path, printed: Report):
    document = json.loads((odd / "plain" / "provenance.json").read_text())
    document["dataset"]["name"] = "\x1b[31mred\nline"
    (odd / "plain" / "provenance.json").write_text(json.dumps(document))
    for form in ("text", "md", "tex", "csv"):
        text = printed(odd / "plain", form=form)
        assert "\x1b" not in text
        assert form == "csv" or "x1b" in text


def refused(*paths: Path) -> str:
    with pytest.raises(UserError) as caught:
        report(ReportConfig(paths))
    return str(caught.value)


def test_runs_that_cannot_be_compared(runs: Path, tmp_path: Path):
    assert "Name at least one run folder" in refused()
    assert "different caches" in refused(runs / "low", runs / "foreign")
    assert f"{tmp_path} holds no run" in refused(tmp_path)


def test_a_run_that_has_not_finished(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "low", tmp_path / "run")
    selected = tmp_path / "run" / "selected.jsonl"
    lines = selected.read_text().splitlines(keepends=True)
    for kept, words in (
        ("".join(lines[:-2]), "2 fits of 12 to go; go on with: fit --resume"),
        ("".join(lines)[:-5], "1 fit of 12 to go"),
        (None, "12 fits of 12 to go"),
    ):
        selected.unlink() if kept is None else selected.write_text(kept)
        assert words in refused(tmp_path / "run")


def test_a_run_folder_with_damaged_parts(runs: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(runs / "low", run)
    selected = (run / "selected.jsonl").read_text()
    for damage in (
        *("{\n", "[1]\n", '{"shots": 2}\n', selected + selected.splitlines()[0] + "\n"),
        selected.replace('"zero-shot"', '"nobody"', 1),
        selected.replace('"alpha": 0.2', '"alpha": 7', 1),
    ):
        (run / "selected.jsonl").write_text(damage)
        assert re.search(r"selected\.jsonl (cannot be read|is damaged); fit it again", refused(run))
    (run / "selected.jsonl").write_text(selected)
    whole = json.loads((run / "provenance.json").read_text())
    other = json.dumps(whole | {"cache_sha256": "0" * 64})
    for damage in ("[]", '{"about": 3}', "{", json.dumps(whole | {"backbone": 3}), other):
        (run / "provenance.json").write_text(damage)
        assert re.search(r"provenance\.json (cannot be read|is of another cache)", refused(run))
    plan = json.loads((run / "run.json").read_text())
    for difference in ({"seeds": 5}, {"select": "some"}, {"clip_adapter": "9"}):
        (run / "run.json").write_text(json.dumps(plan | difference))
        assert "run.json cannot be used" in refused(run)


def test_a_run_in_which_every_setting_diverged(runs: Path, tmp_path: Path, printed: Report):
    stated = {"cache": runs / "features.h5", "shots": 2, "baselines": ()}
    fit(FitConfig(out=tmp_path / "lost", hyper=short(alpha=0.2, learning_rate=1e30), **stated))
    assert table(printed(tmp_path / "lost")) == {"clip-adapter": {"2 shots": "–"}}
    report(ReportConfig((tmp_path / "lost",)))
    assert "There is no test accuracy." in (tmp_path / "lost" / "report.html").read_text()


def test_three_contradicting_runs_of_one_folder_name_are_told_apart(runs: Path, tmp_path: Path):
    copies = [changed(runs / "low", tmp_path / str(n) / "run", n / 16) for n in (1, 2, 3)]
    labels = [
        entry.label for entry in pool(load_runs(copies)) if entry.method.name == "clip-adapter"
    ]
    assert len(labels) == len(set(labels)) == 3
    assert labels[-1] == "clip-adapter (run) #2"
