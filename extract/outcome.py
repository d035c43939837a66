"""What to say about a finished file, for `extract` and `merge`; and parts joined and reported."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_adapter.cache.content import Tally, groups_in_several_splits
from clip_adapter.cache.parts import PartFile, merge_parts
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.text_tower import tower_path, write_text_tower
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.words import counted, quoted, size, some


def describe(out: Path, tallies: Mapping[str, Tally], classes: int, note: str = "") -> str:
    """What is in the file, by split: `features.h5: 719 train, 899 test images, …`."""
    images = sum(tally.images for tally in tallies.values())
    listed = _by_split({split: tally.images for split, tally in tallies.items()})
    return (
        f"{out}{note}: {listed} {'image' if images == 1 else 'images'}, "
        f"{counted(classes, 'class', 'classes')}, {size(out.stat().st_size)}"
    )


def describe_skipped(tallies: Mapping[str, Tally], reason: str | None) -> str | None:
    """How many images are not in the file; None where all are.

    reason: a sentence on the first of them, where it is known.
    """
    skipped = {split: len(tally.skipped) for split, tally in tallies.items() if tally.skipped}
    if not skipped:
        return None
    first = next(tally.skipped[0] for tally in tallies.values() if tally.skipped)
    total = counted(sum(skipped.values()), "image")
    return f"{total} skipped ({_by_split(skipped)}), the first: {reason or first}"


def refuse_skipped(path: Path, count: int) -> None:
    """Raises UserError where an earlier run skipped images and this one was told not to."""
    if count:
        raise UserError(
            f"An earlier run skipped {counted(count, 'image')} of {path}; repeat --on-error skip "
            "to do without, or use --force to start again."
        )


def _by_split(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in counts.items()) or "0"


def warn_of_lost_classes(
    tallies: Mapping[str, Tally], class_names: Sequence[str], listener: Listener
) -> None:
    """Name the classes of which skipping left no image of a split."""
    lost = [
        f"no {split} image of {some([class_names[label] for label in tally.lost])}"
        for split, tally in tallies.items()
        if tally.lost
    ]
    if lost:
        listener.warn(
            f"skipping left {' and '.join(lost)}; repair some or leave the class out everywhere."
        )


def warn_of_duplicates(several: dict[str, Any] | None, listener: Listener) -> None:
    """Say what `in_several_splits` found."""
    if several is None:
        return
    one, other = several["examples"][0]
    listener.warn(
        f"found {counted(several['images'], 'image')} in more than one split ({one} is {other}); "
        "the cache lists up to twenty."
    )


def warn_of_shared_groups(groups: Mapping[str, Sequence[str] | None], listener: Listener) -> None:
    """Say which groups have images in several splits. groups: by split, of each image."""
    if shared := groups_in_several_splits(groups):
        name, splits = shared[0]
        listener.warn(
            f"found {counted(len(shared), 'group')} in more than one split ({quoted(name)} is in "
            f"{' and '.join(splits)}): these were divided elsewhere, and accuracy on such images "
            "is no accuracy on new groups."
        )


def join_parts(parts: Sequence[Path], out: Path, listener: Listener) -> None:
    """Join the parts of a cache into `out` and tell what is in it.

    Where the cache has a text tower, it is copied from beside the first part.
    Raises UserError as `merge_parts` does, and, before anything is written, where that tower is
    not there.
    """
    with PartFile(parts[0]) as part:  # all name the same backbone, else they are not joined
        backbone: Mapping[str, Any] = part.metadata.backbone
        sha256 = backbone.get("text_tower_sha256")
    tower = None if sha256 is None else _tower(parts, sha256)
    class_names, tallies, several = merge_parts(parts, out)
    if tower is not None:
        write_text_tower(tower_path(out), tower.read_bytes())
    warn_of_duplicates(several, listener)
    with FeatureCache(out) as cache:
        warn_of_shared_groups({split: cache.groups(split) for split in cache.splits}, listener)
    warn_of_lost_classes(tallies, class_names, listener)
    joined = f" (joined from {len(parts)} parts)"
    lines = [
        describe(out, tallies, len(class_names), joined),
        describe_skipped(tallies, None),
    ]
    listener.result("\n".join(filter(None, lines)))


def _tower(parts: Sequence[Path], sha256: str) -> Path:
    """The text tower of this hash that lies beside a part."""
    for path in sorted({tower_path(part) for part in parts}):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest == sha256:
                return path
    raise UserError(
        f"The text tower that `extract` wrote beside the first part, {tower_path(parts[0]).name}, "
        "is not there any more; put it back and merge again."
    )
