"""Run folders that were damaged: what can be found again is, for the rest there is a sentence."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.commands.report import ReportConfig, report
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.predictions import predictions_path, read_predictions
from clip_adapter.pipelines.fitting.record import StateFolder
from tests.pipelines.run_files import assert_same_end, files, killed_after
from tests.pipelines.tiny_cache import short, tiny_data, write_cache

pytestmark = pytest.mark.usefixtures("pictures_drawn_once")
DATA = tiny_data()
GRID = {"alpha": (0.2, 0.5, 0.8), "learning_rate": (0.001, 0.003, 0.01)}
TOP = ("run.json", "provenance.json", "tasks.json", "results.csv", "selected.jsonl", "summary.csv")
CUT = "the cell is missing"
DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA)


def resume(run: Path) -> str:
    """Go on and show it; what is refused, or cannot be done, is returned."""
    try:
        result = fit(FitConfig(resume=run))
    except UserError as refused:
        said = str(refused)
    else:
        print_run(result)
        said = result.problem
    assert "\n" not in said and len(said) < 600 and (said == "" or said.endswith("."))
    return said


def stopped(cache: Path, run: Path, after: int) -> Path:
    """A run of two methods under halving, ended after so many fits."""
    with killed_after(after):
        fit(config(cache, run))
    return run


def config(cache: Path, run: Path) -> FitConfig:
    return short(
        cache, run, search="halving", baselines="linear-probe", hyper=GRID | {"epochs": 30}
    )


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(config(cache, tmp_path_factory.mktemp("whole") / "run")).run


def flip(content: bytes) -> bytes:
    """One bit of a byte in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


HARM: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "cut": lambda content: content[: len(content) // 2],
    "flipped": flip,
    "foreign": lambda content: b'{"method": "clip-adapter"}\n',
    "deep": lambda content: DEEP + b"\n",
}


def harmed(run: Path, copy: Path, name: str, harm: str) -> tuple[Path, bytes | None]:
    """A copy of a run with one damaged file, and what that holds."""
    shutil.copytree(run, copy)
    content = HARM[harm]((copy / name).read_bytes())
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    return copy, content


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", TOP)
def test_a_damaged_file(whole: Path, tmp_path: Path, name: str, harm: str):
    """Of a finished run. What follows from the plan and the cache is there again; where what was
    selected is damaged there is a sentence, and the file stays as it was for whoever looks. (The
    fuzz door `runs` damages every file in every way.)"""
    run, content = harmed(whole, tmp_path / "run", name, harm)
    said = resume(run)
    if name == "run.json":
        assert "run.json" in said and ("start a new run" in said or harm == "missing")
    elif name == "selected.jsonl" and said:
        assert said == f"{run / name} cannot be read; fit it again."
        assert (run / name).read_bytes() == content
    else:
        assert said == ""
        for own in ("adapter.json", "summary.csv"):
            assert (run / own).read_bytes() == (whole / own).read_bytes()


@pytest.mark.parametrize("name", TOP)
@pytest.mark.parametrize("kind", ["folder", "dead link"])
def test_something_else_in_its_place(whole: Path, tmp_path: Path, name: str, kind: str):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / name).unlink()
    if kind == "folder":
        (run / name).mkdir()
    else:
        (run / name).symlink_to("nowhere")
    said = resume(run)
    if kind == "folder":
        assert name in said or str(run) in said
    elif name != "run.json":
        assert (run / name).is_file(), "written anew"


@pytest.mark.parametrize("harm", ["missing", "cut", "flipped", "foreign"])
@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_damaged_adapter_is_not_passed_on(whole: Path, tmp_path: Path, name: str, harm: str):
    """The numbers are shown all the same; the top of the folder holds no damaged copy."""
    task = "adapters/clip-adapter/shots-4-seed-1"
    run, _ = harmed(whole, tmp_path / "run", f"{task}/{name}", harm)
    (run / name).unlink()
    result = fit(FitConfig(resume=run))
    assert task in result.problem
    assert [row.method for row in result.results] == ["linear-probe", "clip-adapter"]
    assert not (run / name).exists()


@pytest.mark.parametrize("harm", HARM)
def test_damaged_predictions_are_one_sentence(whole: Path, tmp_path: Path, harm: str):
    key = ("clip-adapter", 4, 1)
    sound = read_predictions(whole, *key)
    run, _ = harmed(whole, tmp_path / "run", predictions_path(*key), harm)
    if harm == "flipped":  # a file of other predictions has no way to say so
        found = read_predictions(run, *key)
        assert found.labels.shape == sound.labels.shape
        return
    with pytest.raises(UserError, match=r"shots-4-seed-1\.safetensors cannot be read"):
        read_predictions(run, *key)


def test_rows_with_nonsense_are_fitted_again(cache: Path, whole: Path, tmp_path: Path):
    """Numbers out of range, other bits than the accuracy says, fields too many or too few."""
    rng = random.Random(0)
    base = stopped(cache, tmp_path / "base", 20)
    lines = (base / "results.csv").read_text().splitlines()
    fitted = [line for line in lines if line.startswith("clip-adapter")]
    assert len(fitted) >= 5
    # fields from the end: epochs_run best_epoch val_accuracy val_nll status seconds images
    nonsense = {
        -1: ["", CUT, "16:zz:", "1600000:ff00:", "16:0000:AAAA", "16:0000"],
        -2: ["", "soon"],
        -3: ["", "failed", "fine"],
        -4: ["", "nan", "much", "inf"],
        -5: ["", "7", "-1", "nan", "0.123"],
        -6: ["", "-1", "99", "1.5"],
        -7: ["", "0", "-3", "x"],
    }
    for position, values in nonsense.items():
        run = Path(shutil.copytree(base, tmp_path / f"run{position}"))
        victims = dict(zip(rng.sample(fitted, min(len(values), len(fitted))), values, strict=False))
        damaged = []
        for line in lines:
            fields = line.split(",")
            if line in victims:
                fields[position] = victims[line]
                fields = fields[:position] if victims[line] == CUT else fields
            damaged.append(",".join(fields))
        (run / "results.csv").write_text("\n".join(damaged) + "\n")
        assert resume(run) == "", position
        assert_same_end(run, whole)
        shutil.rmtree(run)


