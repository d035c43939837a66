"""`audit`: which labels to look at, which images there are twice, and which classes need care."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.label_check import FEWEST, accuracy_of, judged
from clip_adapter.adapters.method import Head
from clip_adapter.adapters.neighbours import ONE_TEXT, alike
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.errors import UserError, require_within
from clip_adapter.files import check_folder
from clip_adapter.frames import frame, html_table, rows_of
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.deciding.twins import Mask, Rows, Twins, find_twins
from clip_adapter.pipelines.saved.adapter_file import image_hashes
from clip_adapter.pipelines.scoring.prediction_formats import check_place, write_columns
from clip_adapter.pipelines.scoring.zero_shot import zero_shot_head
from clip_adapter.words import counted

if TYPE_CHECKING:
    import pandas

UNLIKELY = 0.05  # p of a label below which it is listed
FEW = 4  # images of a class for training: fewer make no folds
NEAR_TEXT = (
    0.95  # of classes of ImageNet: `sunglass` and `sunglasses` 0.980, two kinds of poodle 0.953
)


@dataclass(frozen=True)
class AuditConfig:
    """Look through the labelled images of a cache: which labels to look at first, which images are
    there twice, also on two sides of a split, and which classes need care.

    Nothing here says that a label is wrong: it says where to look.

    Attributes:
        cache: Feature cache whose labelled images, of all splits, are looked through.
        count: How many labels to list; by default those that have less than 5 % by all other
            images.
        out: CSV file for a row per image, what to look at first.
        html: Page with the pictures of what is listed, which needs nothing from outside.
        images: Folder that the images' ids start from, for the pictures of the page; without it
            they are taken from the folder that was extracted where it lies in the cache's own.
        force: Overwrite existing files.

    Examples:
        >>> from clip_adapter import AuditConfig
        >>> AuditConfig("features.h5", count=20).out is None
        True
    """

    cache: Positional[Path]
    count: int | None = None
    out: Path | None = None
    html: Path | None = None
    images: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class SplitAccuracy:
    """split: of these images, of which `twins` have a twin in another split. with_twins,
    without_twins: accuracies in [0, 1] on all, and on those without (NaN where none are), of what
    is fitted on the training images."""

    split: str
    images: int
    twins: int
    with_twins: float
    without_twins: float


@dataclass(frozen=True)
class Audit:
    """What `audit` finds. Arrays have a row for each of N labelled images, what to look at first.

    ids, splits: (N,) where each comes from. labels: (N,) indices of class_names. probabilities:
    (N,) of the labels, by all other images; NaN for the only image of a class. likelier,
    likelier_probabilities: (N,) the likeliest other class, and how likely. listed: (N,) whether to
    look at it. twins: groups of equal and near-equal images. accuracies: of splits with twins in
    others. one_text, near_text: groups of classes. few: number of training images, of the classes
    that have fewer than four.
    """

    class_names: Sequence[str]
    ids: Sequence[str]
    splits: Sequence[str]
    labels: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float64]
    likelier: Rows
    likelier_probabilities: npt.NDArray[np.float64]
    listed: Mask
    twins: Twins
    accuracies: Sequence[SplitAccuracy]
    one_text: Sequence[Sequence[str]]
    near_text: Sequence[Sequence[str]]
    few: dict[str, int]

    def columns(self) -> dict[str, Sequence[Any]]:
        """By the names of docs/practitioner.md, in the order of `ids`."""
        equal = np.isin(np.arange(len(self.ids)), self.twins.equal)
        groups = [number + 1 if number >= 0 else None for number in self.twins.groups.tolist()]
        return {
            "image": list(self.ids),
            "split": list(self.splits),
            "label": [self.class_names[label] for label in self.labels.tolist()],
            "probability": self.probabilities.tolist(),
            "likelier": [self.class_names[label] for label in self.likelier.tolist()],
            "likelier_probability": self.likelier_probabilities.tolist(),
            "listed": self.listed.tolist(),
            "group": groups,
            "equal": equal.tolist(),
            "other_split": self.twins.across.tolist(),
            "other_label": self.twins.disagree(self.labels).tolist(),
        }

    def to_frame(self) -> pandas.DataFrame:
        """`columns` as a frame of pandas."""
        return frame(self.columns())

    def _repr_html_(self) -> str:
        rows = (row for row in rows_of(self.columns()) if row["listed"] or row["group"])
        return html_table(rows, f"of {counted(len(self.ids), 'image')}, what to look at first")


def audit(config: AuditConfig) -> Audit:
    """Look through the labelled images of all splits of a cache.

    Labels by gda without the image itself (adapters/label_check.py); near-equal images by
    adapters/neighbours.py, whose time grows with the square of their number. Views other than the
    first take no part. Features of all images are in memory.

    Raises UserError for a cache with fewer than three labelled images or one class, and where files
    exist that are not to be overwritten.

    Examples:
        >>> from clip_adapter import AuditConfig, audit
        >>> found = audit(AuditConfig("features.h5", count=5))
        >>> found.ids[:1], found.class_names[found.likelier[0]]
        (['digits/0129'], 'one')
    """
    if config.count is not None:
        require_within("--count", config.count, 10**9)
    if config.images is not None and config.html is None:
        raise UserError("--images is for the pictures of a page; name that with --html.")
    if config.images is not None:
        check_folder("--images", config.images)
    out, html = (path and Path(path) for path in (config.out, config.html))
    check_place(out, ".csv", force=config.force)
    check_place(html, ".html", force=config.force)
    with FeatureCache(config.cache) as cache:
        found = _audit(cache, config.count)
        if html:
            from clip_adapter.pipelines.deciding.audit_page import write_page

            write_page(html, found, cache, config.images and Path(config.images))
    if out:
        write_columns(out, found.columns())
    return found


def _audit(cache: FeatureCache, count: int | None) -> Audit:
    sizes = [cache.shape(split)[1] for split in cache.splits]
    names = cache.class_names
    if sum(sizes) < FEWEST or len(names) < 2:
        raise UserError(
            f"{cache.path} has {counted(sum(sizes), 'labelled image')} of "
            f"{counted(len(names), 'class', 'classes')}; an audit takes at least three of two."
        )
    of_split = np.repeat(np.arange(len(sizes)), sizes)
    images = [cache.images(split, views=1) for split in cache.splits]
    features = np.concatenate([each.features[0] for each in images])
    labels = np.concatenate([each.labels for each in images])
    head = zero_shot_head(cache)
    own, likelier, share = judged(features, labels, head)
    alone = (np.bincount(labels, minlength=len(names)) == 1)[labels]
    suspicion = np.where(alone, -np.inf, share - own)
    order = np.argsort(-suspicion, kind="stable")
    listed = ~alone & (own < UNLIKELY) if count is None else ~alone
    listed[order[len(order) if count is None else count :]] = False
    twins = find_twins(features, _keys(cache, features), of_split)
    one, near = (alike(head.weights, least) for least in (ONE_TEXT, NEAR_TEXT))
    ids = [name for each in images for name in each.ids]
    train = labels[of_split == 0] if cache.splits[0] == "train" else labels
    counts = np.bincount(train, minlength=len(names))
    return Audit(
        names,
        [ids[row] for row in order.tolist()],
        [cache.splits[number] for number in of_split[order].tolist()],
        labels[order],
        np.where(alone, np.nan, own)[order],
        likelier[order],
        share[order],
        listed[order],
        twins.ordered(order),
        _accuracies(cache, features, labels, twins, head),
        _named(one, names),
        _named([group for group in near if group not in one], names),
        {names[label]: int(counts[label]) for label in np.flatnonzero(counts < FEW).tolist()},
    )


def _keys(cache: FeatureCache, features: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """Equal for equal images: of their pixels, or where those are not recorded, of features."""
    digests = [cache.hashes(split, "digests") for split in cache.splits]
    known = [own for own in digests if own is not None]
    if len(known) == len(digests):
        return np.concatenate(known)
    return image_hashes(features, None)[:, 0]


def _accuracies(
    cache: FeatureCache,
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int32],
    twins: Twins,
    head: Head,
) -> list[SplitAccuracy]:
    found = []
    train = twins.of_split == 0
    for number, split in enumerate(cache.splits[1:] if "train" in cache.splits else (), 1):
        own = twins.of_split == number
        across = twins.across[own]
        if across.any():
            right = accuracy_of(
                (features[train], labels[train]), (features[own], labels[own]), head
            )
            without = float(right[~across].mean()) if not across.all() else np.nan
            count = int(np.count_nonzero(across))
            found.append(SplitAccuracy(split, len(right), count, float(right.mean()), without))
    return found


def _named(groups: Sequence[Sequence[int]], names: Sequence[str]) -> list[list[str]]:
    return [[names[label] for label in group] for group in groups]
