"""How many images of a data set are in its cache, and which are not."""

from dataclasses import dataclass

import numpy as np

from clip_adapter.cache import layout
from clip_adapter.cache.writer import SKIPPED, SKIPPED_LABELS, CacheWriter


@dataclass(frozen=True)
class Tally:
    """What became of the images of a split.

    images: how many are in the cache. skipped: ids of the others. lost: labels that only they had.
    """

    images: int
    skipped: list[str]
    lost: list[int]


def tally(writer: CacheWriter) -> dict[str, Tally]:
    """What became of the images staged so far, by split. Four bytes per image are in memory."""
    return {split: _of_split(writer, split) for split in layout.SPLITS if writer.consumed(split)}


def _of_split(writer: CacheWriter, split: str) -> Tally:
    labels = np.fromiter(writer.listed(split, "labels"), np.int32)
    missing = np.fromiter(writer.listed(split, SKIPPED_LABELS), np.int32)
    lost = np.setdiff1d(missing, labels).tolist()
    return Tally(len(labels), list(writer.listed(split, SKIPPED)), lost)
