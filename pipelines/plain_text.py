"""Names from files and caches, made safe to print."""


def printable(text: str) -> str:
    """`text` with control characters, and bytes that are no UTF-8 in a file name, as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
