"""The rows of a split in their order, some encoded just now and some before."""

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.writer import CacheWriter
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.encoding.encoder import EncodedBatch
from clip_adapter.extract.reuse import NOWHERE, Known

KNOWN_AT_ONCE = 1024  # rows that are copied before they are written


class SplitRows:
    """Appends to a writer what is encoded and, before it and between it, what is known already.

    plan: which rows are encoded; all others from `start` on are known.
    """

    def __init__(
        self,
        writer: CacheWriter,
        name: str,
        split: Split,
        stamps: npt.NDArray[np.uint64],
        known: Known,
        plan: Plan,
        start: int,
    ) -> None:
        self._writer = writer
        self._name = name
        self._split = split
        self._stamps = stamps
        self._known = known
        self._views = plan.views
        self._next = start

    def append_known(self, stop: int) -> None:
        """The known rows up to `stop`, some at a time; there are no others before it."""
        while self._next < stop:
            rows = np.arange(self._next, min(self._next + KNOWN_AT_ONCE, stop))
            self._write(rows, self._of_known(rows), [])
            self._next += len(rows)

    def append(self, batch: EncodedBatch) -> None:
        """A batch, and the known rows before and between its own."""
        skipped = [image.row for image in batch.skipped]
        encoded = np.sort(np.concatenate([batch.rows, np.array(skipped, np.int64)]))
        first, last = int(encoded[0]), int(encoded[-1])
        if last + 1 - self._next > len(encoded) + KNOWN_AT_ONCE:
            self._append_sparse(batch, encoded)
            return
        self.append_known(first)
        self._append_mixed(batch, last + 1)

    def _append_sparse(self, batch: EncodedBatch, encoded: npt.NDArray[np.int64]) -> None:
        """So many known rows lie between that they are written on the way."""
        for row in encoded.tolist():
            if row - self._next >= KNOWN_AT_ONCE:
                self.append_known(row)
            self._append_mixed(batch, row + 1)

    def _append_mixed(self, batch: EncodedBatch, stop: int) -> None:
        rows = np.arange(self._next, stop)
        chosen = (batch.rows >= self._next) & (batch.rows < stop)
        skipped = [image.row for image in batch.skipped if self._next <= image.row < stop]
        known = rows[self._known.table[rows] != NOWHERE]
        written = np.setdiff1d(rows, np.array(skipped, np.int64))
        values = {name: array[chosen] for name, array in batch.of_each_image().items()}
        if len(known):
            order = np.argsort(np.concatenate([batch.rows[chosen], known]), kind="stable")
            before = self._of_known(known)
            values = {
                name: np.concatenate([array, before[name]])[order] for name, array in values.items()
            }
        self._write(written, values, skipped)
        self._next = stop

    def _of_known(self, rows: npt.NDArray[np.int64]) -> dict[str, np.ndarray]:
        """Of known rows what `EncodedBatch.of_each_image` gives of encoded ones."""
        found: dict[str, np.ndarray] = {}
        for places, table, earlier in self._known.pieces(rows):
            arrays = table.arrays(earlier)
            here = {name: array[:, : self._views] for name, array in arrays.items()}
            here |= {"digests": table.digests[earlier], "contents": table.contents[earlier]}
            for name, values in here.items():
                empty = np.empty((len(rows), *values.shape[1:]), values.dtype)
                found.setdefault(name, empty)[places] = values
        return found

    def _write(
        self, rows: npt.NDArray[np.int64], values: dict[str, np.ndarray], skipped: list[int]
    ) -> None:
        split = self._split
        self._writer.append_images(
            self._name,
            labels=split.labels[rows],
            ids=[split.ids[row] for row in rows],
            skipped=[split.ids[row] for row in skipped],
            skipped_labels=split.labels[skipped],
            stamps=self._stamps[rows],
            skipped_stamps=self._stamps[skipped],
            **values,
        )
