"""Images that belong together (a burst, a video, a patient) and stay on one side: of a draw, of a
choice, of a fold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.content import groups_in_several_splits
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.words import counted, quoted

Rows = npt.NDArray[np.int64]


def numbers_of(cache: FeatureCache, splits: Sequence[str] = ("train", "val")) -> Rows | None:
    """(N,) the group of each image of the splits that are there, one behind another, numbered as
    they first come; an image of a split without groups is one of its own. None where no split has
    some."""
    named = {split: cache.groups(split) for split in splits if split in cache.splits}
    if not any(named.values()):
        return None
    numbers: dict[object, int] = {}
    every: list[object] = []
    for split, names in named.items():
        every += names or [(split, row) for row in range(cache.shape(split)[1])]
    return np.array([numbers.setdefault(name, len(numbers)) for name in every], np.int64)


def identity_of(groups: Rows | None) -> str:
    """Which images belong together, "" for none; names have no say."""
    if groups is None:
        return ""
    digest = hashlib.sha256(groups.tobytes()).hexdigest()[:16]
    return f"{counted(int(groups.max()) + 1, 'group')} {digest}"


def tested_twins(cache: FeatureCache, *, join: bool = False) -> str:
    """A sentence on groups whose images are both trained on and tested, "" where there are none.
    join: images of val are trained on, too."""
    names = {s: cache.groups(s) for s in cache.splits if s != "val"}
    if join and "val" in cache.splits:
        train, val = (cache.groups(split) or [] for split in ("train", "val"))
        names["train"] = [*train, *val]
    if not (shared := groups_in_several_splits(names)):
        return ""
    return (
        f"{counted(len(shared), 'group has', 'groups have')} images in train and in test, such as "
        f"{quoted(shared[0][0])}: test accuracy is partly of images like those trained on."
    )


def fold_of(units: Rows, labels: npt.NDArray[np.int32], support: Rows, most: int) -> Rows | None:
    """Deals groups to folds, as many as the class of fewest groups has and `most` at most.

    Groups of most images come first, equal ones in drawing order; each goes where there are fewest
    images of its classes, so that groups of one image each are dealt in turn. An image that was
    drawn repeatedly counts once.

    units: (S,) of which group each support image is. support: which image. Returns (S,), None where
    some class would lie in one fold as a whole.
    """
    count = min(len(np.unique(units[labels == label])) for label in np.unique(labels))
    count = min(count, most)
    if count < 2:
        return None
    folds = np.empty(len(units), np.int64)
    dealt = np.zeros((count, int(labels.max()) + 1), np.int64)
    _, first = np.unique(support, return_index=True)  # each image once
    names, start = np.unique(units, return_index=True)
    members = {unit: np.flatnonzero(units == unit) for unit in names[np.argsort(start)].tolist()}
    once = {unit: np.intersect1d(own, first) for unit, own in members.items()}
    for unit in sorted(members, key=lambda one: -len(once[one])):
        own = np.bincount(labels[once[unit]], minlength=dealt.shape[1])
        fold = int(dealt[:, own > 0].sum(axis=1).argmin())
        dealt[fold] += own
        folds[members[unit]] = fold
    missing = (dealt == dealt.sum(axis=0)) & (dealt > 0)
    return None if missing.any() else folds


def folds_of_some(units: Rows, labels: npt.NDArray[np.int32], support: Rows, most: int) -> Rows:
    """As `fold_of`, of the images whose class, and those of whose group, have several groups; −1 of
    the others, and of all where those cannot be divided."""
    free, before = np.ones(len(units), bool), np.zeros(len(units), bool)
    while (free != before).any():  # what is taken out may leave another class one group
        before = free.copy()
        counts = [len(np.unique(units[free & (labels == n)])) for n in range(labels.max() + 1)]
        free &= np.array(counts)[labels] > 1
        free &= ~np.isin(units, units[~free])
    folds = np.full(len(units), -1, np.int64)
    if free.any():
        divided = fold_of(units[free], labels[free], support[free], most)
        folds[free] = -1 if divided is None else divided
    return folds
