"""Rows of images that were encoded before, in a finished cache or in an interrupted run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clip_adapter.cache import schema
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.staging import StagedRows
from clip_adapter.errors import UserError

# What rows are known by again, and what goes with them.
HASHES = ("stamps", "contents", "digests")
ARRAYS = ("features", "pre_projection")
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class EarlierRows:
    """The rows of one split.

    ids: N strings. stamps, contents, digests: (N,) uint64, see FORMAT.md.
    views: V of each. names: of the arrays that each row has. read: first row, row behind the last →
    these arrays, (M, V, …), as they are stored.
    """

    ids: list[str]
    stamps: npt.NDArray[np.uint64]
    contents: npt.NDArray[np.uint64]
    digests: npt.NDArray[np.uint64]
    views: int
    names: frozenset[str]
    read: Callable[[int, int], Arrays]

    def arrays(self, rows: npt.NDArray[np.int64]) -> dict[str, np.ndarray]:
        """(M, V, …) of the given rows, in that order; neighbours are read together."""
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        found = [self.read(int(run[0]), int(run[-1]) + 1) for run in runs]
        return {name: np.concatenate([piece[name] for piece in found]) for name in self.names}


def rows_of_cache(cache: FeatureCache) -> Iterator[EarlierRows]:
    """By split, what a cache holds with all hashes; the cache must stay open."""
    for split in cache.splits:
        stamps, contents, digests = (cache.hashes(split, name) for name in HASHES)
        if stamps is None or contents is None or digests is None:
            continue
        views, _, _ = cache.shape(split)
        names = frozenset(n for n in ARRAYS if cache.has_dataset(f"images/{split}/{n}"))

        def read(
            start: int, stop: int, split: str = split, names: frozenset[str] = names
        ) -> Arrays:
            return {
                name: cache.stored_rows(split, name, start, stop).transpose(1, 0, 2)
                for name in names
            }

        yield EarlierRows(cache.ids(split), stamps, contents, digests, views, names, read)


def rows_of_staging(folder: Path, stack: ExitStack) -> Iterator[EarlierRows]:
    """By split, what an interrupted run staged in `folder`, with all hashes.

    What cannot be read is left out: it is encoded again. The files are closed with `stack`.
    """
    for split in schema.SPLITS:
        try:
            staged = StagedRows(folder, split)
            stack.callback(staged.close)
            ids = list(staged.listed("ids"))
            stamps, contents, digests = (
                np.array(list(staged.listed(name)), np.uint64) for name in HASHES
            )
            views = staged.arrays["features"][1][0]
        except (OSError, ValueError, KeyError, TypeError, OverflowError, UserError):
            continue
        if {len(ids), len(stamps), len(contents), len(digests)} != {staged.rows}:
            continue

        def read(start: int, stop: int, staged: StagedRows = staged) -> Arrays:
            found = staged.read(start, stop)
            return {name: found[name] for name in staged.arrays}

        names = frozenset(staged.arrays)
        yield EarlierRows(ids, stamps, contents, digests, views, names, read)
