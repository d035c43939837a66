"""The folder in which a cache grows, and the one process that may write there."""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from clip_adapter.cache import atomic
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.lock import take_lock

ARGUMENTS = "arguments.json"
LOCK = "lock"


class Workplace:
    """`<path>.partial`, which belongs to this process until it is closed.

    own: what only this folder has to agree on with an interrupted run, such as the shard, which
        is no argument of the cache that the parts make together.
    Raises UserError where it cannot be made or belongs to another process.
    """

    def __init__(self, path: Path, own: Mapping[str, Any] | None = None) -> None:
        if path.is_dir():
            raise UserError(f"Cannot write {path}: it is a folder; name a file.")
        self.path = path
        self._own = dict(own or {})
        self.folder = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
        except FileExistsError as error:
            raise UserError(f"Cannot write {path}: {error.filename} is not a folder.") from error
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
        # Between opening and locking it, the process before may have finished and removed it.
        if not (take_lock(self._lock.fileno(), path) and self._lock_stands()):
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
        earlier = self.read(ARGUMENTS)
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

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object in one of the files here. Raises UserError where there is none."""
        try:
            found = json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise self.damaged(name) from error
        if not isinstance(found, dict):
            raise self.damaged(name)
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
        elif self.read(ARGUMENTS) == json.loads(stated):
            return
        atomic.write_text(self.folder / ARGUMENTS, stated)

    def empty(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

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
