"""An interrupted run goes on where it stopped and ends as if nothing had happened."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clip_adapter.cache.errors import UserError
from clip_adapter.pipelines.fit import FitConfig, FitResult, fit
from clip_adapter.pipelines.run_folder import RunFolder, StateFolder
from tests.pipelines.run_files import adapters, choices, results, selected
from tests.pipelines.tiny_cache import FIT, tiny_data, write_cache

DATA = tiny_data()
# 9 settings on 2 tasks; under halving 9, 3 and 1 of them. Long enough to be killed on the way.
ARGUMENTS = "--alpha 0.2 0.5 0.8 --lr 0.001 0.003 0.01 --shots 4 --seeds 1 2"
EPOCHS = ["--epochs", "900", "--evaluate-every", "90"]
BASELINES = {"full": ("zero-shot", "linear-probe"), "halving": ("zero-shot",)}
FITS = {"full": 9, "halving": 9 + 3 + 1}


def arguments(search: str) -> list[str]:
    return [
        *(*ARGUMENTS.split(), *EPOCHS, "--search", search, "--out", "run"),
        *("--baselines", *BASELINES[search]),
    ]


def config(folder: Path, search: str, **values: object) -> FitConfig:
    """The same arguments for the function."""
    stated: dict = {
        "cache": Path("features.h5"),
        "out": folder / "run",
        "alpha": (0.2, 0.5, 0.8),
        "lr": (0.001, 0.003, 0.01),
        "shots": (4,),
        "seeds": (1, 2),
        "epochs": 900,
        "evaluate_every": 90,
        "search": search,
        "baselines": BASELINES[search],
    }
    return FitConfig(**stated | values)


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


def assert_same_end(run: Path, whole: Path) -> None:
    assert (run / "summary.csv").read_bytes() == (whole / "summary.csv").read_bytes()
    assert sorted(map(str, results(run))) == sorted(map(str, results(whole)))
    assert len({str(row) for row in results(run)}) == len(results(run)), "a fit was repeated"
    assert selected(run) == selected(whole)
    assert adapters(run) == adapters(whole)
    assert (run / "tasks.json").read_bytes() == (whole / "tasks.json").read_bytes()
    assert not (run / "halving").exists()


def rows(run: Path) -> int:
    path = run / "results.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stopped(folder: Path, signal_number: int, after: int, *stated: str) -> tuple[int, str]:
    """Start `fit`, send it a signal when results.csv has so many lines: exit code, stderr."""
    process = subprocess.Popen(
        [FIT, *stated], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while rows(folder / "run") < after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


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


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("search", ["full", "halving"])
def test_it_may_end_after_any_fit(
    folder: Path, whole: Callable[[str], Path], search: str, monkeypatch: pytest.MonkeyPatch
):
    """Ended again and again, a few fits further each time; each fit is begun by one of them."""
    whole(search)  # made before fits begin to end early
    add = RunFolder.add_result
    steps = 0

    def add_some(self: RunFolder, row: dict) -> None:
        nonlocal steps
        if steps == 5:
            raise Killed
        steps += 1
        add(self, row)

    monkeypatch.setattr(RunFolder, "add_result", add_some)
    ended = 0
    result: FitResult | None = None
    while result is None:
        steps = 0
        going_on = FitConfig(resume=folder / "run")
        try:
            result = fit(going_on if ended else config(folder, search))
        except Killed:
            ended += 1
    assert ended == (len(results(whole(search))) - 1) // 5
    assert_same_end(folder / "run", whole(search))


def test_over_folds_survivors_go_on_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Halving under cross-validation keeps a state for each fold."""
    stated = {"select": "cv", "seeds": (1,), "baselines": (), "epochs": 10, "evaluate_every": 1}
    expected = fit(config(folder, "halving", **stated, out=folder / "whole")).run
    add = RunFolder.add_result
    kept = 0

    def add_some(self: RunFolder, row: dict) -> None:
        nonlocal kept
        if kept == 10:
            raise Killed
        kept += 1
        add(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add_result", add_some)
        with pytest.raises(Killed):
            fit(config(folder, "halving", **stated))
    assert any((folder / "run" / "halving").rglob("*fold-3*"))
    fit(FitConfig(resume=folder / "run"))
    assert_same_end(folder / "run", expected)


def test_a_damaged_state_is_one_sentence(tmp_path: Path):
    states = StateFolder(tmp_path / "halving")
    states["rung-0"] = [np.arange(3.0), np.array(7)]
    assert [leaf.tolist() for leaf in states["rung-0"]] == [[0.0, 1.0, 2.0], 7]
    (path,) = (tmp_path / "halving").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        states["rung-0"]


def test_a_finished_run_is_shown_again(
    folder: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(whole("full"), folder / "run")
    stated = (folder / "run" / "run.json").read_text()
    cache = whole("full").parent / "features.h5"
    assert str(cache) in stated
    capsys.readouterr()
    first = fit(FitConfig(resume=folder / "run"))
    once = capsys.readouterr().out
    second = fit(FitConfig(resume=folder / "run"))
    assert capsys.readouterr().out == once
    assert first.summary == second.summary
    assert "0 programs compiled or loaded" in once
    for line in first.summary:
        assert f"{100 * line['test_accuracy_mean']:.2f}" in once
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


def test_other_arguments_are_refused(folder: Path, whole: Callable[[str], Path]):
    shutil.copytree(whole("full"), folder / "run")
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    for other in ({"lr": (0.5,)}, {"seeds": (1, 2, 3)}):
        with pytest.raises(UserError, match="other arguments"):
            fit(FitConfig(resume=folder / "run", **other))
    assert all(path.read_bytes() == content for path, content in before.items())
    same = FitConfig(resume=folder / "run", alpha=(0.2, 0.5, 0.8), seeds=(1, 2))
    assert choices(fit(same).run) == choices(whole("full"))


def test_the_cache_may_have_moved(folder: Path, monkeypatch: pytest.MonkeyPatch):
    stated = {"epochs": 10, "evaluate_every": 1, "baselines": (), "seeds": (1,)}
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


def test_another_cache_content_is_refused(folder: Path):
    stated = {"epochs": 10, "evaluate_every": 1, "baselines": (), "seeds": (1,)}
    fit(config(folder, "full", **stated))
    (folder / "features.h5").unlink()
    write_cache(folder / "features.h5", DATA.shuffled_labels("test"))
    with pytest.raises(UserError, match="no longer the cache that"):
        fit(FitConfig(resume=folder / "run"))


def test_a_run_is_written_by_one_process_at_a_time(folder: Path, whole: Callable[[str], Path]):
    """What the first one wrote stays as it is, and the second one can go on when it has ended."""
    process = subprocess.Popen([FIT, *arguments("full")], cwd=folder, stdout=subprocess.DEVNULL)
    while rows(folder / "run") < 5:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="Another process is writing to"):
        fit(FitConfig(resume=folder / "run"))
    with pytest.raises(UserError, match="Another process is writing to"):
        fit(config(folder, "full"))
    process.kill()
    process.wait()
    fit(FitConfig(resume=folder / "run"))
    assert_same_end(folder / "run", whole("full"))


def test_a_run_that_is_not_there_cannot_go_on(folder: Path):
    with pytest.raises(UserError, match="holds no run"):
        fit(FitConfig(resume=folder / "nowhere"))
    assert not (folder / "nowhere").exists()
