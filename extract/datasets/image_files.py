"""Images that lie as files below one folder."""

import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.encoding.images import (
    HEIF_SUFFIXES,
    OTHER_SUFFIXES,
    open_image,
    readable_suffixes,
)
from clip_adapter.files import unreadable
from clip_adapter.listener import Listener
from clip_adapter.words import counted, printable, shortened

NAMED_MAX = 5
TOLD_EVERY_SECONDS = 10.0
# Where file servers keep thumbnails, rubbish and old states, and systems theirs.
FOLDERS_OF_SYSTEMS = frozenset(
    {"@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "$recycle.bin"}
    | {"recycler", "recycled", "system volume information", "lost+found", "network trash folder"}
    | {"temporary items", "__macosx", "thumbnails"}
)


@dataclass(frozen=True)
class ImageFiles:
    """index → image, opened when asked for; holds no open file and pickles as paths."""

    root: Path
    paths: Sequence[str]

    def __call__(self, index: int) -> Image.Image:
        return open_image(self.file(index))

    def file(self, index: int) -> Path:
        return self.root / self.paths[index]


def split_of_files(
    root: Path, rows: Sequence[tuple[str, int]], origin: str, groups: Sequence[str] | None = None
) -> Split:
    """A split of images by their paths below the root, which are their ids, and their labels."""
    paths = [path for path, _ in rows]
    labels = np.array([label for _, label in rows], np.int32)
    images = ImageFiles(root, paths)
    return Split(paths, labels, images, origin, images.file, groups=groups)


def folder_group(path: str, outer: int = 0) -> str:
    """The folder that an image lies in, below the `outer` first ones; an image that lies in none is
    a group of its own."""
    return "/".join(path.split("/")[outer:-1]) or path


def natural_order(name: str) -> str:
    """Sort key that puts class2 before class10. One string, since sorting has the keys of all
    images in memory: tuples would be five times as large."""
    # Numbers, which come before text, are compared by how many digits they have and then by these:
    # they may have more than Python makes an integer of. A text ends with what no name holds.
    parts = enumerate(re.split(r"0*([0-9]+)", name))
    ordered = [
        f"\1{chr(min(len(p), sys.maxunicode))}{p}" if at % 2 else f"\2{p}\0" for at, p in parts if p
    ]
    return "".join([*ordered, "\0", name])


def is_image(name: str) -> bool:
    """Whether a file is an image, told by its extension; hidden files are none."""
    return not name.startswith(".") and _suffix(name) in readable_suffixes()


def _suffix(name: str) -> str:
    return Path(name.lstrip(".")).suffix.lower()


@dataclass(frozen=True)
class Level:
    """What lies in a folder itself: names of sub-folders, in natural order, and of images."""

    folders: list[str]
    images: list[str]


class Listing:
    """Looks for images in a folder, and keeps count of what it passes over.

    Images are told by their extension; symbolic links are followed. Hidden files and folders are
    left out, and so are the folders in which systems and file servers keep copies and rubbish.
    What has the name of an image and is none, such as a pipe or a link that leads nowhere, is there
    too: it is a bad image.

    root: what links may lead out of. listener: is told now and then how far it is.
    Every method raises UserError where a folder cannot be read.
    """

    def __init__(self, root: Path, listener: Listener | None = None) -> None:
        self._root, self._real = root, os.path.realpath(root)
        self._listener = listener or Listener()
        self._levels: dict[Path, Level] = {}
        self._unread: Counter[str] = Counter()
        self._kept_by_systems: Counter[str] = Counter()
        self._links_out: list[str] = []
        self._folders, self._images, self._told = 0, 0, time.monotonic()

    def level(self, folder: Path) -> Level:
        """What lies in the folder itself."""
        if folder not in self._levels:
            self._levels[folder] = self._look_into(folder)
        return self._levels[folder]

    def below(self, folder: Path) -> list[str]:
        """Paths of the images in a folder and its sub-folders, relative to it, in natural order;
        each folder is looked into once."""
        paths: list[str] = []
        pending, seen = [""], set()
        while pending:
            inner = pending.pop()
            place = folder / inner
            if (identity := place.resolve()) in seen:
                continue
            seen.add(identity)
            level = self._levels.get(place) or self._look_into(place)
            prefix = f"{inner}/" if inner else ""
            paths += [f"{prefix}{name}" for name in level.images]
            pending += [f"{prefix}{name}" for name in level.folders]
        return sorted(paths, key=natural_order)

    def _look_into(self, folder: Path) -> Level:
        level = Level([], [])
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._sort_in(entry, level)
        except OSError as error:
            raise unreadable(folder, error) from error
        level.folders.sort(key=natural_order)
        self._folders += 1
        self._images += len(level.images)
        if time.monotonic() - self._told >= TOLD_EVERY_SECONDS:
            self._told = time.monotonic()
            self._listener.note(
                f"{counted(self._images, 'image')} found so far, in "
                f"{counted(self._folders, 'folder')}, the last of them {folder}"
            )
        return level

    def _sort_in(self, entry: "os.DirEntry[str]", level: Level) -> None:
        name, hidden = entry.name, entry.name.startswith(".")
        if _is_folder(entry):
            if hidden or name.casefold() in FOLDERS_OF_SYSTEMS:
                self._kept_by_systems[f"in {name}"] += _images_inside(entry.path)
                return
            level.folders.append(name)
        elif hidden:
            self._kept_by_systems["hidden"] += is_image(name.lstrip("."))
            return
        elif is_image(name):
            level.images.append(name)
        else:
            suffix = _suffix(name)
            self._unread[suffix] += suffix in OTHER_SUFFIXES | HEIF_SUFFIXES
            return
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if os.path.commonpath([self._real, target]) != self._real:
                self._links_out.append(f"{entry.path} → {target}")

    def remarks(self) -> list[str]:
        """A sentence for each kind of thing that was passed over, or is not where it seems."""
        remarks = []
        if unread := +self._unread:
            kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in unread.most_common())
            heic = " (pip install 'clip-adapter[heic]' reads .heic and .heif)"
            advice = heic if HEIF_SUFFIXES & unread.keys() else ""
            images = counted(unread.total(), "image")
            remarks.append(f"passed over {images} of kinds not read: {kinds}{advice}.")
        if kept := +self._kept_by_systems:
            kinds = ", ".join(f"{count:,} {where}" for where, count in kept.most_common(NAMED_MAX))
            more = " and elsewhere" if len(kept) > NAMED_MAX else ""
            remarks.append(
                f"left out {counted(kept.total(), 'image')} that are hidden or that a system keeps "
                f"for itself: {kinds}{more}."
            )
        if self._links_out:
            links = counted(len(self._links_out), "link")
            remarks.append(
                f"followed {links} out of {self._root}, the first of them {self._links_out[0]}."
            )
        return remarks


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _images_inside(folder: str) -> int:
    """How many images are left out with a folder; links in it lead nowhere."""
    return sum(is_image(name.lstrip(".")) for _, _, names in os.walk(folder) for name in names)


def require_files(root: Path, paths: Sequence[str], remedy: str) -> None:
    """Raises UserError where some of the files do not exist: how many, the first, and `remedy`.

    A link that leads nowhere does exist: it is a bad image.
    """
    missing = [path for path in paths if not _exists(root / path)]
    if missing:
        raise UserError(
            f"{root} lacks {len(missing)} of {counted(len(paths), 'image')}, "
            f"the first is {printable(shortened(missing[0]))}; {remedy}."
        )


def _exists(path: Path) -> bool:
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):  # ValueError for a NUL
        return False
