"""Join parts and report it, for `merge` and for the processes of torchrun."""

from collections.abc import Sequence
from pathlib import Path

from clip_adapter.cache.listener import Listener
from clip_adapter.cache.parts import merge_parts
from clip_adapter.extract.outcome import (
    describe,
    describe_skipped,
    warn_of_duplicates,
    warn_of_lost_classes,
)


def join_parts(parts: Sequence[Path], out: Path, listener: Listener) -> None:
    """Join the parts of a cache into `out` and tell what is in it.

    Raises UserError as `merge_parts` does.
    """
    merged = merge_parts(parts, out)
    warn_of_duplicates(merged.several, listener)
    warn_of_lost_classes(merged.tallies, merged.class_names, listener)
    joined = f" (joined from {len(parts)} parts)"
    lines = [
        describe(out, merged.tallies, len(merged.class_names), joined),
        describe_skipped(merged.tallies, None),
    ]
    listener.result("\n".join(filter(None, lines)))