def states(run: Path) -> list[Path]:
    return sorted(path for path in (run / "halving").rglob("*") if path.is_file())


def exchanged(run: Path) -> None:
    """A state in the place of another."""
    first, second, *_ = states(run)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def each(harm: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        for path in states(run):
            content = harm(path.read_bytes())
            path.unlink()
            if content is not None:
                path.write_bytes(content)

    return apply


def piped(run: Path) -> None:
    for path in states(run):
        path.unlink()
        os.mkfifo(path)


LOST: dict[str, Callable[[Path], None]] = {
    "the folder": lambda run: shutil.rmtree(run / "halving"),
    "pipes": piped,
    **{name: each(HARM[name]) for name in ("missing", "cut", "flipped", "foreign")},
    "noise": each(lambda content: content[:2000] + random.Random(1).randbytes(len(content) - 2000)),
}


@pytest.mark.parametrize("lost", LOST)
def test_lost_states_are_trained_again(cache: Path, whole: Path, tmp_path: Path, lost: str):
    """And the run ends with the same bytes."""
    run = stopped(cache, tmp_path / "run", halfway(whole))
    assert states(run)
    LOST[lost](run)
    assert resume(run) == ""
    for path in (run / "halving").rglob("*") if (run / "halving").exists() else ():
        assert lost == "pipes", path
    shutil.rmtree(run / "halving", ignore_errors=True)
    assert_same_end(run, whole)


def halfway(whole: Path) -> int:
    """Fits until some of the second rung are there."""
    lines = (whole / "results.csv").read_text().splitlines()
    return sum(line.startswith("linear-probe") for line in lines) + 9 + 1


def test_a_state_is_kept_as_it_is_or_lost(tmp_path: Path):
    kept = StateFolder(tmp_path / "halving")
    leaves = [np.arange(3.0), np.array(7), np.zeros((0, 2), np.float32)]
    kept["rung-0"] = leaves
    found = kept["rung-0"]
    assert [(a.dtype, a.shape, a.tolist()) for a in found] == [
        (a.dtype, a.shape, a.tolist()) for a in leaves
    ]
    assert (list(kept), len(kept)) == (["rung-0"], 1)
    (path,) = (tmp_path / "halving").iterdir()
    content = path.read_bytes()
    for position in range(len(content)):  # every byte counts
        other = bytes([content[position] ^ 4])
        path.write_bytes(content[:position] + other + content[position + 1 :])
        with pytest.raises(KeyError):
            kept["rung-0"]
    path.write_bytes(content[:-9])
    with pytest.raises(KeyError):
        kept["rung-0"]
    del kept["rung-0"]
    assert not (tmp_path / "halving").exists()


@pytest.mark.parametrize(
    "name", ["adapters", "adapters/clip-adapter", "predictions", "halving", "figures"]
)
def test_a_folder_that_is_a_link_is_not_written_into(whole: Path, tmp_path: Path, name: str):
    """Of a run that somebody sent."""
    run, target = Path(shutil.copytree(whole, tmp_path / "run")), tmp_path / "target"
    target.mkdir()
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(target)
    said = f"{run / name} is a link"
    if name != "figures":
        assert resume(run).startswith(said)
    with pytest.raises(UserError, match=said):
        report(ReportConfig((run,)))
    assert not list(target.iterdir())


@pytest.mark.parametrize(
    "name", ["results.csv", "results.csv.new", "summary.csv", "adapter.json.new"]
)
def test_a_file_that_is_a_link_is_written_beside_it(whole: Path, tmp_path: Path, name: str):
    run, target = Path(shutil.copytree(whole, tmp_path / "run")), tmp_path / "target"
    content = (whole / "results.csv").read_bytes()
    target.write_bytes(content)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    if name == "results.csv.new":
        (run / "results.csv").write_bytes(content + b"half a li")
    (run / "selected.jsonl").unlink()
    assert resume(run) == ""
    assert target.read_bytes() == content
    assert_same_end(run, whole)


def test_files_of_others_in_the_folder_stay(whole: Path, tmp_path: Path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "notes.txt").write_text("mine")
    (run / "halving").write_text("no folder")
    assert resume(run) == ""
    assert (run / "notes.txt").read_text() == "mine"
    for name in ("notes.txt", "halving"):
        (run / name).unlink()
    assert files(run).keys() == files(whole).keys()


@pytest.mark.parametrize("pattern", [*TOP, "predictions/**/*.safetensors", "adapters/**/*.json"])
def test_a_pipe_is_not_waited_for(
    cache: Path, tmp_path: Path, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(short(cache, tmp_path / "run", alpha=0.5, epochs=1, baselines="zero-shot")).run
    for path in run.glob(pattern):
        path.unlink()
        os.mkfifo(path)

    def late(*_: object) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        with suppress(UserError):
            resume(run)
        with suppress(UserError):
            report(ReportConfig((run,), html="none"))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
