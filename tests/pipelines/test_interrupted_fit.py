"""Runs that end at odd moments: their first ones, in the middle of a fit, on a full disk."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_adapter import files as written
from clip_adapter.listener import Advance, Listener
from clip_adapter.pipelines.commands.fit import fit, main
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests import processes
from tests.pipelines.run_files import Killed, assert_same_end, files
from tests.pipelines.tiny_cache import FIT, short, tiny_data, write_cache

pytestmark = pytest.mark.usefixtures("pictures_drawn_once")
DATA = tiny_data()
GRID = {"alpha": (0.2, 0.8), "learning_rate": (0.003, 0.01)}
# Solved on the host: of the many runs below none waits for a compiler.
LINE = "--method linear-probe --C 0.1 10 --shots 4 --baselines zero-shot --out run"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and the run on it that nothing stopped."""
    folder = tmp_path_factory.mktemp("home")
    write_cache(folder / "features.h5", DATA)
    fit(config(folder, folder / "run"))
    return folder


def config(home: Path, run: Path) -> FitConfig:
    return FitConfig(
        cache=home / "features.h5",
        out=run,
        method=("linear-probe",),
        baselines=("zero-shot",),
        shots=(4,),
        hyper={"C": (0.1, 10.0)},
    )


class Steps:
    """Ends, or fails, at the n-th time that something happens to a file."""

    def __init__(
        self, patch: pytest.MonkeyPatch, run: Path, last: int, error: type[BaseException]
    ) -> None:
        self.taken, self._last, self._error, self._run = 0, last, error, run
        mkdir, replace, unlink = Path.mkdir, Path.replace, Path.unlink
        write = written.write_bytes
        patch.setattr(Path, "mkdir", self._before(mkdir))
        patch.setattr(Path, "replace", self._before(replace))
        patch.setattr(Path, "unlink", self._before(unlink))

        def write_half(path: Path, content: bytes, *, sync: bool = True) -> None:
            if self._is_last(path):
                path.with_name(path.name + ".new").write_bytes(content[: len(content) // 2])
                raise self._fault()
            write(path, content, sync=sync)

        patch.setattr(written, "write_bytes", write_half)

    def _before(self, function):  # type: ignore[no-untyped-def]
        def called(path: Path, *arguments: object, **options: object) -> object:
            if self._is_last(path):
                raise self._fault()
            return function(path, *arguments, **options)

        return called

    def _is_last(self, path: Path) -> bool:
        self.taken += self._run == path or self._run in path.parents
        return self.taken > self._last

    def _fault(self) -> BaseException:
        if self._error is OSError:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._error()


def goes_on_or_starts_again(home: Path, run: Path) -> None:
    going_on = (run / "run.json").exists()
    if not going_on:  # the same command starts it
        assert not run.exists() or {path.name for path in run.iterdir()} <= {"run.json.new"}
    fit(FitConfig(resume=run) if going_on else config(home, run))
    for path in run.rglob("*.new"):  # what was being written when it ended
        path.unlink()
    assert_same_end(run, home / "run")


def test_it_may_end_before_or_within_any_step(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    last, ended = 0, True
    while ended:
        run = tmp_path / f"run-{last}"
        with monkeypatch.context() as patch:
            steps = Steps(patch, run, last, Killed)
            try:
                fit(config(home, run))
                ended = False
            except Killed:
                pass
        goes_on_or_starts_again(home, run)
        last += 1
    assert steps.taken == last - 1 > 25, "as many steps as were tried"


def test_a_disk_that_is_full_at_any_step(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """One sentence; the numbers that are there are shown; no half file under a final name; and the
    run goes on when there is space again."""
    whole = files(home / "run")
    last, code, shown = 0, 2, []
    while code == 2:
        run = tmp_path / f"run-{last}"
        line = [*LINE.split()[:-1], str(run), "--cache", str(home / "features.h5")]
        with monkeypatch.context() as patch:
            Steps(patch, run, last, OSError)
            with pytest.raises(SystemExit) as ended:
                main(line)
        code = ended.value.code
        captured = capsys.readouterr()
        if code == 2:
            assert captured.err.count("\n") == 1, captured.err
            assert "No space left on device" in captured.err
            shown.append("zero-shot" in captured.out)
            done = (run / "selected.jsonl").exists()
            assert shown[-1] or not done, "a result was there and was not shown"
            for name, content in files(run).items() if run.exists() else ():
                complete = name.endswith((".safetensors", "tasks.json", "validation.png"))
                assert not complete or content == whole[name], f"half of {name}"
            if last % 3 == 0:  # of every step the test above
                goes_on_or_starts_again(home, run)
        last += 1
    assert shown == sorted(shown), "from the first result on they are shown"
    assert True in shown and False in shown
    assert code == 0


SMALL_FILES = """
import resource, signal, sys
import jax
jax.config.update("jax_enable_compilation_cache", False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from clip_adapter.pipelines.commands.fit import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("limit", [300, 9_000])
def test_files_that_must_not_grow(home: Path, tmp_path: Path, limit: int):
    """The operating system itself says no: writing the plan, or a picture after the last fit."""
    line = [*LINE.split(), "--cache", home / "features.h5"]
    done = processes.run([sys.executable, "-c", SMALL_FILES, limit, *line], tmp_path)
    assert done.returncode == 2, done.stderr
    sentences = [line for line in done.stderr.splitlines() if not line[5:6].isdigit()]
    assert sentences == ["fit: Cannot write to run: File too large."]
    assert ("linear-probe" in done.stdout) == (limit > 300)
    goes_on_or_starts_again(home, tmp_path / "run")


def test_kills_in_the_first_moments(home: Path, tmp_path: Path):
    """By SIGKILL, from the start of the process to its first fits."""
    rng = random.Random(7)
    line = ["fit", *LINE.split()[:-2], "--cache", home / "features.h5"]
    started = time.monotonic()
    assert processes.run([*line, "--out", "timed"], tmp_path).returncode == 0
    duration = time.monotonic() - started
    for number in range(3):
        run = tmp_path / f"run-{number}"
        process = processes.start([*line, "--out", run], tmp_path)
        if number % 2:  # as soon as there is a folder, and a little later
            while not run.exists() and process.is_alive():
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0.3, 1.0) * duration)
        process.kill()
        process.join()
        goes_on_or_starts_again(home, run)


class Heard(Listener):
    """Keeps what it hears of progress, but for the folds of held-out images behind it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.totals: list[tuple[int, int]] = []

    def progress(self, what: str, total: int, done: int = 0):  # type: ignore[no-untyped-def]
        from contextlib import nullcontext

        counts = what != "calibrate"
        self.totals += [(total, done)] if counts else []

        def advance(count: float, note: str = "") -> None:
            self.steps += [count] if counts else []

        heard: Advance = advance
        return nullcontext(heard)


def test_progress_moves_within_a_fit(home: Path, tmp_path: Path):
    """In parts of one setting of one method on one task, which sum up to the methods and tasks."""
    heard = Heard()
    fit(short(home / "features.h5", tmp_path / "run", alpha=0.5, epochs=20_000), heard)
    assert heard.totals == [(1, 0)]
    assert sum(heard.steps) == pytest.approx(1)
    moving = [step for step in heard.steps if step > 0]
    assert len(moving) >= 3 and max(moving) < 1, moving  # how large each is, the clock decides
    again = Heard()
    fit(FitConfig(resume=tmp_path / "run"), again)
    assert (again.totals, again.steps) == ([(1, 1)], [])


@pytest.mark.parametrize("search", ["full", "halving"])
def test_progress_sums_up_over_methods_and_tasks(home: Path, tmp_path: Path, search: str):
    heard = Heard()
    config = short(
        home / "features.h5",
        tmp_path / "run",
        seeds=(1, 2),
        search=search,
        baselines=("zero-shot", "linear-probe"),
        **GRID,
    )
    fit(config, heard)
    assert heard.totals == [(6, 0)]
    assert sum(heard.steps) == pytest.approx(6)
    assert min(heard.steps) >= 0


@pytest.mark.parametrize("seconds", [0.5, 3])
def test_ctrl_c_ends_a_long_fit_at_once(home: Path, tmp_path: Path, seconds: float):
    """While XLA compiles, and in the middle of a schedule of minutes. It took 0.1 s on busy cores;
    three seconds are allowed because other processes may have them."""
    line = "--alpha 0.2 0.8 --lr 0.01 --shots 4 --epochs 1000000 --baselines --out run"
    out, err = tmp_path / "out", tmp_path / "err"
    process = processes.start(
        ["fit", *line.split(), "--cache", home / "features.h5"],
        tmp_path,
        out=out,
        err=err,
        environment=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},  # no program is there yet
    )
    try:
        while not (tmp_path / "run" / "tasks.json").exists():
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(seconds)
        assert process.is_alive()
        started = time.monotonic()
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(60)
        took = time.monotonic() - started
    finally:
        process.kill()
    assert (process.exitcode, out.read_text()) == (130, "")
    assert err.read_text() == (
        "fit: interrupted; what is finished is kept; go on with: fit --resume run\n"
    )
    assert took < 3, took
    assert not (tmp_path / "run" / "selected.jsonl").exists()


def test_ctrl_c_before_anything_is_there(home: Path, tmp_path: Path):
    """While libraries are loaded, of which some lose what is raised in them."""
    for wait in (0.05, 0.3, 0.8):
        process = subprocess.Popen(
            [FIT, *LINE.split(), "--cache", str(home / "features.h5")],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        if wait > 0.2:  # before that Python itself is not there yet
            assert "Traceback" not in errors
            assert process.returncode == 130
        if (tmp_path / "run").exists():
            goes_on_or_starts_again(home, tmp_path / "run")
            break
    assert load_adapter(home / "run")
