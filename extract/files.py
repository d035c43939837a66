"""Files that people name: what they must be before anything opens them."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from clip_adapter.errors import Contradiction, UserError
from clip_adapter.files import named_once, other_kind

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_ADVICE = "is the pointer that Git LFS left in the file's place; get the file with git lfs pull"
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


def is_lfs_pointer(source: Path | bytes) -> bool:
    """Whether a file, or what begins with these bytes, is none but says where Git LFS has it; not
    where it cannot be read."""
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                source = file.read(len(LFS_POINTER))
        except OSError:
            return False
    return source.startswith(LFS_POINTER)


@contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A text file for reading, line ends as they are, without the mark (BOM) that some programs put
    at its beginning.

    Raises UserError, also from within the block, where it is no regular file, cannot be read, is
    larger than a list could be, not UTF-8, or the pointer that Git LFS left in a file's place.
    """
    try:
        if kind := other_kind(path):
            raise UserError(f"{path} is {kind}; name a text file.")
        if path.stat().st_size > TEXT_BYTES_MAX:
            raise UserError(
                f"{path} is larger than {TEXT_BYTES_MAX >> 20} MiB, which no list is; check its "
                "name."
            )
        if is_lfs_pointer(path):
            raise UserError(f"{path} {LFS_ADVICE}.")
        with path.open(encoding="utf-8-sig", newline="") as file:
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
    """What a JSON file holds. Raises UserError as `text_file` does, for anything else, and for a
    name that stands twice in one object, of which a reader would drop the first."""
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=named_once)
    except Contradiction as error:
        raise UserError(f"{path} {error}.") from None
    except RecursionError:
        raise UserError(f"{path} is not JSON for this: it is nested too deep.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
