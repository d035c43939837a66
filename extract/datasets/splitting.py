"""Seeded, stratified splits for sources that publish none."""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from clip_adapter.cache.schema import ALL_SPLITS
from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.source import SourceOptions, Split, splits_among
from clip_adapter.words import counted, quoted

Rows = npt.NDArray[np.int64]
Of = TypeVar("Of")
# What CoOp did with data sets that publish no splits (50 / 20 / 30 %), and with those that publish
# no val (20 % of train).
DEFAULT_FRACTIONS = {"val": 0.2, "test": 0.3}


def complete_splits(
    splits: Mapping[str, Split],
    class_names: Sequence[str],
    options: SourceOptions,
    *,
    published: bool = True,
) -> dict[str, Split]:
    """The splits in the order of ALL_SPLITS, with what is missing made out of train.

    A published data set with a val split but no test split is tested on the former, as the
    literature does with ImageNet and Food-101; what people call val themselves stays val. What is
    missing then is cut out of train, class by class, with the fractions and the seed of `options`;
    a fraction of 0 makes no such split. A source without train is left as it is. Which images of a
    class go where, the order of their hashes decides: one that comes or goes moves at most one
    of its class across each cut, and nothing else has a say. Images of one group stay together
    (see `grouped_parts`).

    Raises UserError for fractions that are impossible or ask for a split that is there already,
    and for a class with too few images to be divided.
    """
    whole = dict(splits)
    if published and "test" not in whole and "val" in whole:
        val = whole.pop("val")
        whole["test"] = replace(val, origin=f"{val.origin}, used as test split")
    refuse_fractions(options, whole)
    fractions = _fractions(options, [name for name in DEFAULT_FRACTIONS if name not in whole])
    if "train" in whole and fractions:
        train = whole.pop("train")
        whole.update(_divide(train, fractions, class_names, options.seed))
    return {name: whole[name] for name in ALL_SPLITS if name in whole}


def labelled_splits(
    source: str, counts: Mapping[str, int], labelled: Callable[[str], tuple[Split | None, int]]
) -> tuple[dict[str, Split], list[str]]:
    """The splits that a source's own names mean, and a remark on the images that are in none.

    counts: own name → images. labelled: own name → the images that have a label, None where none
        has one that counts, and how many have none.
    Raises UserError where no split is left.
    """
    splits: dict[str, Split] = {}
    left_out = []
    means = splits_among(counts)
    for name, count in counts.items():
        meant = means.get(name)
        if meant is None or meant in splits:
            left_out.append(f"{counted(count, 'image')} of the split {quoted(name)}")
            continue
        split, unlabelled = labelled(name)
        if unlabelled:
            images = counted(unlabelled, "image")
            left_out.append(f"{images} of the split {quoted(name)} without a label")
        if split is not None:
            splits[meant] = split
    if not splits:
        raise UserError(
            f"{source} has no train, validation or test split with labels; "
            f"it has {', '.join(counts)}."
        )
    return splits, [f"left out {' and '.join(left_out)}."] if left_out else []


def refuse_fractions(options: SourceOptions, published: Mapping[str, Split]) -> None:
    """Raises UserError where a fraction is asked for that the published splits have no use for,
    and for a seed that no generator takes."""
    if options.seed < 0:
        raise UserError("--split-seed must not be negative.")
    for name in DEFAULT_FRACTIONS:
        if getattr(options, name) is None:
            continue
        if name in published:
            raise UserError(f"This data set has a {name} split of its own; leave out --{name}.")
        if "train" not in published:
            what = "for testing only" if "test" in published else "of images without labels"
            raise UserError(f"This data set is {what}; leave out --{name}.")


def _fractions(options: SourceOptions, missing: Sequence[str]) -> dict[str, float]:
    fractions = {}
    for name in missing:
        own = getattr(options, name)
        fractions[name] = DEFAULT_FRACTIONS[name] if own is None else own
    if (
        any(not 0 <= fraction < 1 for fraction in fractions.values())
        or sum(fractions.values()) >= 1
    ):
        asked_for = " and ".join(f"--{name} {value:g}" for name, value in fractions.items())
        raise UserError(
            f"{asked_for} leave nothing to train on; give fractions from 0 that sum to less than 1."
        )
    return {name: fraction for name, fraction in fractions.items() if fraction > 0}


