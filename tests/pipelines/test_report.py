"""`clip-adapter report`: several runs in one table."""

import csv
import json
from pathlib import Path

import pytest

from clip_adapter.cache.errors import UserError
from clip_adapter.pipelines.fit import FitConfig, fit
from clip_adapter.pipelines.report import ReportConfig, report
from tests.pipelines.tiny_cache import tiny_data, write_cache

DATA = tiny_data()
SHORT: dict = {"epochs": 5, "evaluate_every": 5, "lr": (0.01,), "shots": (2, 4), "seeds": (1, 2)}
BOTH = ("zero-shot", "linear-probe")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `low`, `high` (another α), `other` (another seed and rule) and `foreign` (a cache)."""
    folder = tmp_path_factory.mktemp("runs")
    stated = SHORT | {"cache": write_cache(folder / "features.h5", DATA)}
    fit(FitConfig(out=folder / "low", alpha=(0.2,), baselines=BOTH, **stated))
    fit(FitConfig(out=folder / "high", alpha=(0.8,), baselines=BOTH, **stated))
    other = stated | {"seeds": (3,), "select": "full-val"}
    fit(FitConfig(out=folder / "other", alpha=(0.2,), baselines=BOTH, **other))
    foreign = write_cache(folder / "foreign.h5", DATA.shuffled_labels("test"))
    fit(FitConfig(out=folder / "foreign", alpha=(0.2,), **stated | {"cache": foreign}))
    return folder


def table(printed: str) -> tuple[list[str], dict[str, list[str]]]:
    """Everything above the rule as words, and the cells of each row below it."""
    above, _, below = printed.partition("───")
    rows = [line.split() for line in below.splitlines() if "±" in line or "–" in line]
    cells = {row[0]: [cell for cell in row[1:] if cell.replace(".", "").isdigit()] for row in rows}
    return above.split(), cells


def means(run: Path, method: str) -> dict[str, str]:
    with (run / "summary.csv").open(newline="") as file:
        return {
            row["shots"]: f"{100 * float(row['test_accuracy_mean']):.2f}"
            for row in csv.DictReader(file)
            if row["method"] == method
        }


def test_a_column_per_run_and_a_common_baseline_once(runs: Path, capsys):
    report(ReportConfig((runs / "low", runs / "high")))
    heading, cells = table(capsys.readouterr().out)
    names = ("zero-shot", "linear-probe", "clip-adapter")
    assert [heading.count(name) for name in names] == [1, 1, 2]
    assert " ".join(heading).endswith("alpha 0.2 alpha 0.8")
    expected = [
        means(runs / "low", "zero-shot"),
        means(runs / "low", "linear-probe"),
        means(runs / "low", "clip-adapter"),
        means(runs / "high", "clip-adapter"),
    ]
    for shots in ("2", "4"):
        assert cells[shots][::2] == [column[shots] for column in expected]


def test_it_says_what_the_numbers_rest_on(runs: Path, capsys):
    report(ReportConfig((runs / "low",)))
    printed = capsys.readouterr().out
    assert "tiny-clip (nothing) on tiny: 4 classes, 60 test images" in printed
    assert "test split: made up" in printed
    assert "seeds 1, 2\n" in printed
    assert "selected on min(shots, 4) validation images per class" in printed


def test_baselines_judged_otherwise_stand_apart(runs: Path, capsys):
    report(ReportConfig((runs / "low", runs / "other")))
    printed = capsys.readouterr().out
    assert "seeds 1, 2\n" not in printed
    heading, _ = table(printed)
    assert heading.count("zero-shot") == heading.count("linear-probe") == 2


def test_runs_on_half_of_the_classes_say_so(runs: Path, tmp_path: Path, capsys):
    stated = SHORT | {"cache": runs / "features.h5", "train_classes": "base", "alpha": (0.2,)}
    fit(FitConfig(out=tmp_path / "base", baselines=("zero-shot",), **stated))
    capsys.readouterr()
    report(ReportConfig((tmp_path / "base",)))
    heading, _ = table(capsys.readouterr().out)
    for method in ("zero-shot", "clip-adapter"):
        assert heading.count(method) == 3
    assert [heading.count(kind) for kind in ("base", "new", "H")] == [2, 2, 2]


def test_no_column_hides_another(runs: Path, tmp_path: Path, capsys):
    """The adapter as a baseline differs by α, and the same arguments twice by their folder."""
    stated = SHORT | {"cache": runs / "features.h5", "method": "linear-probe"}
    for alpha in (0.2, 0.8):
        out = tmp_path / f"{alpha}"
        fit(FitConfig(out=out, alpha=(alpha,), baselines=("clip-adapter",), **stated))
    (tmp_path / "edited").mkdir()
    for path in (tmp_path / "0.2").glob("*.*"):
        (tmp_path / "edited" / path.name).write_bytes(path.read_bytes())
    summary = (tmp_path / "0.2" / "summary.csv").read_text()
    mean = means(tmp_path / "0.2", "clip-adapter")["2"]
    changed = summary.replace(f"{float(mean) / 100:.2}", "0.1")
    (tmp_path / "edited" / "summary.csv").write_text(changed)
    capsys.readouterr()
    report(ReportConfig((tmp_path / "0.2", tmp_path / "0.8")))
    heading, _ = table(capsys.readouterr().out)
    assert heading.count("linear-probe") == 1
    assert " ".join(heading).endswith("alpha 0.2 alpha 0.8")
    report(ReportConfig((tmp_path / "0.2", tmp_path / "edited")))
    heading, cells = table(capsys.readouterr().out)
    assert "(edited)" in heading
    assert mean in cells["2"]


def test_runs_that_cannot_be_compared(runs: Path, tmp_path: Path):
    def refused(*paths: Path) -> str:
        with pytest.raises(UserError) as caught:
            report(ReportConfig(paths))
        return str(caught.value)

    assert "Name at least one run folder" in refused()
    assert "different caches" in refused(runs / "low", runs / "foreign")
    assert f"{tmp_path} holds no run" in refused(tmp_path)
    (tmp_path / "run.json").write_bytes((runs / "low" / "run.json").read_bytes())
    assert "has not finished; go on with: fit --resume" in refused(tmp_path)
    summary = (runs / "low" / "summary.csv").read_text()
    for damage in (
        *("", "a\n1\n", "method,shots,test_accuracy_mean\nzero-shot,2,many\n"),
        summary.rstrip("\n") + ",one cell more\n",
        summary[: summary.rindex(",")] + "\n",
        summary.replace("zero-shot", "z" * 200_000, 1),
        summary.replace("diverged", "lost"),
        summary.replace(",0,", ",x,"),
    ):
        (tmp_path / "summary.csv").write_text(damage)
        assert "summary.csv cannot be read" in refused(tmp_path), damage


def test_a_run_folder_with_parts_missing_or_of_another_version(runs: Path, tmp_path: Path):
    for path in (runs / "low").glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for damage in ("{\n", "[1]\n", '{"shots": 2}\n', None):
        selected = tmp_path / "selected.jsonl"
        selected.unlink() if damage is None else selected.write_text(damage)
        with pytest.raises(UserError, match=r"selected\.jsonl cannot be read"):
            report(ReportConfig((tmp_path,)))
    (tmp_path / "selected.jsonl").write_bytes((runs / "low" / "selected.jsonl").read_bytes())
    for damage in ("[]", '{"about": 3}', "{"):
        (tmp_path / "provenance.json").write_text(damage)
        with pytest.raises(UserError, match=r"no readable provenance\.json"):
            report(ReportConfig((tmp_path,)))
    stated = json.loads((tmp_path / "run.json").read_text())
    for difference in ({"seeds": 5}, {"select": "some"}, {"train_classes": "some"}):
        (tmp_path / "run.json").write_text(json.dumps(stated | difference))
        with pytest.raises(UserError, match=r"run\.json is not of this version of fit"):
            report(ReportConfig((tmp_path,)))
    (tmp_path / "run.json").write_text('{"seeds": [1]}')
    with pytest.raises(UserError, match=r"run\.json is not of this version of fit"):
        report(ReportConfig((tmp_path,)))


def test_a_run_in_which_every_setting_diverged(runs: Path, tmp_path: Path, capsys):
    stated = SHORT | {"cache": runs / "features.h5", "lr": (1e30,)}
    with pytest.raises(UserError, match="diverged"):
        fit(FitConfig(out=tmp_path / "lost", alpha=(0.2, 0.8), baselines=(), **stated))
    capsys.readouterr()
    report(ReportConfig((tmp_path / "lost",)))
    _, cells = table(capsys.readouterr().out)
    assert cells == {"2": [], "4": []}
