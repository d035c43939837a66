"""One process at a time, no trace of one that began nothing, and batches that are whole or none."""

import errno
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from clip_adapter import files
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.errors import UserError
from tests.cache.small_cache import features

IDS = [["a", "b", "ü\ud800"], ["c"], ["d", "e"]]


def staging(folder: Path) -> StagingFolder:
    place = StagingFolder(folder / "features.h5")
    place.begin({"a": 1, "b": [2]})
    return place


def values(number: int) -> dict[str, np.ndarray]:
    count = len(IDS[number])
    stamps = np.arange(count, dtype=np.uint64) + 2**63
    return {"features": features(number, count, 2, 4, dtype=np.float16), "stamps": stamps}


@pytest.fixture
def place(tmp_path: Path) -> StagingFolder:
    """With three batches."""
    with staging(tmp_path) as place:
        for number, ids in enumerate(IDS):
            place.add("images", ids, values(number))
    return place


def found(folder: Path) -> list[list[str]]:
    """The ids of each batch that counts, of which all that is in it is right."""
    with StagingFolder(folder / "features.h5") as place:
        place.refuse_other({"a": 1, "b": (2,)})
        batches = sorted(place.batches(), key=lambda pair: pair[1])
    for batch, ids in batches:
        wanted = values(IDS.index(ids))
        assert (batch.kind, batch.count) == ("images", len(ids))
        assert batch.rows == {name: (v.dtype, v.shape[1:]) for name, v in wanted.items()}
        for name, array in wanted.items():
            for start in range(len(ids)):
                np.testing.assert_array_equal(batch.read(name, start, len(ids)), array[start:])
    return [ids for _, ids in batches]


def test_batches_come_back(place: StagingFolder, tmp_path: Path) -> None:
    assert found(tmp_path) == IDS
    with staging(tmp_path) as again:
        again.add("images", IDS[1], values(1))  # once more, as where two processes encoded it
    assert found(tmp_path) == IDS


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "renamed", "folder", "pipe", "link"])
def test_what_is_not_whole_is_removed(place: StagingFolder, tmp_path: Path, how: str) -> None:
    rng = random.Random(how)
    kept = tmp_path / "kept"
    shutil.copytree(place.folder, kept)
    for _ in range(40 if how == "flipped" else 3):
        shutil.rmtree(place.folder)
        shutil.copytree(kept, place.folder)
        victim = rng.choice(sorted(place.folder.glob("*.batch")))
        content = bytearray(victim.read_bytes())
        victim.unlink()
        if how == "flipped":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            content = content[: rng.randrange(len(content))]
        elif how == "longer":
            content += b"\0"
        elif how == "renamed":
            victim = victim.with_stem("0" * 32)
        if how == "folder":
            (victim / "within").mkdir(parents=True)
        elif how == "pipe":
            os.mkfifo(victim)
        elif how == "link":
            victim.symlink_to("nowhere")
        else:
            victim.write_bytes(content)
        assert len(found(tmp_path)) == 2
        assert len(list(place.folder.glob("*.batch"))) == 2


def test_features_that_no_cache_may_hold_are_not_kept(tmp_path: Path) -> None:
    zero = np.array([[[1, 0]], [[0, 0]]], np.float32)
    with staging(tmp_path) as place, pytest.raises(UserError, match="features of 'b' are zero"):
        place.add("images", ["a", "b"], {"features": zero})
    assert found(tmp_path) == []


def test_nothing_is_left_where_nothing_was_begun(tmp_path: Path) -> None:
    with StagingFolder(tmp_path / "features.h5") as place:
        assert place.folder.is_dir()
        with pytest.raises(UserError, match=r"Another process is writing .* another --out"):
            StagingFolder(tmp_path / "features.h5")
    assert not list(tmp_path.iterdir())
    place.close()


def test_what_was_begun_goes_on_with_the_same_arguments(
    place: StagingFolder, tmp_path: Path
) -> None:
    with StagingFolder(tmp_path / "features.h5") as place:
        place.refuse_other({"a": 1}, known_so_far=True)
        for arguments, known_so_far, words in (
            ({"a": 1}, False, "b differ"),
            ({"a": 2, "c": 3}, True, "a, c differ"),
        ):
            with pytest.raises(UserError, match=rf"other arguments \({words}\).*--force"):
                place.refuse_other(arguments, known_so_far=known_so_far)
        with pytest.raises(UserError, match=r"\(a differ\)"):
            place.begin({"a": 3, "b": [2]})
    assert found(tmp_path) == IDS
    with StagingFolder(tmp_path / "features.h5") as place:
        place.begin({"a": 3, "b": [2]}, may_differ=["a"])
        assert len(list(place.batches())) == 3
        place.begin({"a": 1, "b": [2]}, restart=True)
    assert found(tmp_path) == []


def test_a_run_killed_before_it_noted_its_arguments(tmp_path: Path) -> None:
    folder = tmp_path / "features.h5.partial"
    folder.mkdir()
    (folder / "arguments.json.new").write_text('{"data')
    staging(tmp_path).close()
    assert sorted(entry.name for entry in folder.iterdir()) == ["arguments.json", "lock"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\0", b"[" * 100_000, "folder", "pipe"]
)
def test_arguments_that_nobody_can_read_are_refused(
    place: StagingFolder, tmp_path: Path, content: bytes | str
) -> None:
    stated = place.folder / "arguments.json"
    stated.unlink()
    if content == "folder":
        stated.mkdir()
    elif content == "pipe":
        os.mkfifo(stated)
    else:
        stated.write_bytes(content)  # type: ignore[arg-type]
    with StagingFolder(tmp_path / "features.h5") as again:
        with pytest.raises(UserError, match=r"arguments\.json is damaged .*; use --force to start"):
            again.refuse_other({"a": 1})
        again.begin({"a": 1, "b": [2]}, restart=True)
    assert found(tmp_path) == []


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


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "features.h5.partial").write_text("mine")
    for path, words in (
        (tmp_path / "features.h5", r"features\.h5\.partial is not a folder"),
        (tmp_path / "file" / "features.h5", r"Cannot write .*file/features\.h5"),
        (Path("/proc/features.h5"), r"Cannot write /proc/features\.h5"),
        (tmp_path, "it is a folder"),
    ):
        with pytest.raises(UserError, match=words):
            StagingFolder(path)


def test_small_files_are_on_the_disk_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        assert not (tmp_path / "small").exists()
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(tmp_path / "small", "text")
    assert synced == [4]
    assert (tmp_path / "small").read_text() == "text"
