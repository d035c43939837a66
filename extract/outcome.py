"""What to say about a finished file, for `extract` and `merge`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_adapter.cache.tally import Tally
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.words import counted, size, some


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
