"""An interrupted run goes on where it stopped and ends as if nothing had happened."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clip_adapter.adapters.registry import METHODS
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.fit import fit, main
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.record import TaskRecord
from tests import processes
from tests.pipelines.run_files import Killed, assert_same_end, choices, files, killed_after, results
from tests.pipelines.tiny_cache import short, tiny_data, write_cache

pytestmark = pytest.mark.usefixtures("pictures_drawn_once")
DATA = tiny_data()
# 9 settings on 2 tasks; under halving 9, 3 and 1 of them. Long enough to be killed on the way.
ARGUMENTS = "--alpha 0.2 0.5 0.8 --lr 0.001 0.003 0.01 --shots 4 --seeds 1 2 --epochs 4000"
GRID = {"alpha": (0.2, 0.5, 0.8), "learning_rate": (0.001, 0.003, 0.01)}
BASELINES = {"full": ("zero-shot", "linear-probe"), "halving": ("zero-shot",)}
FITS = {"full": 9, "halving": 9 + 3 + 1}


def arguments(search: str) -> list[str]:
    baselines = ["--baselines", *BASELINES[search]]
    return [*ARGUMENTS.split(), "--search", search, "--out", "run", *baselines]


def config(folder: Path, search: str, **values: Any) -> FitConfig:
    """The same arguments for the function."""
    stated = {"epochs": 4000, "seeds": (1, 2), "search": search, "baselines": BASELINES[search]}
    cache, out = values.pop("cache", Path("features.h5")), values.pop("out", folder / "run")
    return short(cache, out, **GRID | stated | values)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_cache(tmp_path / "features.h5", DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of a search that nothing interrupted."""
    runs: dict[str, Path] = {}

    def run(search: str) -> Path:
        if search not in runs:
            folder = tmp_path_factory.mktemp(search)
            write_cache(folder / "features.h5", DATA)
            runs[search] = fit(config(folder, search, cache=folder / "features.h5")).run
        return runs[search]

    return run


def rows(run: Path) -> int:
    path = run / "results.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stopped(folder: Path, signal_number: int, after: int, *stated: str) -> tuple[int, str]:
    """Start `fit`, send it a signal when results.csv has so many lines: exit code, stderr."""
    process = processes.start(["fit", *stated], folder, err=folder / "errors")
    deadline = time.monotonic() + 100
    while rows(folder / "run") < after and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid or 0, signal_number)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode, (folder / "errors").read_text()


@pytest.mark.parametrize("search", ["full", "halving"])
def test_a_run_killed_and_interrupted_ends_as_if_nothing_had_happened(
    folder: Path, whole: Callable[[str], Path], search: str
):
    probes = sum(row["method"] == "linear-probe" for row in results(whole(search))) // 2
    task = 1 + probes + FITS[search]
    # Killed early in the first grid or rung; gone on with, and stopped in the second grid or rung.
    second = task + 1 + probes + {"full": 4, "halving": 10}[search]
    code, errors = stopped(folder, signal.SIGKILL, 1 + 1 + probes + 3, *arguments(search))
    assert code == -signal.SIGKILL, errors
    code, errors = stopped(folder, signal.SIGINT, 1 + second, "--resume", "run")
    assert code == 130
    assert "go on with: fit --resume run" in errors
    assert "Traceback" not in errors
    assert second <= rows(folder / "run") - 1 < 2 * task, "stopped too late"
    assert not (folder / "run" / "summary.csv").exists()
    fit(FitConfig(resume=folder / "run"))
    assert_same_end(folder / "run", whole(search))


