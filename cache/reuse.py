"""Rows of images that were encoded before, in a finished cache or in an interrupted run."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clip_adapter.cache import layout
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.staging import StagedRows
from clip_adapter.cache.writer import CONTENTS, DIGESTS, STAMPS

# Beside each other in FORMAT.md: what rows are known by again, and what goes with them.
HASHES = (STAMPS, CONTENTS, DIGESTS)


@dataclass(frozen=True)
class EarlierRows:
    """The rows of one split.

    ids: N strings. stamps, contents, digests: (N,) uint64, see FORMAT.md.
    views: V of each. read: first row, row behind the last → features (M, V, D) as they are stored.
    """

    ids: list[str]
    stamps: npt.NDArray[np.uint64]
    contents: npt.NDArray[np.uint64]
    digests: npt.NDArray[np.uint64]
    views: int
    read: Callable[[int, int], np.ndarray]

    def features(self, rows: npt.NDArray[np.int64]) -> np.ndarray:
        """(M, V, D) of the given rows, in that order; neighbours are read together."""
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        return np.concatenate([self.read(int(run[0]), int(run[-1]) + 1) for run in runs])


def rows_of_cache(cache: FeatureCache) -> Iterator[EarlierRows]:
    """By split, what a cache holds with all hashes; the cache must stay open."""
    for split in cache.splits:
        stamps, contents, digests = (cache.hashes(split, name) for name in HASHES)
        if stamps is None or contents is None or digests is None:
            continue
        views, _, _ = cache.shape(split)

        def read(start: int, stop: int, split: str = split) -> np.ndarray:
            return cache.stored_features(split, start, stop).transpose(1, 0, 2)

        yield EarlierRows(cache.ids(split), stamps, contents, digests, views, read)


def rows_of_staging(folder: Path, stack: ExitStack) -> Iterator[EarlierRows]:
    """By split, what an interrupted run staged in `folder`, with all hashes.

    What cannot be read is left out: it is encoded again. The files are closed with `stack`.
    """
    for split in layout.SPLITS:
        try:
            shape = json.loads((folder / f"{split}.shape").read_text())
            dtype = np.dtype(shape["dtype"])
            staged = StagedRows(folder, split, shape["inner"], shape["dim"], dtype)
            stack.callback(staged.close)
            records = list(staged.records())
            ids = [name for record in records for name in record["ids"]]
            stamps, contents, digests = (
                np.array([value for record in records for value in record[name]], np.uint64)
                for name in HASHES
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue
        if {len(ids), len(stamps), len(contents), len(digests)} == {staged.rows}:
            yield EarlierRows(ids, stamps, contents, digests, staged.inner, staged.read)
