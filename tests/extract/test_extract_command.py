"""`extract` as a person runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.extract import job, local_encoding
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.pipelines.commands.extract import main
from clip_adapter.pipelines.console import entry as commands
from tests.extract.image_folders import make_folder

ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
REPORT = "import sys\ntry:\n    {}\nfinally:\n    print('modules', *sys.modules)"


def modules_after(code: str, *arguments: str | Path, cwd: Path) -> tuple[set[str], str]:
    """The packages that a program imported, and what it printed before."""
    command = [sys.executable, "-c", REPORT.format(code), *arguments]
    finished = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    assert "warning" not in finished.stderr.lower()
    printed, _, modules = finished.stdout.rpartition("modules ")
    return {name.partition(".")[0] for name in modules.split()}, printed


def exit_code(command: Callable[..., object], *arguments: Any) -> object:
    with pytest.raises(SystemExit) as exited:
        command(*arguments)
    return exited.value.code


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    assert exit_code(main, arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("extract: ")
    assert output.err.count("\n") == 1
    for word in words:
        assert word in output.err


def test_the_default_in_a_process_of_its_own(tmp_path: Path, digits_cache: Path) -> None:
    code = "from clip_adapter.pipelines.commands.extract import main; main(sys.argv[1:])"
    imported, printed = modules_after(code, cwd=tmp_path)
    assert printed.startswith("features.h5: 719 train, 179 val, 899 test images, 10 classes, ")
    assert "torch" in imported
    assert not imported & {"jax", "flax", "optax"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["features.h5"]
    with FeatureCache(tmp_path / "features.h5") as ours, FeatureCache(digits_cache) as shared:
        for split in ("train", "val", "test"):
            features = ours.images(split).features
            np.testing.assert_allclose(features, shared.images(split).features, atol=1e-5)
            assert ours.images(split).ids == shared.images(split).ids
        assert ours.backbone == shared.backbone
        assert ours.arguments == shared.arguments


def test_run_again_then_refused_then_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One story, since each chapter needs the cache of the one before."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "data", {"train": 1, "test": 1}, ("cat", "dog"))
    own = ["--dataset", "folder:data", "--val", "0"]
    out = tmp_path / "features.h5"

    assert exit_code(main, own) == 0
    assert capsys.readouterr().out.startswith("features.h5: 2 train, 2 test images, 2 classes, ")
    made = out.read_bytes()
    assert exit_code(main, own) == 0
    output = capsys.readouterr()
    assert output.out == (
        "features.h5 is complete and was made with these arguments of what its source holds now: "
        "nothing to do (weights were not looked at; --force starts again).\n"
    )
    assert output.err == ""

    monkeypatch.setattr(sys, "argv", ["clip-adapter", "extract", *own, "--backbone", "RN50"])
    assert exit_code(commands.main) == 2
    said = capsys.readouterr().err
    for words in ("features.h5 exists", "(backbone differ)", "--force"):
        assert words in said
    assert out.read_bytes() == made

    assert exit_code(main, [*own, "--force", "--templates", "the {}"]) == 0
    with FeatureCache(out) as cache:
        assert cache.templates == ["the {}"]


def test_unknown_names_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["--dataset", "digit"], "'digit'", "near matches: digits")
    refused(capsys, ["--backbone", "RN5O"], "Unknown backbone 'RN5O'", "near matches: RN50")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--workers", "-1"], "--workers"),
        (["--templates", "no place"], "'no place' needs exactly one {}"),
        (["--device", "abacus"], "--device abacus is not available"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    refused(capsys, arguments, words)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((job, "open_dataset"), (local_encoding, "load_backbone")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("something was loaded"))


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "."], "Cannot write .: it is a folder; name a file"),
        (["--out", ".", "--force"], "Cannot write .: it is a folder; name a file"),
        (["--out", "mine.txt/a.h5"], "Cannot write mine.txt/a.h5: mine.txt is not a folder"),
        (["--out", "mine.txt/b/a.h5"], "Cannot write mine.txt/b/a.h5: Not a directory"),
        (["--out", "/proc/features.h5"], "Cannot write /proc/features.h5: "),
        (["--out", "mine.txt"], "mine.txt exists and is no feature cache; choose another --out"),
        (["--out", "digits.h5", "--views", "2"], "exists and was made with other arguments (views"),
        (["--out", "taken.h5"], "Another process is writing taken.h5; wait for it or"),
        (["--out", "taken.h5", "--force"], "Another process is writing taken.h5; wait for it or"),
        (["--out", "begun.h5"], "begun.h5.partial holds an interrupted run with other arguments"),
    ],
)
def test_what_cannot_be_written_is_found_out_first(
    tmp_path: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("do not lose me")
    (tmp_path / "digits.h5").symlink_to(digits_cache)
    (tmp_path / "begun.h5.partial").mkdir()
    other = json.dumps(ExtractConfig(views=3).identity())
    (tmp_path / "begun.h5.partial" / "arguments.json").write_text(other)
    before = sorted(tmp_path.rglob("*"))
    with StagingFolder(tmp_path / "taken.h5"):
        refused(capsys, arguments, words)
    assert (tmp_path / "mine.txt").read_text() == "do not lose me"
    (tmp_path / "begun.h5.partial" / "lock").unlink(missing_ok=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("nothing_loads")
def test_the_first_process_of_torchrun_looks_where_the_parts_will_be_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    for name, value in {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    refused(capsys, ["--out", str(tmp_path)], "it is a folder; name a file")


def test_fit_never_imports_torch(tmp_path: Path, digits_cache: Path) -> None:
    code = "from clip_adapter.pipelines.commands.fit import main; main(sys.argv[1:])"
    small = ("--shots", "1", "--epochs", "1", "--alpha", "0.6")
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
        "from clip_adapter.pipelines.commands.extract import main; main(['--help'])",
        "from clip_adapter.pipelines.commands.fit import main; main(['--help'])",
        "from clip_adapter.pipelines.console.entry import main; sys.argv[1:] = ['--help']; main()",
    ],
)
def test_help_imports_nothing_heavy(tmp_path: Path, code: str) -> None:
    imported, printed = modules_after(code, cwd=tmp_path)
    assert printed.startswith("usage: ")
    assert not imported & {"torch", "jax", "flax", "optax", "numpy", "h5py", "open_clip", "sklearn"}


def test_the_config_takes_what_a_person_types() -> None:
    typed = ExtractConfig(out="~/api.h5", data_root="data", templates="a photo of a {}.")  # type: ignore[arg-type]
    meant = ExtractConfig(
        out=Path.home() / "api.h5", data_root=Path("data"), templates=("a photo of a {}.",)
    )
    assert typed == meant