@pytest.mark.parametrize("search", ["full", "halving"])
def test_it_may_end_after_any_fit(folder: Path, whole: Callable[[str], Path], search: str):
    """Ended again and again, a few fits further each time; each fit is begun by one of them."""
    fits = len(results(whole(search)))
    for ended in range(-(-fits // 5) - 1):
        with killed_after(5):
            fit(FitConfig(resume=folder / "run") if ended else config(folder, search))
    fit(FitConfig(resume=folder / "run"))
    assert_same_end(folder / "run", whole(search))


def test_over_folds_survivors_go_on_too(folder: Path):
    """Halving under cross-validation keeps a state for each fold."""
    stated = {"select": "cv", "seeds": (1,), "baselines": (), "epochs": 10}
    expected = fit(config(folder, "halving", **stated, out=folder / "whole")).run
    with killed_after(10):
        fit(config(folder, "halving", **stated))
    assert any((folder / "run" / "halving").rglob("*fold-3*"))
    fit(FitConfig(resume=folder / "run"))
    assert_same_end(folder / "run", expected)


def test_a_grid_is_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What is tried after training is kept when its task is finished; before that it has no rows
    to go on from."""

    def asked(out: Path) -> FitConfig:
        values = {"tip-adapter-f.alpha": (1.0, 2.0), "tip-adapter-f.beta": (1.0, 5.0)}
        values |= {"epochs": 10, "learning_rate": (0.001, 0.01)}
        stated = {"method": ("tip-adapter-f",), "baselines": ("gda",), "search": "halving"}
        return FitConfig(folder / "features.h5", out, shots=(4,), hyper=values, **stated)

    def killed(record: TaskRecord) -> None:
        raise Killed

    expected = fit(asked(folder / "whole")).run
    grids = {path.parent.name for path in (expected / "grids").rglob("*.safetensors")}
    assert grids == {"gda", "tip-adapter-f"} and results(expected) == []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TaskRecord, "finish", killed)
        fit(asked(folder / "run"))
    fit(FitConfig(resume=folder / "run"))
    assert_same_end(folder / "run", expected)


def test_a_finished_run_is_shown_again(
    folder: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(whole("full"), folder / "run")
    cache = whole("full").parent / "features.h5"
    assert str(cache) in (folder / "run" / "run.json").read_text()
    printed = []
    for _ in range(2):
        result = fit(FitConfig(resume=folder / "run"))
        print_run(result, verbose=True)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "0 programs compiled or loaded" in printed[0]
    for line in result.summary:
        assert line.test_accuracy and f"{100 * line.test_accuracy.mean:.2f}" in printed[0]
    assert_same_end(folder / "run", whole("full"))


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_torn_last_line_is_fitted_again(folder: Path, whole: Callable[[str], Path], cut: int):
    shutil.copytree(whole("full"), folder / "run")
    (folder / "run" / "summary.csv").unlink()
    path = folder / "run" / "selected.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-cut])
    path = folder / "run" / "results.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    fit(FitConfig(resume=folder / "run"))
    assert_same_end(folder / "run", whole("full"))


@pytest.mark.parametrize(
    "line",
    [
        "--shots 16",  # the default, said all the same
        "--alpha 0.5",
        "--out other",
        "--seeds 1 2",  # as it was begun, too
        "--method linear-probe",
        "--select cv --repeat",
    ],
)
def test_a_run_is_not_described_again(
    folder: Path, whole: Callable[[str], Path], line: str, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(whole("full"), folder / "run")
    before = files(folder / "run")
    with pytest.raises(SystemExit) as ended:
        main(["--resume", "run", *line.split()])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.match(r"fit: --resume takes no --\w+: a run goes on as it was begun. .*\n$", said)
    assert files(folder / "run") == before


def test_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Its defaults and its training may be others."""
    run = fit(short(folder / "features.h5", folder / "run", alpha=0.5, epochs=1)).run
    before = files(run)
    monkeypatch.setattr("clip_adapter.pipelines.fitting.plan.VERSION", "99.0")
    with pytest.raises(UserError, match=r"it was made by clip-adapter 0\.[0-9.]+; start a new run"):
        fit(FitConfig(resume=run))
    assert files(run) == before


def test_a_changed_default_changes_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The plan holds every value; what a table says now counts for new runs only."""
    stated = {"alpha": 0.5, "seeds": (1, 2)}
    expected = fit(short(folder / "features.h5", folder / "whole", **stated)).run
    method = METHODS["clip-adapter"]
    table = dict(method.hyper)

    with killed_after(0, "add_result"):
        fit(short(folder / "features.h5", folder / "run", **stated))
    for name, default in (("weight_decay", 7.0), ("reduction", 2), ("optimizer", "sgd")):
        monkeypatch.setitem(table, name, replace(table[name], default=default))
    monkeypatch.setitem(METHODS, "clip-adapter", replace(method, hyper=table))
    fit(FitConfig(resume=folder / "run"))
    assert_same_end(folder / "run", expected)
    new = fit(short(folder / "features.h5", folder / "new", **stated)).run
    assert choices(new) != choices(expected), "otherwise this test would show nothing"


def test_the_cache_may_have_moved(folder: Path, monkeypatch: pytest.MonkeyPatch):
    stated = {"epochs": 10, "baselines": (), "seeds": (1,)}
    first = fit(config(folder, "full", **stated))
    (folder / "run" / "summary.csv").unlink()
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (folder / "features.h5").rename(elsewhere / "moved.h5")
    monkeypatch.chdir(elsewhere)
    second = fit(FitConfig(resume=folder / "run", cache=Path("moved.h5")))
    assert second.summary == first.summary
    with pytest.raises(UserError, match=r"no feature cache at features\.h5"):
        fit(FitConfig(resume=folder / "run"))


@pytest.mark.parametrize("named", [False, True])
def test_another_cache_is_refused(folder: Path, named: bool):
    """In the place of the first one or elsewhere, also where it is named as the default is."""
    run = fit(short(folder / "features.h5", folder / "run", alpha=0.5, epochs=1)).run
    (folder / "features.h5").rename(folder / "first.h5")
    write_cache(folder / "features.h5", DATA.shuffled_labels("test"))
    with pytest.raises(UserError, match=r"features\.h5 is not the cache that .*run was started on"):
        fit(FitConfig(resume=run, cache=Path("features.h5") if named else None))
    assert fit(FitConfig(resume=run, cache=Path("first.h5"))).kept


def test_a_run_is_written_by_one_process_at_a_time(folder: Path, whole: Callable[[str], Path]):
    """What the first one wrote stays as it is, and the second one can go on when it has ended."""
    process = processes.start(["fit", *arguments("full")], folder)
    while rows(folder / "run") < 5:
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid or 0, signal.SIGSTOP)
    with pytest.raises(UserError, match="Another process is writing to"):
        fit(FitConfig(resume=folder / "run"))
    with pytest.raises(UserError, match="Another process is writing to"):
        fit(config(folder, "full"))
    process.kill()
    process.join()
    fit(FitConfig(resume=folder / "run"))
    assert_same_end(folder / "run", whole("full"))


def test_a_run_that_is_not_there_cannot_go_on(folder: Path):
    with pytest.raises(UserError, match="holds no run"):
        fit(FitConfig(resume=folder / "nowhere"))
    assert not (folder / "nowhere").exists()
