"""Images that lie as files below one folder."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.words import counted

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})


@dataclass(frozen=True)
class ImageFiles:
    """index → image, opened when asked for; holds no open file and pickles as paths.

    Raises OSError for a file that is missing or no image.
    """

    root: Path
    paths: Sequence[str]

    def __call__(self, index: int) -> Image.Image:
        return Image.open(self.root / self.paths[index])


def natural_order(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that puts class2 before class10."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts], name


def is_image(name: str) -> bool:
    """Whether a file is an image, told by its extension; hidden files are none."""
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


def visible_folders(folder: Path) -> list[str]:
    """Names of the sub-folders, hidden ones left out, in natural order.

    Raises UserError where the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise unreadable(folder, error) from error
    return sorted(names, key=natural_order)


def images_below(folder: Path) -> list[str]:
    """Paths of the image files in a folder and its sub-folders, relative to it, in natural order.

    Images are told by their extension; hidden files and folders are left out; symbolic links are
    followed, each folder once.
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
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    path = f"{inner}/{entry.name}" if inner else entry.name
                    if entry.is_dir():
                        pending += [] if entry.name.startswith(".") else [path]
                    elif is_image(entry.name):
                        found.append(path)
        except OSError as error:
            raise unreadable(place, error) from error
    return sorted(found, key=natural_order)


def unreadable(path: Path, error: OSError) -> UserError:
    """The sentence for a file or folder that cannot be read."""
    return UserError(
        f"Cannot read {path}: {error.strerror or error}; check the path and its rights."
    )


def require_files(root: Path, paths: Sequence[str], remedy: str) -> None:
    """Raises UserError where some of the files do not exist: how many, the first, and `remedy`."""
    missing = [path for path in paths if not (root / path).is_file()]
    if missing:
        raise UserError(
            f"{root} lacks {len(missing)} of {counted(len(paths), 'image')}, "
            f"the first is {missing[0]}; {remedy}."
        )
