"""Rows that lie in several files, in any order, picked into the order of a data set."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.schema import ELEMENTS, HASHES, of_images, split_of
from clip_adapter.cache.stored_file import StoredFile

Rows = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""What each row has: by the names of elements the type, and the shape of a row."""


class Source(Protocol):
    """Where rows of images or classes lie."""

    @property
    def rows(self) -> Rows: ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """(stop − start, …): one element of consecutive rows."""


@dataclass(frozen=True)
class StoredRows:
    """The images of one split of a cache or a part, which must stay open."""

    file: StoredFile
    split: str

    @property
    def rows(self) -> Rows:
        described = {}
        for path, element in ELEMENTS.items():
            per_image = split_of(path) == self.split and "N" in element.axes
            computed = path.endswith(HASHES)  # of the others, where they are written
            if per_image and self.file.has_dataset(path) and not computed:
                shape = self.file.shape_of(path)
                row = shape[: element.row_axis] + shape[element.row_axis + 1 :]
                described[element.name] = (self.file.dtype_of(path), row)
        return described

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        path = of_images(self.split, name)
        return np.moveaxis(
            self.file.values_of(path, slice(start, stop)), ELEMENTS[path].row_axis, 0
        )


@dataclass(frozen=True)
class Places:
    """Where each of N rows lies: in which of the sources (N,), and in which row of it (N,)."""

    sources: Sequence[Source]
    source: npt.NDArray[np.int32]
    row: npt.NDArray[np.int64]

    def runs(self, chosen: slice) -> Iterator[tuple[Source, int, int]]:
        """Neighbours that lie together, in order: their source, first row, the one behind the
        last."""
        source, row = self.source[chosen], self.row[chosen]
        cuts = np.flatnonzero((np.diff(source) != 0) | (np.diff(row) != 1)) + 1
        for start, stop in zip([0, *cuts], [*cuts, len(row)], strict=True):
            yield self.sources[source[start]], int(row[start]), int(row[stop - 1]) + 1


@dataclass(frozen=True)
class Picked:
    """An element of N images, (N,) or (V, N, D) as in the file, read where it is sliced by rows.

    row: shape of each; there may be more views where it lies.
    """

    name: str
    places: Places
    dtype: np.dtype
    row: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.row[:1], len(self.places.row), *self.row[1:]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        """Of some rows, which the last slice says."""
        chosen = index[-1] if isinstance(index, tuple) else index
        if not len(self.places.row[chosen]):
            return np.empty(self.shape, self.dtype)
        runs = self.places.runs(chosen)
        views = (slice(None), slice(self.row[0])) if self.row else ()
        values = np.concatenate([source.read(self.name, *rows)[views] for source, *rows in runs])
        return np.moveaxis(values, 0, 1) if self.row else values


@dataclass(frozen=True)
class Chosen:
    """Strings of a long sequence, (N,), made where they are sliced: all may not fit in memory."""

    strings: Sequence[str]
    rows: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    def __getitem__(self, chosen: slice) -> np.ndarray:
        return np.array([self.strings[row] for row in self.rows[chosen].tolist()], object)


def picked(places: Places, rows: Rows) -> dict[str, Picked]:
    """By the names of elements."""
    return {name: Picked(name, places, *row) for name, row in rows.items()}
