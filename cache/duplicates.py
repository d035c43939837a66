"""The same image in two splits."""

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.cache import layout
from clip_adapter.cache.writer import DIGESTS, CacheWriter

EXAMPLES = 20


def in_several_splits(writer: CacheWriter) -> dict[str, Any] | None:
    """Which of the staged images have equal pixels and different splits; None where none do.

    Returns {"images": how many distinct ones, "examples": at most twenty pairs of "SPLIT/ID"}.
    Eight bytes per image are in memory.
    """
    digests = {
        split: np.fromiter(writer.listed(split, DIGESTS), np.uint64) for split in layout.SPLITS
    }
    shared = np.zeros(0, np.uint64)
    examples: list[list[str]] = []
    for one, other in combinations(layout.SPLITS, 2):
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
