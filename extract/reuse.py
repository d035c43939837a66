"""Which images of a data set were encoded before and have not changed since."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.reuse import EarlierRows
from clip_adapter.extract.datasets.source import ImageDataset, Split
from clip_adapter.extract.fingerprints import UNKNOWN, content

NOWHERE = -1
Stamps = Mapping[str, npt.NDArray[np.uint64]]


def listing_sha256(dataset: ImageDataset, stamps: Stamps, other: Mapping[str, Any]) -> str:
    """SHA-256 over every split's ids, labels and stamps, in order, and over `other`, JSON."""
    digest = hashlib.sha256(json.dumps(other, sort_keys=True).encode())
    for name, split in dataset.splits.items():
        digest.update(rows_sha256({name: split}).encode())
        digest.update(stamps[name].tobytes())
    return digest.hexdigest()


def rows_sha256(splits: Mapping[str, Split]) -> str:
    """SHA-256 over the ids and labels of every split, in order."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(json.dumps([name, *split.ids]).encode())
        digest.update(np.ascontiguousarray(split.labels, np.int32).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Known:
    """Where the features of a split's images lie already.

    table: (N,) which of `tables`, NOWHERE for images that have to be encoded. row: (N,) in there.
    """

    tables: Sequence[EarlierRows]
    table: npt.NDArray[np.int32]
    row: npt.NDArray[np.int64]

    def pieces(
        self, rows: npt.NDArray[np.int64]
    ) -> Iterator[tuple[npt.NDArray[np.int64], EarlierRows, npt.NDArray[np.int64]]]:
        """`rows` of the split, all of them known, table by table: which places among them, the
        table, and the rows in it."""
        for number in np.unique(self.table[rows]).tolist():
            places = np.flatnonzero(self.table[rows] == number)
            yield places, self.tables[number], self.row[rows[places]]


class Earlier:
    """Rows that were encoded before, by the ids of their images.

    names: of the arrays that each row gets now; rows with others are not known.
    """

    def __init__(self, tables: Sequence[EarlierRows], names: frozenset[str]) -> None:
        self._tables = tables = [table for table in tables if table.names == names]
        self._places: dict[str, list[tuple[int, int]]] = {}
        for number, table in enumerate(tables):
            for row, name in enumerate(table.ids):
                self._places.setdefault(name, []).append((number, row))

    def find(self, split: Split, stamps: npt.NDArray[np.uint64], views: int, workers: int) -> Known:
        """Those of a split's images that are known, with at least so many views.

        An image is known by its id and its stamp, or, where that differs, by its content, which is
        read in so many threads.
        """
        count = len(split.ids)
        found = Known(self._tables, np.full(count, NOWHERE, np.int32), np.zeros(count, np.int64))
        doubtful = []
        for row, name in enumerate(split.ids if self._places else ()):
            places = self._places.get(name, ())
            candidates = [place for place in places if self._tables[place[0]].views >= views]
            for number, earlier in candidates:
                if stamps[row] != UNKNOWN and self._tables[number].stamps[earlier] == stamps[row]:
                    found.table[row], found.row[row] = number, earlier
                    break
            else:
                if candidates and split.file is not None:
                    doubtful.append((row, candidates))
        if split.file is not None:
            self._settle(doubtful, split.file, found, workers)
        return found

    def _settle(
        self,
        doubtful: list[tuple[int, list[tuple[int, int]]]],
        file: Callable[[int], Path],
        found: Known,
        workers: int,
    ) -> None:
        with ThreadPoolExecutor(workers, thread_name_prefix="compare") as pool:
            contents = pool.map(content_or_unknown, (file(row) for row, _ in doubtful))
            for (row, candidates), now in zip(doubtful, contents, strict=True):
                for number, earlier in candidates:
                    if now != UNKNOWN and self._tables[number].contents[earlier] == now:
                        found.table[row], found.row[row] = number, earlier
                        break


def content_or_unknown(path: Path) -> int:
    """UNKNOWN where it is no readable file."""
    try:
        return content(path)
    except OSError:
        return UNKNOWN
