"""`extract` as a person runs it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.extract.command import ExtractConfig, extract

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
REPORT = "import sys\ntry:\n    {}\nfinally:\n    print('modules', *sys.modules)"


def run(
    *command: str | Path, cwd: Path, environment: dict[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / command[0], *command[1:]], cwd=cwd, capture_output=True, text=True, env=environment
    )


def modules_after(code: str, *arguments: str | Path, cwd: Path) -> tuple[set[str], str]:
    """The packages that a program imported, and what it printed before."""
    finished = run("python", "-c", REPORT.format(code), *arguments, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    printed, _, modules = finished.stdout.rpartition("modules ")
    return {name.partition(".")[0] for name in modules.split()}, printed


def refused(finished: subprocess.CompletedProcess[str], *words: str) -> None:
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1, finished.stderr
    assert finished.stderr.startswith("extract: ")
    for word in words:
        assert word in finished.stderr


def datasets(path: Path) -> dict[str, bytes]:
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.__setitem__(name, item[...].tobytes())
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return found


def kill_when_staged(folder: Path, *command: str, batches: int) -> None:
    """Start `extract` and kill it as soon as some batches are on the disk."""
    journal = folder / "features.h5.partial" / "train.journal"
    with subprocess.Popen([BIN / command[0], *command[1:]], cwd=folder, env=ENVIRONMENT) as child:
        while not journal.exists() or journal.read_bytes().count(b"\n") < batches:
            assert child.poll() is None
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)


def test_killed_then_run_again_then_refused_then_forced(tmp_path: Path, digits_cache: Path) -> None:
    """One story, since each chapter needs the cache of the one before."""
    own = ("--templates", "the digit {}", "--batch-size", "16")
    config = ExtractConfig(templates=("the digit {}",), batch_size=16)
    whole = extract(replace(config, out=tmp_path / "whole" / "features.h5"))
    out = tmp_path / "features.h5"

    kill_when_staged(tmp_path, "extract", *own, batches=3)
    assert not out.exists()
    assert (tmp_path / "features.h5.partial").is_dir()
    with pytest.raises(UserError, match=r"interrupted run .*\(templates differ\).*--force"):
        extract(ExtractConfig(out=out))

    code = "from clip_adapter.extract.command import main; main(sys.argv[1:])"
    imported, printed = modules_after(code, *own, cwd=tmp_path)
    assert "719 train, 179 val, 899 test images, 10 classes" in printed
    assert "torch" in imported
    assert not imported & {"jax", "flax", "optax"}
    assert datasets(out) == datasets(whole)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["features.h5", "whole"]

    made = out.read_bytes()
    again = run("extract", *own, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert "nothing to do" in again.stdout
    other = run("clip-adapter", "extract", "--backbone", "RN50", cwd=tmp_path)
    refused(other, "features.h5 exists", "(backbone, templates differ)", "--force")
    assert out.read_bytes() == made

    default = run("extract", "--force", cwd=tmp_path)
    assert (default.returncode, default.stderr) == (0, "")
    assert default.stdout.startswith("features.h5: 719 train, 179 val, 899 test images")
    with FeatureCache(out) as ours, FeatureCache(digits_cache) as shared:
        for split in ("train", "val", "test"):
            features = ours.images(split).features
            np.testing.assert_allclose(features, shared.images(split).features, atol=1e-5)
            assert ours.images(split).ids == shared.images(split).ids
        assert ours.backbone == shared.backbone
        assert ours.arguments == shared.arguments


def test_unknown_names_are_one_sentence(tmp_path: Path) -> None:
    refused(run("extract", "--dataset", "digit", cwd=tmp_path), "'digit'", "near matches: digits")
    finished = run("extract", "--backbone", "RN5O", cwd=tmp_path)
    refused(finished, "Unknown backbone 'RN5O'", "near matches: RN50")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    refused(run("extract", "--out", "a file/features.h5", cwd=tmp_path), "Cannot write a file/")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a file"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--workers", "-1"], "--workers"),
        (["--templates", "no place"], "'no place' needs exactly one {}"),
        (["--device", "abacus"], "--device abacus is not available"),
        (["--out", "/proc/features.h5"], "Cannot write /proc/features.h5"),
        (["--out", "mine.txt"], "mine.txt cannot be read as HDF5"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from clip_adapter.extract.command import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("do not lose me")
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert words in output.err
    assert (tmp_path / "mine.txt").read_text() == "do not lose me"
    assert not (tmp_path / "features.h5").exists()


def test_fit_never_imports_torch(tmp_path: Path, digits_cache: Path) -> None:
    code = "from clip_adapter.pipelines.fit import main; main(sys.argv[1:])"
    small = ("--shots", "1", "--epochs", "1", "--evaluate-every", "1", "--alpha", "0.6")
    imported, printed = modules_after(
        code,
        "--cache",
        digits_cache,
        "--out",
        "run",
        "--baselines",
        "zero-shot",
        *small,
        cwd=tmp_path,
    )
    assert "clip-adapter" in printed
    assert "jax" in imported
    assert not imported & {"torch", "torchvision", "open_clip"}


@pytest.mark.parametrize(
    "code",
    [
        "from clip_adapter.extract.command import main; main(['--help'])",
        "from clip_adapter.pipelines.fit import main; main(['--help'])",
        "from clip_adapter.pipelines.umbrella import main; sys.argv[1:] = ['--help']; main()",
    ],
)
def test_help_imports_nothing_heavy(tmp_path: Path, code: str) -> None:
    imported, printed = modules_after(code, cwd=tmp_path)
    assert printed.startswith("usage: ")
    assert not imported & {"torch", "jax", "flax", "optax", "numpy", "h5py", "open_clip", "sklearn"}
