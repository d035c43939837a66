"""Images that are equal or near-equal, and those that lie on two sides of a split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.neighbours import grouped, near_equal
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.listener import Listener
from clip_adapter.words import counted

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
MOST = 20_000  # images that `extract` compares with each other: four seconds at width 512
OWN_CUT = "stratified by class, seed"  # how a split's origin ends that `extract` has cut itself


@dataclass(frozen=True)
class Twins:
    """Of N images: pairs of equal ones, (P, 2), and the number of the group that they and those
    that are near-equal make, (N,), −1 for others. of_split: (N,) which split each is of."""

    equal: Rows
    groups: Rows
    of_split: Rows

    @property
    def count(self) -> int:
        """Of groups."""
        return int(self.groups.max(initial=-1)) + 1

    @property
    def across(self) -> Mask:
        """(N,): whether an image has a twin in another split."""
        return self._several(self.of_split)

    def ordered(self, order: Rows) -> Twins:
        """The same of the images in another order."""
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        rest = self.groups[order], self.of_split[order]
        return Twins(place[self.equal], *rest)

    def disagree(self, labels: npt.NDArray[np.int32]) -> Mask:
        """(N,): whether an image has a twin with another label."""
        return self._several(labels)

    def _several(self, values: npt.NDArray[np.integer]) -> Mask:
        """Whether an image's group has several of these values of images."""
        found = np.zeros(len(values), np.bool_)
        rows = np.flatnonzero(self.groups >= 0)
        lowest, highest = np.full(self.count, values.max(initial=0)), np.zeros(self.count, int)
        np.minimum.at(lowest, self.groups[rows], values[rows])
        np.maximum.at(highest, self.groups[rows], values[rows])
        found[rows] = (lowest < highest)[self.groups[rows]]
        return found


def find_twins(
    features: npt.NDArray[np.float32], keys: npt.NDArray[np.uint64], of_split: Rows
) -> Twins:
    """features: (N, D), un-normalised. keys: (N,), equal for images with equal pixels."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    equal = np.stack([order[:-1][same], order[1:][same]], axis=1)
    pairs = np.concatenate([equal, near_equal(features)])
    return Twins(equal, grouped(pairs, len(keys)), of_split)


def near_equal_across(cache: FeatureCache) -> dict[str, int]:
    """For each split but the first how many of its images have a near-equal one in another."""
    features = [cache.images(split, views=1).features[0] for split in cache.splits]
    of_split = np.repeat(np.arange(len(features)), [len(own) for own in features])
    every = np.arange(len(of_split), dtype=np.uint64)
    across = find_twins(np.concatenate(features), every, of_split).across
    return {
        split: int(np.count_nonzero(across & (of_split == number)))
        for number, split in enumerate(cache.splits)
        if number
    }


def warn_of_near_equal(path: Path, listener: Listener) -> None:
    """Say of a cache whose splits `extract` has cut itself, and that is soon compared, how many
    images of one have a near-equal neighbour in another."""
    with FeatureCache(path) as cache:
        stated = cache.dataset["splits"]
        cut = any(OWN_CUT in str(stated.get(split, "")) for split in cache.splits)
        if not cut or sum(cache.shape(split)[1] for split in cache.splits) > MOST:
            return
        found = {split: n for split, n in near_equal_across(cache).items() if n}
    if found:
        listed = " and ".join(f"{n:,} of {split}" for split, n in found.items())
        count = counted(sum(found.values()), "image has", "images have")
        listener.warn(
            f"{count} a near-equal one in another split ({listed}), which makes accuracies look "
            f"better than they are on new images: clip-adapter audit {path.name} lists them, and "
            "--group keeps images together that belong together."
        )
