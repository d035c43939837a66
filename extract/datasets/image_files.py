"""Images that lie as files below one folder."""

import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.words import counted
from clip_adapter.extract.files import unreadable
from clip_adapter.extract.images import (
    HEIF_SUFFIXES,
    OTHER_SUFFIXES,
    open_image,
    readable_suffixes,
)

PATH_SHOWN = 200


@dataclass(frozen=True)
class ImageFiles:
    """index → image, opened when asked for; holds no open file and pickles as paths."""

    root: Path
    paths: Sequence[str]

    def __call__(self, index: int) -> Image.Image:
        return open_image(self.file(index))

    def file(self, index: int) -> Path:
        return self.root / self.paths[index]


def natural_order(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that puts class2 before class10."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [_number(part) if part[0] in "0123456789" else (1, 0, part) for part in parts], name


def _number(digits: str) -> tuple[int, int, str]:
    """Orders as the number does, which may have more digits than Python makes an integer of."""
    significant = digits.lstrip("0")
    return 0, len(significant), significant


def is_image(name: str) -> bool:
    """Whether a file is an image, told by its extension; hidden files are none."""
    return not name.startswith(".") and Path(name).suffix.lower() in readable_suffixes()


def visible_folders(folder: Path) -> list[str]:
    """Names of the sub-folders, hidden ones left out, in natural order.

    Raises UserError where the folder cannot be read.
    """
    with _entries(folder) as entries:
        names = [e.name for e in entries if _is_folder(e) and not e.name.startswith(".")]
    return sorted(names, key=natural_order)


def holds_images(folder: Path) -> bool:
    """Whether images lie in the folder itself. Raises UserError where it cannot be read."""
    with _entries(folder) as entries:
        return any(is_image(entry.name) for entry in entries)


def images_below(folder: Path, unread: Counter[str] | None = None) -> list[str]:
    """Paths of the image files in a folder and its sub-folders, relative to it, in natural order.

    Images are told by their extension; hidden files and folders are left out; symbolic links are
    followed, each folder once. What has the name of an image and is none, such as a pipe or a link
    that leads nowhere, is there too: it is a bad image.

    unread: is told how many images of kinds that are not read lie there, by their suffix.
    Raises UserError where a folder cannot be read.
    """
    found: list[str] = []
    pending, seen = [""], set()
    while pending:
        inner = pending.pop()
        place = folder / inner
        if (identity := place.resolve()) in seen:
            continue
        seen.add(identity)
        with _entries(place) as entries:
            for entry in entries:
                path = f"{inner}/{entry.name}" if inner else entry.name
                if _is_folder(entry):
                    pending += [] if entry.name.startswith(".") else [path]
                elif is_image(entry.name):
                    found.append(path)
                elif unread is not None and (suffix := _unread_suffix(entry.name)):
                    unread[suffix] += 1
    return sorted(found, key=natural_order)


@contextmanager
def _entries(folder: Path) -> "Iterator[Iterator[os.DirEntry[str]]]":
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as error:
        raise unreadable(folder, error) from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _unread_suffix(name: str) -> str | None:
    suffix = Path(name).suffix.lower()
    others = OTHER_SUFFIXES | HEIF_SUFFIXES
    return suffix if suffix in others and not name.startswith(".") else None


def unread_remarks(unread: Counter[str]) -> list[str]:
    """At most one sentence: how many images were passed over, by suffix."""
    if not unread:
        return []
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in unread.most_common())
    heic = " (pip install 'clip-adapter[heic]' reads .heic and .heif)"
    advice = heic if HEIF_SUFFIXES & unread.keys() else ""
    return [f"passed over {counted(unread.total(), 'image')} of kinds not read: {kinds}{advice}."]


def require_files(root: Path, paths: Sequence[str], remedy: str) -> None:
    """Raises UserError where some of the files do not exist: how many, the first, and `remedy`.

    A link that leads nowhere does exist: it is a bad image.
    """
    missing = [path for path in paths if not _exists(root / path)]
    if missing:
        raise UserError(
            f"{root} lacks {len(missing)} of {counted(len(paths), 'image')}, "
            f"the first is {_shown(missing[0])}; {remedy}."
        )


def _shown(path: str) -> str:
    return path if path.isprintable() and len(path) <= PATH_SHOWN else reprlib.repr(path)


def _exists(path: Path) -> bool:
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):  # ValueError for a NUL
        return False
