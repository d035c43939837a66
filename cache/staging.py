"""Where a cache grows: a folder that one process owns, with batches that survive being killed.

HDF5 cannot promise that: a process killed while it writes may leave a file that does not open. So
each batch of rows is a file of its own, whose name is the checksum of what is in it; what has
another name than that is none. They lie there in any order: a row is known by its image, and the
HDF5 file is made in the order of the data set at the end.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clip_adapter import files
from clip_adapter.cache.content import check_features
from clip_adapter.errors import UserError

ARGUMENTS = "arguments.json"
LOCK = "lock"
BATCH = ".batch"
DESCRIPTION = "rows"  # in a batch, of what and by which names its rows are known
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
        self._goes_on = False  # whether what is encoded is kept where writing fails
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
        earlier = self._read_arguments()
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

    def _read_arguments(self) -> dict[str, Any]:
        path = self.folder / ARGUMENTS
        try:
            files.is_there(path)
            stated = files.parse_json(path.read_text())
            if not isinstance(stated, dict):
                raise TypeError
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} is damaged or cannot be read; use --force to start again."
            ) from error
        return stated

    def begin(
        self,
        arguments: dict[str, Any],
        *,
        restart: bool = False,
        may_differ: Collection[str] = (),
    ) -> None:
        """Write down what this run is, and begin it or go on with what lies here.

        restart: leave nothing to go on with. Raises UserError as `refuse_other` does, and where
        the disk is full.
        """
        self._goes_on = not restart
        with self.writing():
            if restart:
                self.empty()
            self.refuse_other(arguments, may_differ=may_differ)
            if not self.begun:
                self.empty()
            stated = json.dumps(arguments | self._own, sort_keys=True)
            files.write_text(self.folder / ARGUMENTS, stated)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns errors of the disk into a sentence."""
        try:
            yield
        # HDF5 raises RuntimeError where it fails to write on closing.
        except (OSError, RuntimeError) as error:
            number = getattr(error, "errno", None)
            reason = os.strerror(number) if number else " ".join(str(error).split())[:200]
            kept = "what is encoded is kept beside it, and the same command goes on from there"
            advice = kept if self._goes_on else "mend that and start again"
            raise UserError(f"Cannot write {self.path}: {reason}; {advice}.") from error

    def add(self, kind: str, ids: Sequence[str], arrays: Mapping[str, np.ndarray]) -> "Batch":
        """Keep a batch of rows, (B, …) by the names of elements.

        kind: what the rows are of. ids: B, by which they are known again.
        Raises UserError for features that are not finite or zero, and where the disk is full.
        """
        for array in arrays.values():
            if array.dtype.kind == "f":
                check_features(array, ids)
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        content = save(tensors, {DESCRIPTION: json.dumps([kind, *ids])})
        digest = _digest()
        digest.update(content)
        path = self.folder / f"{digest.hexdigest()}{BATCH}"
        with self.writing():
            files.write_bytes(path, content)
        rows = {name: (array.dtype, array.shape[1:]) for name, array in tensors.items()}
        return Batch(path, kind, len(ids), rows)

    def batches(self) -> Iterator[tuple["Batch", list[str]]]:
        """Those that are whole, with the ids of their rows, in any order. Others are removed."""
        for path in sorted(self.folder.glob(f"*{BATCH}")):
            try:
                if files.other_kind(path) is not None:
                    raise ValueError
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, _digest).hexdigest()
                if digest != path.stem:
                    raise ValueError
                with safe_open(path, framework="np") as batch:
                    kind, *ids = json.loads(batch.metadata()[DESCRIPTION])
                    first = {name: batch.get_slice(name)[:1] for name in batch.keys()}  # noqa: SIM118
            except (OSError, ValueError, TypeError, KeyError, SafetensorError):
                _remove(path)
            else:
                rows = {name: (values.dtype, values.shape[1:]) for name, values in first.items()}
                yield Batch(path, kind, len(ids), rows), ids

    def empty(self) -> None:
        """Remove all but the lock; the arguments first, without which nothing here counts."""
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name != ARGUMENTS):
            if entry.name != LOCK:
                _remove(entry)

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


@dataclass(frozen=True)
class Batch:
    """A file of rows. kind: what they are of. rows: by the names of elements, the type and the
    shape of a row."""

    path: Path
    kind: str
    count: int
    rows: Mapping[str, tuple[np.dtype, tuple[int, ...]]]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """(stop − start, …): one element of consecutive rows."""
        with safe_open(self.path, framework="np") as batch:
            return batch.get_slice(name)[start:stop]


def _digest() -> Any:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
