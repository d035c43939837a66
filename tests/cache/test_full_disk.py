"""A full disk: one sentence, exit code 2, nothing under the final name, and nothing lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.writer import CacheWriter
from clip_adapter.errors import UserError
from tests.cache.small_cache import (
    ARGUMENTS,
    CLASSES,
    DIM,
    FINISH,
    features,
    make_cache,
    write_all,
)

PROGRAM = """
import resource, sys
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from clip_adapter.pipelines.console.running import run_command
from tests.cache.small_cache import make_cache

@dataclass
class Nothing:
    "Write a cache."

if len(sys.argv) > 2:  # as large as a file may become: another disk on which writing fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
run_command(Nothing, lambda config: make_cache(Path("features.h5")), "write", [])
"""


def write(folder: Path, *limit: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PROGRAM, root, *limit]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def check(finished: subprocess.CompletedProcess[str], folder: Path, reason: str) -> None:
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == ""
    assert finished.stderr == (
        f"write: Cannot write features.h5: {reason}; what is encoded is kept beside it, and the "
        "same command goes on from there.\n"
    )
    assert [entry.name for entry in folder.iterdir()] == ["features.h5.partial"]


def goes_on(folder: Path) -> None:
    finished = write(folder)
    assert (finished.returncode, finished.stderr) == (0, "")
    whole = make_cache(folder / "whole.h5")
    with FeatureCache(folder / "features.h5") as ours, FeatureCache(whole) as wanted:
        assert ours.content_sha256 == wanted.content_sha256


def test_no_space_left_on_the_device(tmp_path: Path) -> None:
    """Writing to /dev/full fails as on a full disk."""
    with CacheWriter(tmp_path / "features.h5", ARGUMENTS, views=1) as writer:
        writer.append_text(features(0, 1, 2, DIM), CLASSES[:1])
    victim = tmp_path / "features.h5.partial" / "assembled.h5"
    victim.symlink_to("/dev/full")
    check(write(tmp_path), tmp_path, "No space left on device")
    victim.unlink()
    goes_on(tmp_path)


@pytest.mark.parametrize("limit", [10, 100, 300, 2_000, 9_000])
def test_a_file_that_must_not_grow(tmp_path: Path, limit: int) -> None:
    """From the arguments over the rows to the HDF5 file, which is small but asks for more."""
    check(write(tmp_path, str(limit)), tmp_path, "File too large")
    goes_on(tmp_path)


def test_a_run_that_starts_again_does_not_promise_to_go_on(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "features.h5", ARGUMENTS, views=1, restart=True) as writer:
        write_all(writer)
        (tmp_path / "features.h5.partial" / "assembled.h5").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"No space left on device; mend that and start again"):
            writer.finish(**FINISH)
