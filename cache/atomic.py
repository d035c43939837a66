"""Small files that are either whole or absent."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it there, so that nobody sees half of it."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
