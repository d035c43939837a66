"""What goes into a cache: whether it may, and what there is to say about it.

Content is a mapping from the paths of FORMAT.md to values: arrays, strings, or `Picked` rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.cache import schema
from clip_adapter.cache.schema import of_images
from clip_adapter.errors import UserError
from clip_adapter.words import quoted

Content = Mapping[str, Any]
EXAMPLES = 20


def check_strings(strings: Iterable[str]) -> None:
    """Raises UserError for strings that a fixed-length UTF-8 field would not give back."""
    for string in strings:
        try:
            storable = b"\0" not in string.encode()
        except UnicodeEncodeError:  # a lone surrogate
            storable = False
        if not storable:
            raise UserError(
                f"{quoted(string)} cannot be stored: it holds a NUL or is not valid Unicode; "
                "rename it."
            )


def indistinct(class_names: Sequence[str]) -> str | None:
    """How class names tell no class from another, as a clause: they are all empty or all equal."""
    if any(class_names) and not len(class_names) > 1 == len(set(class_names)):
        return None
    return f"its {len(class_names)} class names are all {quoted(class_names[0])}"


def check_features(
    features: np.ndarray,
    names: Sequence[str],
    advice: str = "the weights are damaged or overflow in this precision",
) -> None:
    """(B, …, D): each a finite direction of a usual size. Raises UserError with the name of the
    first other and the advice."""
    if features.dtype not in (np.float32, np.float16):
        raise UserError(f"The features are {features.dtype}, not float32 or float16.")
    largest = np.abs(features).max(axis=2).astype(np.float64)  # NaN where one is NaN
    usual = (largest >= schema.SMALLEST_FEATURE) & (largest <= schema.LARGEST_FEATURE)
    usable = usual.all(axis=1)
    if not usable.all():
        bad = int(usable.argmin())
        what = "far smaller or larger than CLIP's" if largest[bad].all() else "zero"
        what = what if np.isfinite(largest[bad]).all() else "not finite numbers"
        raise UserError(f"The features of {quoted(names[bad])} are {what}; {advice}.")


@dataclass(frozen=True)
class Tally:
    """What became of the images of a split.

    images: how many are in the cache. skipped: ids of the others. lost: labels that only they had.
    """

    images: int
    skipped: list[str]
    lost: list[int]


def tally(content: Content) -> dict[str, Tally]:
    """By split; where none has a label none is lost."""
    tallies = {}
    for split in schema.ALL_SPLITS:
        ids = content.get(of_images(split, "ids"))
        if ids is not None:
            labels = content.get(of_images(split, "labels"), np.zeros(0, np.int32))
            skipped = content.get(of_images(split, "skipped"), np.zeros(0, object))
            missing = content.get(of_images(split, "skipped_labels"), np.zeros(0, np.int32))
            lost = np.setdiff1d(missing, labels[:]).tolist()
            tallies[split] = Tally(ids.shape[0], skipped[:].tolist(), lost)
    return tallies


def in_several_splits(content: Content) -> dict[str, Any] | None:
    """Which of the images have equal pixels and different splits; None where none do.

    Returns {"images": how many distinct ones, "examples": at most twenty pairs of "SPLIT/ID"}.
    Eight bytes per image are in memory.
    """
    none = np.zeros(0, np.uint64)
    splits = schema.ALL_SPLITS
    digests = {split: content.get(of_images(split, "digests"), none)[:] for split in splits}
    shared = none
    examples: list[list[str]] = []
    for one, other in combinations(splits, 2):
        common = np.intersect1d(digests[one], digests[other])
        shared = np.union1d(shared, common)
        chosen = common[: EXAMPLES - len(examples)]
        pairs = [_ids(content, split, digests[split], chosen) for split in (one, other)]
        examples += [[pairs[0][d], pairs[1][d]] for d in chosen.tolist()]
    return {"images": len(shared), "examples": examples} if len(shared) else None


def groups_in_several_splits(
    groups: Mapping[str, Sequence[str] | None],
) -> list[tuple[str, list[str]]]:
    """The groups that have images in more than one split, and in which.

    groups: by split, of each image; None for a split without groups.
    """
    splits: dict[str, list[str]] = {}
    for split, names in groups.items():
        for name in set(names or ()):
            splits.setdefault(name, []).append(split)
    return sorted((name, own) for name, own in splits.items() if len(own) > 1)


def _ids(
    content: Content,
    split: str,
    digests: npt.NDArray[np.uint64],
    wanted: npt.NDArray[np.uint64],
) -> dict[int, str]:
    """For each wanted digest an image of the split that has it."""
    ids = content.get(of_images(split, "ids"), [])
    rows = np.flatnonzero(np.isin(digests, wanted)).tolist()
    return {int(digests[row]): f"{split}/{ids[row : row + 1][0]}" for row in rows}
