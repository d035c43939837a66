"""Files that people name: what they must be before anything opens them."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.files import other_kind

TEXT_BYTES_MAX = 1 << 28  # a list of two million images has about half of it


def user_path(text: str) -> Path:
    """The path that `text` means, with ~ for home.

    Raises UserError where there is no such home, for a NUL, and for an empty name.
    """
    if not text:
        raise UserError("An empty name names no file; write . for the folder you are in.")
    if "\0" in text:
        raise UserError(f"The path {text!r} holds a NUL, which no path can; write it again.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"The path {text} means no folder: {error}; write it out.") from None


def is_file(path: Path) -> bool:
    """Whether it is a regular file, or a link to one. Names too long for any file are none."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """The same for a folder."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def unreadable(path: Path, error: OSError) -> UserError:
    """The sentence for a file or folder that cannot be read."""
    reason = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    return UserError(f"Cannot read {path}: {reason}; check the path and its rights.")


@contextmanager
def text_file(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """A text file for reading, line ends as they are.

    Raises UserError, also from within the block, where it is no regular file, cannot be read, is
    larger than a list could be, or is not in that encoding.
    """
    try:
        if kind := other_kind(path):
            raise UserError(f"{path} is {kind}; name a text file.")
        if path.stat().st_size > TEXT_BYTES_MAX:
            raise UserError(
                f"{path} is larger than {TEXT_BYTES_MAX >> 20} MiB, which no list is; check its "
                "name."
            )
        with path.open(encoding=encoding, newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_text(path: Path) -> str:
    """All of a text file. Raises UserError as `text_file` does."""
    with text_file(path) as file:
        return file.read()


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError as `text_file` does, and for anything else."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{path} is not JSON for this: it is nested too deep.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
