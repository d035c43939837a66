"""Counts, sizes, lists and names in words, safe to print."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

NAMES_SHOWN = 3
LONGEST_NAME = 160
LONGEST_WORD = 300


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
    shown = ", ".join(map(quoted, names[:NAMES_SHOWN]))
    rest = len(names) - NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def same_text(groups: Sequence[Sequence[str]]) -> str:
    """A sentence on classes that have one text: groups of their names."""
    shown = "; ".join(map(some, groups[:NAMES_SHOWN]))
    rest = len(groups) - NAMES_SHOWN
    more = f" and {counted(rest, 'more group')}" if rest > 0 else ""
    return (
        f"these classes have the same text: {shown}{more}; by it, all their images are of "
        "the first of them: name them apart, or extract with --descriptions."
    )


def near(name: str, known: Sequence[str]) -> str:
    """What somebody may have meant who wrote a name that is none of those known."""
    return f"near matches: {', '.join(get_close_matches(name, known, 3, 0.4)) or 'none'}"


def quoted(value: object) -> str:
    """A value from outside as Python writes it, the end of a long one cut off: `'RN5O'`."""
    return shortened(repr(value))


def shortened(text: str, longest: int = LONGEST_NAME) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def printable(text: str) -> str:
    """`text` with control characters, and bytes that are no UTF-8 in a file name, as escapes.

    What comes from a file cannot start a new line or command a terminal in this form.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def readable(sentence: str) -> str:
    """`sentence` printable, and each word that nobody would read, such as a path of thousands of
    characters, without its middle."""
    half = LONGEST_NAME // 2
    too_long = rf"\S{{{LONGEST_WORD + 1},}}"
    return re.sub(too_long, lambda m: f"{m[0][:half]}…{m[0][-half:]}", printable(sentence))


def dashed(name: str) -> str:
    """The flag of a field, such as learning-rate."""
    return name.replace("_", "-")
