"""The rows of a split in their order, some encoded just now and some before."""

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.writer import CacheWriter
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.decode import Plan
from clip_adapter.extract.encode import EncodedBatch
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
            features, digests, contents = self._of_known(rows)
            self._write(rows, features, digests, contents, [])
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
        features, digests, contents = (
            batch.features[chosen], batch.digests[chosen], batch.contents[chosen],
        )  # fmt: skip
        if len(known):
            order = np.argsort(np.concatenate([batch.rows[chosen], known]), kind="stable")
            pairs = zip((features, digests, contents), self._of_known(known), strict=True)
            features, digests, contents = (np.concatenate(pair)[order] for pair in pairs)
        self._write(written, features, digests, contents, skipped)
        self._next = stop

    def _of_known(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[np.ndarray, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Features (M, V, D), digests and contents of known rows."""
        features: np.ndarray | None = None
        digests, contents = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
        for places, table, earlier in self._known.pieces(rows):
            found = table.features(earlier)[:, : self._views]
            if features is None:
                features = np.empty((len(rows), *found.shape[1:]), found.dtype)
            features[places] = found
            digests[places], contents[places] = table.digests[earlier], table.contents[earlier]
        assert features is not None
        return features, digests, contents

    def _write(
        self,
        rows: npt.NDArray[np.int64],
        features: np.ndarray,
        digests: npt.NDArray[np.uint64],
        contents: npt.NDArray[np.uint64],
        skipped: list[int],
    ) -> None:
        split = self._split
        self._writer.append_images(
            self._name,
            features,
            split.labels[rows],
            [split.ids[row] for row in rows],
            [split.ids[row] for row in skipped],
            digests,
            split.labels[skipped],
            stamps=self._stamps[rows],
            contents=contents,
            skipped_stamps=self._stamps[skipped],
        )
