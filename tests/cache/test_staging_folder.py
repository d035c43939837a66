"""One process at a time, no trace of one that began nothing."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from clip_adapter import files
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.errors import UserError


def test_nothing_is_left_where_nothing_was_begun(tmp_path: Path) -> None:
    with StagingFolder(tmp_path / "features.h5") as place:
        assert place.folder.is_dir()
        with pytest.raises(UserError, match="Another process is writing"):
            StagingFolder(tmp_path / "features.h5")
    assert not list(tmp_path.iterdir())
    place.close()


def test_what_was_begun_stays(tmp_path: Path) -> None:
    for _ in range(2):
        with StagingFolder(tmp_path / "features.h5") as place:
            place.state({"a": 1, "b": [2]})
    with StagingFolder(tmp_path / "features.h5") as place:
        place.refuse_other({"a": 1, "b": (2,)})
        place.refuse_other({"a": 1}, known_so_far=True)
        with pytest.raises(UserError, match=r"other arguments \(b differ\)"):
            place.refuse_other({"a": 1})
        with pytest.raises(UserError, match=r"other arguments \(a, c differ\)"):
            place.refuse_other({"a": 2, "c": 3}, known_so_far=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\0"])
def test_arguments_that_nobody_can_read_are_refused(tmp_path: Path, content: bytes) -> None:
    with StagingFolder(tmp_path / "features.h5") as place:
        place.state({"a": 1})
        (place.folder / "arguments.json").write_bytes(content)
        with pytest.raises(UserError, match=r"arguments\.json is damaged .*; use --force to start"):
            place.refuse_other({"a": 1})


def test_files_of_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "features.h5.partial"
    folder.mkdir()
    (folder / "mine").write_text("do not lose me")
    StagingFolder(tmp_path / "features.h5").close()
    assert [entry.name for entry in folder.iterdir()] == ["mine"]


def test_who_took_a_lock_that_is_gone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and taking it, the process before finished and removed the folder."""
    flock = files.fcntl.flock

    def finish_first(*arguments: int) -> None:
        shutil.rmtree(tmp_path / "features.h5.partial")
        flock(*arguments)

    monkeypatch.setattr(files.fcntl, "flock", finish_first)
    with pytest.raises(UserError, match="Another process is writing"):
        StagingFolder(tmp_path / "features.h5")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:  # fmt: skip
    def fail(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", fail)
    StagingFolder(tmp_path / "features.h5").close()
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert f"features.h5 cannot be locked ({os.strerror(number)}); let no other process" in said
    assert said.count("\n") == 1


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "features.h5.partial").write_text("mine")
    with pytest.raises(UserError, match=r"features\.h5\.partial is not a folder"):
        StagingFolder(tmp_path / "features.h5")
