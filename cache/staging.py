"""An array that grows on disk by whole batches and survives being killed at any point.

HDF5 cannot promise that: a process killed while it writes may leave a file that does not open.
So rows are staged in a plain binary file beside a journal of JSON lines. A batch counts once its
journal line is complete and its rows are there; whatever lies beyond the last such batch is cut
off when the pair is opened again. The HDF5 file is assembled from staged rows at the end.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class StagedRows:
    """Rows of shape (inner, dim) in `<name>.rows`, their records in `<name>.journal`.

    Each appended batch has a record, a JSON object of the caller's; `self.rows` counts the rows
    that are safely on disk.
    """

    def __init__(self, folder: Path, name: str, inner: int, dim: int, dtype: np.dtype) -> None:
        self.inner, self.dim, self.dtype = inner, dim, np.dtype(dtype)
        self._row_bytes = inner * dim * self.dtype.itemsize
        self._journal_path = folder / f"{name}.journal"
        self._data: BinaryIO = _open_for_update(folder / f"{name}.rows")
        self._journal: BinaryIO = _open_for_update(self._journal_path)
        self.rows = 0
        journal_end = 0
        rows_on_disk = self._data.seek(0, os.SEEK_END) // self._row_bytes
        for line in self._journal:
            if not line.endswith(b"\n"):
                break
            rows = json.loads(line)["rows"]
            if rows > rows_on_disk:
                break
            journal_end += len(line)
            self.rows = rows
        self._cut(self._journal, journal_end)
        self._cut(self._data, self.rows * self._row_bytes)

    def append(self, values: np.ndarray, record: dict[str, Any]) -> None:
        """Write a batch, (B, inner, dim), and then the line that makes it count."""
        rows = np.ascontiguousarray(values, self.dtype)
        if rows.shape[1:] != (self.inner, self.dim):
            raise ValueError(f"rows of shape {rows.shape[1:]}, expected {(self.inner, self.dim)}")
        total = self.rows + len(rows)
        _write_through(self._data, rows.tobytes())
        _write_through(self._journal, json.dumps({"rows": total, **record}).encode() + b"\n")
        self.rows = total

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all batches, in order."""
        with self._journal_path.open("rb") as journal:
            for line in journal:
                yield json.loads(line)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop−1, (stop − start, inner, dim)."""
        self._data.seek(start * self._row_bytes)
        values = np.frombuffer(self._data.read((stop - start) * self._row_bytes), self.dtype)
        return values.reshape(stop - start, self.inner, self.dim)

    def close(self) -> None:
        self._data.close()
        self._journal.close()

    @staticmethod
    def _cut(file: BinaryIO, size: int) -> None:
        file.truncate(size)
        file.seek(size)


def _open_for_update(path: Path) -> BinaryIO:
    path.touch()
    return path.open("r+b", buffering=0)


def _write_through(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())
