"""Names and values from files, made safe to print."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 40


def printable(text: str) -> str:
    """`text` with control characters, and bytes that are no UTF-8 in a file name, as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def quoted(value: object) -> str:
    """A value from a file for a message: in quotes where it is text, on one line, and short."""
    return printable(_SHORT.repr(value))