def _divide(
    train: Split, fractions: Mapping[str, float], class_names: Sequence[str], seed: int
) -> dict[str, Split]:
    rest = 1 - sum(fractions.values())
    shares = {"train": rest, **fractions}
    if train.groups:
        rows_of_parts = grouped_parts(train, list(shares.values()), seed)
    else:
        hashes = np.array([_hash(train, row, seed) for row in range(len(train.ids))], np.uint64)
        rows_of_parts = stratified_parts(
            train.labels, list(shares.values()), lambda rows: rows[np.argsort(hashes[rows])]
        )
    parts = dict(zip(shares, rows_of_parts, strict=True))
    counts = np.bincount(train.labels, minlength=len(class_names))
    for name in shares.keys() & {"train", "test"}:
        left = np.bincount(train.labels[parts[name]], minlength=len(class_names))
        for label in np.flatnonzero((counts > 0) & (left == 0)).tolist():
            images, more = counted(counts[label], "image"), "images"
            if train.groups:
                own = {train.groups[row] for row in np.flatnonzero(train.labels == label).tolist()}
                images, more = f"{images} in {counted(len(own), 'group')}", "groups"
            raise UserError(
                f"Class {class_names[label]!r} has {images}, too few to give "
                f"{' and '.join(shares)} their share; add {more} to it or change --val and --test."
            )
    for name, part in parts.items():
        if not len(part):
            raise UserError(
                f"{shares[name]:.0%} of every class is no image at all: the {name} split would be "
                f"empty; raise --{name}, or give --{name} 0 to do without."
            )
    how = f"stratified by class{', groups kept together' if train.groups else ''}, seed {seed}"
    return {
        name: take(train, parts[name], f"{share:.0%} of {train.origin}, {how}")
        for name, share in shares.items()
    }


def _hash(split: Split, row: int, seed: int) -> int:
    if split.content is None:
        return _hash_of_name(split.ids[row], seed)
    return _hash_of(split.content(row), seed)


def _hash_of_name(name: str, seed: int) -> int:
    """In one normal form, since file systems differ in how they write an é."""
    return _hash_of(unicodedata.normalize("NFC", name).encode(errors="surrogatepass"), seed)


def _hash_of(own: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(b"%d " % seed + own, digest_size=8).digest())


def grouped_parts(split: Split, shares: Sequence[float], seed: int) -> list[Rows]:
    """Disjoint sets of rows, one per share (of train, val and test, in this order), that no group
    lies in two of.

    The largest groups come first, equal ones in the order of their names' hashes; each goes where
    its classes lack most of their share. Where a class has only as many groups left as there are
    parts without it, these come first, and val last, so that two groups give train and test one.
    The sum of the shares is 1.
    """
    assert split.groups is not None
    names, group_of = np.unique(np.array(split.groups, object), return_inverse=True)
    if len(names) == 1:
        raise UserError(
            f"All images are of one group, {quoted(names[0])}, so that nothing can be divided; say "
            "with --group what tells groups apart, or leave it out."
        )
    rows = np.split(np.argsort(group_of, kind="stable"), np.cumsum(np.bincount(group_of))[:-1])
    totals = np.bincount(split.labels)
    wanted = np.outer(shares, totals)
    there = np.zeros(wanted.shape, bool)
    left = np.bincount(np.concatenate([np.unique(split.labels[own]) for own in rows]))
    parts: list[list[Rows]] = [[] for _ in shares]
    hashes = [_hash_of_name(name, seed) for name in names]
    for group in sorted(range(len(names)), key=lambda one: (-len(rows[one]), hashes[one])):
        own, counts = np.unique(split.labels[rows[group]], return_counts=True)
        empty = ~there[:, own]
        scarce = empty & (left[own] <= empty.sum(axis=0))
        if len(shares) == 3:  # val can do without
            scarce[1] &= left[own] >= empty.sum(axis=0)
        lacking = (wanted[:, own] / totals[own]) @ counts
        first = scarce.any(axis=1)
        part = int(np.where(first | ~first.any(), lacking, -np.inf).argmax())
        parts[part].append(rows[group])
        wanted[part, own] -= counts
        there[part, own] = True
        left[own] -= 1
    return [np.sort(np.concatenate([*part, np.zeros(0, np.int64)])) for part in parts]


@dataclass(frozen=True)
class _Rows(Generic[Of]):
    of: Callable[[int], Of]
    rows: Rows

    def __call__(self, index: int) -> Of:
        return self.of(int(self.rows[index]))


def take(split: Split, rows: Rows, origin: str) -> Split:
    """The given rows of a split, (M,) integers, in that order."""
    ids = [split.ids[row] for row in rows]
    file = split.file and _Rows(split.file, rows)
    content = split.content and _Rows(split.content, rows)
    groups = split.groups and [split.groups[row] for row in rows]
    stamp = split.stamp and _Rows(split.stamp, rows)
    read = _Rows(split.read, rows)
    return Split(ids, split.labels[rows], read, origin, file, content, groups, stamp)


def stratified_parts(
    labels: npt.ArrayLike, fractions: list[float], order: Callable[[Rows], Rows]
) -> list[Rows]:
    """Disjoint sets of rows, one per fraction, each class divided in the same proportions.

    Each class is cut at the rounded cumulative fractions, which keeps every part within one image
    of its share; parts are returned in ascending order, so that the source's order is kept.

    labels: (N,) integers. fractions: non-negative, sum ≤ 1; a remainder belongs to no part.
    order: the rows of a class, in the order in which they are cut.
    """
    labels = np.asarray(labels)
    cuts = np.cumsum([0.0, *fractions])
    parts: list[list[Rows]] = [[] for _ in fractions]
    for label in np.unique(labels):
        rows = order(np.flatnonzero(labels == label))
        bounds = np.rint(cuts * len(rows)).astype(int)
        for part, start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
            part.append(rows[start:stop])
    return [np.sort(np.concatenate(part)) for part in parts]
