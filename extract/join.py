"""Join parts and say so, for `merge` and for the processes of torchrun."""

from collections.abc import Sequence
from pathlib import Path

from clip_adapter.cache.parts import merge_parts
from clip_adapter.extract.outcome import (
    describe,
    describe_skipped,
    warn_of_duplicates,
    warn_of_lost_classes,
)


def join_parts(parts: Sequence[Path], out: Path) -> str:
    """Join the parts of a cache into `out` and return what to say about it.

    Raises UserError as `merge_parts` does.
    """
    merged = merge_parts(parts, out)
    warn_of_duplicates(merged.several)
    warn_of_lost_classes(merged.tallies, merged.class_names)
    joined = f" (joined from {len(parts)} parts)"
    lines = [
        describe(out, merged.tallies, len(merged.class_names), joined),
        describe_skipped(merged.tallies, None),
    ]
    return "\n".join(filter(None, lines))
