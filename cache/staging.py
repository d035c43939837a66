"""Where a cache grows: a folder that one process owns, and rows that survive being killed.

HDF5 cannot promise that: a process killed while it writes may leave a file that does not open. So
rows are staged in a plain binary file beside a journal of JSON lines. A batch counts once its
journal line is complete, its rows are there, and both are what the checksum in the line was made
of; whatever lies beyond the last such batch is cut off when the pair is opened again. The HDF5 file
is assembled from staged rows at the end.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from clip_adapter import files
from clip_adapter.errors import UserError

ARGUMENTS = "arguments.json"
LOCK = "lock"
DIGEST_BYTES = 16


class StagingFolder:
    """`<path>.partial`, which belongs to this process until it is closed.

    own: what only this folder has to agree on with an interrupted run, such as the shard, which
        is no argument of the cache that the parts make together.
    Raises UserError where it cannot be made or belongs to another process.
    """

    def __init__(self, path: Path, own: Mapping[str, Any] | None = None) -> None:
        if files.is_there(path) and path.is_dir():
            raise UserError(f"Cannot write {path}: it is a folder; name a file.")
        self.path = path
        self._own = dict(own or {})
        self.folder = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            files.is_there(self.folder / LOCK)
            self._lock = (self.folder / LOCK).open("w")
        except FileExistsError as error:
            raise UserError(f"Cannot write {path}: {error.filename} is not a folder.") from error
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
        # Between opening and locking it, the process before may have finished and removed it.
        if not (files.take_lock(self._lock.fileno(), path) and self._lock_stands()):
            self._lock.close()
            raise UserError(
                f"Another process is writing {path}; wait for it or choose another --out."
            )

    def _lock_stands(self) -> bool:
        """Whether the lock is still in the folder, which whoever is done removes."""
        return os.fstat(self._lock.fileno()).st_nlink > 0

    @property
    def begun(self) -> bool:
        """Whether there is something here to go on with."""
        return (self.folder / ARGUMENTS).exists()

    def refuse_other(
        self,
        arguments: dict[str, Any],
        *,
        known_so_far: bool = False,
        may_differ: Collection[str] = (),
    ) -> None:
        """Hold what an interrupted run left here, if anything, to the arguments of this one.

        known_so_far: there are more arguments, which are not known yet. may_differ: names of those
            that need not agree.
        Raises UserError where it was started with others, or nobody can tell any more.
        """
        if not self.begun:
            return
        earlier = self.read_arguments()
        now = json.loads(json.dumps(arguments | self._own))
        names = now.keys() if known_so_far else earlier.keys() | now.keys()
        names = names - set(may_differ)
        differing = sorted(name for name in names if earlier.get(name) != now.get(name))
        if differing:
            raise UserError(
                f"{self.folder} holds an interrupted run with other arguments "
                f"({', '.join(differing)} differ); repeat those arguments to go on, "
                "or use --force to start again."
            )

    def read_arguments(self) -> dict[str, Any]:
        """What was stated. Raises UserError where it cannot be read."""
        path = self.folder / ARGUMENTS
        try:
            files.is_there(path)
            found = files.parse_json(path.read_text())
        except (OSError, ValueError) as error:
            raise self.damaged(ARGUMENTS) from error
        if not isinstance(found, dict):
            raise self.damaged(ARGUMENTS)
        return found

    def damaged(self, name: str) -> UserError:
        return UserError(
            f"{self.folder / name} is damaged or cannot be read; use --force to start again."
        )

    def state(self, arguments: dict[str, Any]) -> None:
        """Write down what this run is, and begin it unless it has begun."""
        stated = json.dumps(arguments | self._own, sort_keys=True)
        if not self.begun:
            self.empty()
        elif self.read_arguments() == json.loads(stated):
            return
        files.write_text(self.folder / ARGUMENTS, stated)

    def empty(self) -> None:
        """Remove all but the lock; the arguments first, without which nothing here counts."""
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name != ARGUMENTS):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def remove(self) -> None:
        """The folder, before the lock goes, so that nobody starts in there."""
        with suppress(FileNotFoundError):
            (self.folder / ARGUMENTS).unlink()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Leave what was begun to the next process, and no trace where nothing was."""
        if self._lock.closed:
            return
        if self._lock_stands() and not self.begun:
            (self.folder / LOCK).unlink()
            with suppress(OSError):  # somebody else's files lie there too
                self.folder.rmdir()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class StagedRows:
    """Rows of one structured dtype in `<name>.rows`, their records in `<name>.journal`.

    dtype: fields are the arrays of a row; None to go on with what is there.
    Each appended batch has a record, a JSON object of the caller's; `self.rows` counts the rows
    that are safely on disk. The journal's first line is the dtype. Raises FileNotFoundError where
    there is nothing sound to go on with and no dtype to begin with.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype | None = None) -> None:
        self._journal_path = folder / f"{name}.journal"
        self.rows = 0
        stated = self._stated_dtype()
        if stated is None and dtype is None:
            raise FileNotFoundError(self._journal_path)
        self._dtype: np.dtype[np.void] = np.dtype(dtype if stated is None else stated)  # type: ignore[assignment]
        if dtype is not None and dtype != self._dtype:
            raise ValueError(f"rows of {dtype}, not of {self._dtype}")
        self._data: BinaryIO = _open_for_update(folder / f"{name}.rows")
        self._journal: BinaryIO = _open_for_update(self._journal_path)
        journal_end = self._sound_end() if stated is not None else 0
        _cut(self._data, self.rows * self._dtype.itemsize)
        _cut(self._journal, journal_end)
        if stated is None:
            _write_through(self._journal, journal_line({"dtype": self._dtype.descr}, b""))

    def _stated_dtype(self) -> np.dtype | None:
        if not files.is_there(self._journal_path):
            return None
        with self._journal_path.open("rb") as journal:
            header = _checked(journal.readline(), b"")
        if header is None:
            return None
        return np.dtype([(name, kind, tuple(shape)) for name, kind, shape in header["dtype"]])

    def _sound_end(self) -> int:
        """Where the last batch ends that can be trusted, as can all before it; counts the rows."""
        size = self._data.seek(0, os.SEEK_END) // self._dtype.itemsize
        self._data.seek(0)
        with self._journal_path.open("rb") as journal:
            end = len(journal.readline())
            for line in journal:
                rows = _stated_rows(line) - self.rows
                if not 0 <= rows <= size - self.rows:
                    break
                if _checked(line, self._data.read(rows * self._dtype.itemsize)) is None:
                    break
                end += len(line)
                self.rows += rows
        return end

    @property
    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of each array of a row, by name."""
        names = self._dtype.names or ()
        return {name: (self._dtype[name].base, self._dtype[name].shape) for name in names}

    @property
    def bytes(self) -> int:
        """What the rows and their records take."""
        return self.rows * self._dtype.itemsize + self._journal_path.stat().st_size

    def append(self, values: Mapping[str, np.ndarray], record: dict[str, Any]) -> None:
        """Write a batch, for each field (B, …), and then the line that makes it count."""
        if values.keys() != self.arrays.keys():
            raise ValueError(f"rows of {', '.join(values)}, not of {', '.join(self.arrays)}")
        count = len(next(iter(values.values())))
        rows = np.empty(count, self._dtype)
        for name, array in values.items():
            if self._dtype[name] != np.dtype((array.dtype, array.shape[1:])):
                raise ValueError(f"rows of shape {array.shape[1:]}, not {self._dtype[name].shape}")
            rows[name] = array
        data = rows.tobytes()
        total = self.rows + count
        _write_through(self._data, data)
        _write_through(self._journal, journal_line({"rows": total, **record}, data))
        self.rows = total

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all batches, in order."""
        with self._journal_path.open("rb") as journal:
            journal.readline()
            for line in journal:
                yield json.loads(line[2 * DIGEST_BYTES :])

    def listed(self, key: str) -> Iterator[Any]:
        """The values of one name in all records, in order."""
        return (value for record in self.records() for value in record.get(key, ()))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop−1, (stop − start,) of the structured dtype."""
        self._data.seek(start * self._dtype.itemsize)
        return np.frombuffer(self._data.read((stop - start) * self._dtype.itemsize), self._dtype)

    def close(self) -> None:
        self._data.close()
        self._journal.close()


