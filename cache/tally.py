"""What became of the images of a data set: in the cache, missing from it, or in two splits."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.cache import schema
from clip_adapter.cache.writer import CacheWriter

EXAMPLES = 20


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
    return {split: _of_split(writer, split) for split in schema.SPLITS if writer.consumed(split)}


def _of_split(writer: CacheWriter, split: str) -> Tally:
    labels = np.fromiter(writer.listed(split, "labels"), np.int32)
    missing = np.fromiter(writer.listed(split, "skipped_labels"), np.int32)
    lost = np.setdiff1d(missing, labels).tolist()
    return Tally(len(labels), list(writer.listed(split, "skipped")), lost)


def in_several_splits(writer: CacheWriter) -> dict[str, Any] | None:
    """Which of the staged images have equal pixels and different splits; None where none do.

    Returns {"images": how many distinct ones, "examples": at most twenty pairs of "SPLIT/ID"}.
    Eight bytes per image are in memory.
    """
    digests = {
        split: np.fromiter(writer.listed(split, "digests"), np.uint64) for split in schema.SPLITS
    }
    shared = np.zeros(0, np.uint64)
    examples: list[list[str]] = []
    for one, other in combinations(schema.SPLITS, 2):
        common = np.intersect1d(digests[one], digests[other])
        shared = np.union1d(shared, common)
        chosen = common[: EXAMPLES - len(examples)]
        pairs = [_ids(writer, split, digests[split], chosen) for split in (one, other)]
        examples += [[pairs[0][d], pairs[1][d]] for d in chosen.tolist()]
    return {"images": len(shared), "examples": examples} if len(shared) else None


def _ids(
    writer: CacheWriter,
    split: str,
    digests: npt.NDArray[np.uint64],
    wanted: npt.NDArray[np.uint64],
) -> dict[int, str]:
    """For each wanted digest an image of the split that has it."""
    rows = set(np.flatnonzero(np.isin(digests, wanted)).tolist())
    return {
        int(digests[row]): f"{split}/{name}"
        for row, name in enumerate(writer.listed(split, "ids"))
        if row in rows
    }
