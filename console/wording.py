"""Counts, sizes, lists and warnings in words."""

import sys
from collections.abc import Sequence

NAMES_SHOWN = 3


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 image`, `2,000 images`; `plural` for nouns that want more than an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def size(count: float) -> str:
    """Bytes in the unit that fits, such as `48.2 KiB`."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"


def some(names: Sequence[str]) -> str:
    """The first names: `'a', 'b', 'c' and 4 more`."""
    shown = ", ".join(map(repr, names[:NAMES_SHOWN]))
    rest = len(names) - NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def warn(sentence: str) -> None:
    """Say on standard error what those should know who get a result all the same."""
    print(f"warning: {sentence}", file=sys.stderr)