def journal_line(record: dict[str, Any], rows: bytes) -> bytes:
    """A line of the journal: BLAKE2b of the record and the rows that it stands for, the record."""
    text = json.dumps(record).encode()
    return _digest(text, rows) + text + b"\n"


def _digest(text: bytes, rows: bytes) -> bytes:
    digest = hashlib.blake2b(text, digest_size=DIGEST_BYTES)
    digest.update(rows)
    return digest.hexdigest().encode()


def _checked(line: bytes, rows: bytes) -> dict[str, Any] | None:
    """The record in a line; None where the line is incomplete or it or its rows are damaged."""
    stated, text = line[: 2 * DIGEST_BYTES], line[2 * DIGEST_BYTES : -1]
    if not line.endswith(b"\n") or _digest(text, rows) != stated:
        return None
    return json.loads(text)


def _stated_rows(line: bytes) -> int:
    """The rows up to its end that a line, which may be damaged, states; −1 where it states none."""
    try:
        total = json.loads(line[2 * DIGEST_BYTES :])["rows"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1
    return total if type(total) is int else -1


def _open_for_update(path: Path) -> BinaryIO:
    files.is_there(path)
    path.touch()
    return path.open("r+b", buffering=0)


def _cut(file: BinaryIO, size: int) -> None:
    file.truncate(size)
    file.seek(size)


def _write_through(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())
