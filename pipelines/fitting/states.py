"""States of runs that may go on, kept on disk: a CRC-32, then a safetensors file."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from zlib import crc32

from safetensors import SafetensorError
from safetensors.numpy import load, save

from clip_adapter import files
from clip_adapter.adapters.engine.evaluation import Leaves
from clip_adapter.errors import UserError

SUFFIX = ".state"
CHECKSUM_BYTES = 4


class StateFolder(MutableMapping[str, Leaves]):
    """A file for each state; the folder is there only while it has any.

    A state that cannot be read, or was changed, counts as lost: looking it up raises KeyError.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def __getitem__(self, name: str) -> Leaves:
        path = self._path(name)
        if not path.is_file():
            raise KeyError(name)
        try:
            stored = path.read_bytes()
            content = stored[CHECKSUM_BYTES:]
            if stored[:CHECKSUM_BYTES] != _checksum(content):
                raise KeyError(name)
            tensors = load(content)
            return [tensors[str(index)] for index in range(len(tensors))]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise KeyError(name) from None

    def __setitem__(self, name: str, leaves: Leaves) -> None:
        content = save({str(index): leaf for index, leaf in enumerate(leaves)})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Megabytes for each setting: waiting for the disk would take as long as training.
            files.write_bytes(self._path(name), _checksum(content) + content, sync=False)
        except OSError as error:
            raise UserError(f"Cannot write to {self._folder}: {error.strerror}.") from error

    def __delitem__(self, name: str) -> None:
        if not self._path(name).exists():
            raise KeyError(name)
        self._path(name).unlink()
        with suppress(OSError):  # not empty yet
            self._folder.rmdir()
            self._folder.parent.rmdir()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self._folder.glob(f"*{SUFFIX}"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _checksum(content: bytes) -> bytes:
    return crc32(content).to_bytes(CHECKSUM_BYTES, "big")
