"""A writer killed at any point goes on and ends with the bytes of an uninterrupted run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip_adapter import files
from clip_adapter.cache import staging
from clip_adapter.cache.writer import CacheWriter
from clip_adapter.errors import UserError
from tests.cache.rewriting import datasets
from tests.cache.small_cache import ARGUMENTS, BATCH, FINISH, make_cache, write_all


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    found = datasets(make_cache(tmp_path_factory.mktemp("whole") / "features.h5"))
    assert "images/train/skipped" in found
    return found


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """The staging folder of a run that stopped right before the end."""
    with CacheWriter(tmp_path / "features.h5", ARGUMENTS, views=1) as writer:
        write_all(writer)
    return tmp_path / "features.h5.partial"


def go_on(path: Path) -> dict[str, tuple]:
    assert not path.exists()
    return datasets(make_cache(path))


def last_line(journal: Path) -> tuple[int, int]:
    """Where the last record begins and ends."""
    data = journal.read_bytes()
    return data.rindex(b"\n", 0, -1) + 1, len(data)


@pytest.mark.parametrize("name", ["train", "test", "text"])
def test_every_cut_through_the_last_batch(
    staged: Path, tmp_path: Path, name: str, uninterrupted: dict[str, tuple],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rows are written first, then their record: every state that a kill can leave between."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which only a power cut would tell
    journal, rows = staged / f"{name}.journal", staged / f"{name}.rows"
    begin, end = last_line(journal)
    before, total = (
        json.loads(line[32:])["rows"] for line in journal.read_bytes().splitlines()[-2:]
    )
    row_bytes = rows.stat().st_size // total
    states = [(size, begin) for size in range(before * row_bytes, total * row_bytes + 1)]
    states += [(total * row_bytes, size) for size in range(begin, end + 1)]
    kept = tmp_path / "kept"
    shutil.copytree(staged, kept)
    for rows_size, journal_size in states:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(kept, staged)
        os.truncate(rows, rows_size)
        os.truncate(journal, journal_size)
        assert go_on(tmp_path / "features.h5") == uninterrupted, (rows_size, journal_size)
        (tmp_path / "features.h5").unlink()


def test_rows_that_the_disk_lost_are_made_again(
    staged: Path, tmp_path: Path, uninterrupted: dict[str, tuple]
) -> None:
    os.truncate(staged / "train.rows", (staged / "train.rows").stat().st_size - 1)
    assert go_on(tmp_path / "features.h5") == uninterrupted


@pytest.mark.parametrize("name", ["train", "text"])
def test_whatever_byte_of_what_is_staged_flips_the_cache_is_the_same(
    staged: Path, tmp_path: Path, name: str, uninterrupted: dict[str, tuple],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "fsync", lambda _: None)
    rng = random.Random(name)
    kept = tmp_path / "kept"
    shutil.copytree(staged, kept)
    for kind in ("rows", "journal"):
        size = (kept / f"{name}.{kind}").stat().st_size
        for place in rng.sample(range(size), min(size, 25)):
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(kept, staged)
            content = bytearray((staged / f"{name}.{kind}").read_bytes())
            content[place] ^= 1 << rng.randrange(8)
            (staged / f"{name}.{kind}").write_bytes(content)
            assert go_on(tmp_path / "features.h5") == uninterrupted, (kind, place)
            (tmp_path / "features.h5").unlink()


def test_damage_costs_what_lies_behind_it_and_no_more(staged: Path) -> None:
    path = staged.with_name("features.h5")
    rows = bytearray((staged / "train.rows").read_bytes())
    rows[len(rows) // 2] ^= 1  # row 11 of 22, in the third batch of five
    (staged / "train.rows").write_bytes(rows)
    with CacheWriter(path, ARGUMENTS, views=1) as writer:
        assert (writer.consumed("train"), writer.consumed("test"), writer.text_rows()) == (
            10,
            11,
            3,
        )


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["train.rows", "train.journal"])
@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b"\n", DEEP.encode(), b"0" * 32 + b'{"rows": 1e99}\n', None]
)
def test_files_that_hold_something_else_are_made_again(
    staged: Path, tmp_path: Path, uninterrupted: dict[str, tuple], name: str, content: bytes | None
) -> None:
    (staged / name).unlink()
    if content is not None:
        (staged / name).write_bytes(content)
    assert go_on(tmp_path / "features.h5") == uninterrupted


FILES = ("train.rows", "train.journal", "arguments.json")
CONTENTS = {
    "deep": DEEP.encode(),
    "no object": b"[1]",
    "no dtype": staging.journal_line({"dtype": 3}, b""),
    "no such dtype": staging.journal_line({"dtype": [["features", "no such type", [1]]]}, b""),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in FILES for kind in ("folder", "pipe")),
        *(("arguments.json", kind) for kind in ("deep", "no object")),
        *(("train.journal", kind) for kind in ("no dtype", "no such dtype")),
    ],
)
def test_what_nobody_can_go_on_with_asks_for_force(
    staged: Path, tmp_path: Path, uninterrupted: dict[str, tuple], name: str, kind: str
) -> None:
    victim = staged / name
    victim.unlink()
    if kind == "folder":
        victim.mkdir()
        (victim / "within").write_text("")
    elif kind == "pipe":
        os.mkfifo(victim)
    else:
        victim.write_bytes(CONTENTS[kind])
    path = tmp_path / "features.h5"
    with (
        pytest.raises(UserError, match=r"is damaged .*; use --force to start again") as caught,
        CacheWriter(path, ARGUMENTS, views=1) as writer,
    ):
        writer.consumed("train")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    with CacheWriter(path, ARGUMENTS, views=1, restart=True) as writer:
        write_all(writer)
        writer.finish(**FINISH)
    assert datasets(path) == uninterrupted


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


def test_a_run_killed_while_it_assembled_the_file(
    staged: Path, tmp_path: Path, uninterrupted: dict[str, tuple]
) -> None:
    (staged / "assembled.h5").write_bytes(b"\x89HDF\r\n\x1a\n half")
    assert go_on(tmp_path / "features.h5") == uninterrupted
    assert not staged.exists()


def test_a_run_killed_before_it_noted_its_arguments(
    tmp_path: Path, uninterrupted: dict[str, tuple]
) -> None:
    folder = tmp_path / "features.h5.partial"
    folder.mkdir()
    (folder / "arguments.json.new").write_text('{"data')
    assert go_on(tmp_path / "features.h5") == uninterrupted


def test_consumed_counts_skipped_images_and_only_whole_batches(staged: Path) -> None:
    path = staged.with_name("features.h5")
    with CacheWriter(path, ARGUMENTS, views=1) as writer:
        assert (writer.consumed("train"), writer.consumed("test"), writer.text_rows()) == (
            23,
            11,
            3,
        )
        assert writer.consumed("val") == 0
    os.truncate(staged / "train.journal", last_line(staged / "train.journal")[1] - 1)
    with CacheWriter(path, ARGUMENTS, views=1) as writer:
        assert writer.consumed("train") == 20


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.cache.small_cache import ARGUMENTS, FINISH, write_all
from clip_adapter.cache.staging import StagedRows
from clip_adapter.cache.writer import CacheWriter

append = StagedRows.append
def told(self, values, record):
    append(self, values, record)
    print("batch", flush=True)
StagedRows.append = told
with CacheWriter(Path(sys.argv[1]), ARGUMENTS, views=1) as writer:
    print("open", flush=True)
    while True:  # again and again, until somebody kills it
        write_all(writer)
"""


