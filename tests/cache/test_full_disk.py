"""A full disk: one sentence, exit code 2, nothing under the final name, and nothing lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.cache.writer import write_cache
from clip_adapter.errors import UserError
from tests.cache.small_cache import ARGUMENTS, STATED, features, make_cache, small_content

PROGRAM = """
import resource, sys
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from clip_adapter.pipelines.console.running import run_command
from tests.cache.test_full_disk import go_on

@dataclass
class Nothing:
    "Write a cache."

if len(sys.argv) > 2:  # as large as a file may become: another disk on which writing fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
run_command(Nothing, lambda config: go_on(Path("features.h5")), "write", [])
"""


def go_on(path: Path) -> None:
    """As `extract` goes about it."""
    with StagingFolder(path) as place:
        place.begin(ARGUMENTS)
        for number in range(3):
            place.add("images", [str(number)], {"features": features(number, 1, 1, 4)})
        write_cache(place, small_content(), **STATED)


def write(folder: Path, *limit: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PROGRAM, root, *limit]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("limit", [10, 100, 300, 2_000, 9_000, None])
def test_a_disk_that_takes_no_more(tmp_path: Path, limit: int | None) -> None:
    """A file that must not grow, from the arguments over the rows to the HDF5 file, which is small
    but asks for more; and /dev/full, where writing fails as on a full disk."""
    if limit is None:
        folder = tmp_path / "features.h5.partial"
        folder.mkdir()
        (folder / "arguments.json").write_text('{"dataset": "toys", "backbone": "toy-clip"}')
        (folder / "assembled.h5").symlink_to("/dev/full")
    finished = write(tmp_path, *([] if limit is None else [str(limit)]))
    assert (finished.returncode, finished.stdout) == (2, "")
    reason = "No space left on device" if limit is None else "File too large"
    assert finished.stderr == (
        f"write: Cannot write features.h5: {reason}; what is encoded is kept beside it, and the "
        "same command goes on from there.\n"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["features.h5.partial"]
    finished = write(tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    whole = make_cache(tmp_path / "whole.h5")
    with FeatureCache(tmp_path / "features.h5") as ours, FeatureCache(whole) as wanted:
        assert ours.content_sha256 == wanted.content_sha256


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_starts_again_does_not_promise_to_go_on(tmp_path: Path, begun: bool) -> None:
    with StagingFolder(tmp_path / "features.h5") as place:
        if begun:
            place.begin(ARGUMENTS, restart=True)
        (tmp_path / "features.h5.partial" / "assembled.h5").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"No space left on device; mend that and start again"):
            write_cache(place, small_content(), **STATED)