def test_killed_with_sigkill_it_goes_on(tmp_path: Path, uninterrupted: dict[str, tuple]) -> None:
    path = tmp_path / "features.h5"
    rng = random.Random(3)
    for _ in range(4):
        command = [sys.executable, "-c", CHILD, str(path), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            assert child.stdout.readline() == "open\n"
            with pytest.raises(UserError, match="Another process is writing"):
                CacheWriter(path, ARGUMENTS, views=1)
            for _ in range(rng.randrange(4)):
                child.stdout.readline()
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        assert not path.exists()
    assert go_on(path) == uninterrupted


def test_nothing_stands_under_the_final_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "features.h5"
    with CacheWriter(path, ARGUMENTS, views=1) as writer:
        write_all(writer)
        assert not path.exists()
        renamed = []
        real = Path.replace

        def watch(self: Path, target: Path) -> Path:
            if target == path:
                renamed.append(datasets(self))
                assert not path.exists()
            return real(self, target)

        monkeypatch.setattr(Path, "replace", watch)
        writer.finish(**FINISH)
    assert [len(found) for found in renamed] == [14]
    assert [entry.name for entry in tmp_path.iterdir()] == ["features.h5"]


def test_a_failing_finish_leaves_the_earlier_cache_alone(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "features.h5")
    earlier = path.read_bytes()
    with CacheWriter(path, ARGUMENTS, views=1) as writer:
        write_all(writer)
        with pytest.raises(TypeError):
            writer.finish(**{**FINISH, "dataset": {"name": object()}})
    assert path.read_bytes() == earlier


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    with CacheWriter(path, ARGUMENTS, views=1):
        for restart in (False, True):
            with pytest.raises(UserError, match=r"Another process is writing .* another --out"):
                CacheWriter(path, ARGUMENTS, views=1, restart=restart)
    CacheWriter(path, ARGUMENTS, views=1).close()


def test_other_arguments_are_refused_by_name(staged: Path) -> None:
    path = staged.with_name("features.h5")
    other = {"dataset": "others", "backbone": "toy-clip", "pretrained": "tag"}
    with pytest.raises(UserError, match=r"\(dataset, pretrained differ\).*--force"):
        CacheWriter(path, other, views=1)
    with CacheWriter(path, ARGUMENTS, views=1) as writer:  # the staged rows are still there
        assert writer.consumed("train") == 23
    with CacheWriter(path, other, views=1, restart=True) as writer:
        assert writer.consumed("train") == writer.text_rows() == 0


def test_equal_arguments_are_equal_whatever_python_calls_them(staged: Path) -> None:
    path = staged.with_name("features.h5")
    with pytest.raises(UserError, match=r"\(list differ\)"):
        CacheWriter(path, {**ARGUMENTS, "list": (1, 2)}, views=1)
    CacheWriter(path, {**ARGUMENTS, "list": (1, 2)}, views=1, restart=True).close()
    CacheWriter(path, {"list": [1, 2], **ARGUMENTS}, views=1).close()


def test_rows_of_another_shape_are_refused(staged: Path) -> None:
    with (
        CacheWriter(staged.with_name("features.h5"), ARGUMENTS, views=1) as writer,
        pytest.raises(ValueError, match="rows of shape"),
    ):
        writer.append_images("train", np.ones((1, 1, BATCH + 4), np.float32), [0], ["x"])


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*file/features\.h5"):
        CacheWriter(tmp_path / "file" / "features.h5", {}, views=1)
    with pytest.raises(UserError, match=r"Cannot write /proc/features\.h5"):
        CacheWriter(Path("/proc/features.h5"), {}, views=1)
    with pytest.raises(UserError, match="it is a folder"):
        CacheWriter(tmp_path, {}, views=1)
