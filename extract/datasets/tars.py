"""Images in tars as WebDataset packs them: what has one name up to its first dot is one sample."""

import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from PIL import Image

from clip_adapter.cache.schema import UNLABELLED
from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.image_files import is_image, natural_order
from clip_adapter.extract.datasets.source import (
    DEFAULT_TEMPLATES,
    NO_LABEL,
    ImageDataset,
    SourceOptions,
    Split,
    splits_among,
)
from clip_adapter.extract.datasets.splitting import complete_splits, labelled_splits, take
from clip_adapter.extract.datasets.tar_index import tar_index
from clip_adapter.extract.encoding.images import BadImage, open_image
from clip_adapter.extract.text.prompts import read_class_names
from clip_adapter.files import LARGEST, is_file, is_folder, parse_json, unreadable, user_path
from clip_adapter.words import counted, printable, quoted, shortened, size

CLASS_NAMES = "classnames.txt"
LABELS = ("cls", "json", "txt")  # in this order
IN_JSON = ("label", "cls")
TAR = re.compile(r"^[^.].*\.(tar|tgz)(\.(gz|bz2|xz|zst))?$")  # compressed ones are refused
LARGEST_LABEL = 2**20
MOST_NUMBERS = 10**6
_open_tar = threading.local()  # of each thread: consecutive images lie in one tar


@dataclass(frozen=True)
class Tar:
    """A tar as it was when it was indexed."""

    path: Path
    size: int
    changed: int

    def read(self, offset: int, length: int) -> bytes:
        """Raises OSError where it is another by now, or cannot be read."""
        tar, file = getattr(_open_tar, "own", (None, None))
        if tar != self or file is None:
            file = self.path.open("rb", buffering=0)
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (self.size, self.changed):
                file.close()
                raise OSError(errno.ESTALE, "it has changed since it was opened", str(self.path))
            _open_tar.own = self, file
        return os.pread(file.fileno(), length, offset)


@dataclass(frozen=True)
class _TarImages:
    """index → image, of the bytes at a place in a tar. places: (tar, offset, bytes)."""

    tars: Sequence[Tar]
    places: Sequence[tuple[int, int, int]]

    def __call__(self, index: int) -> Image.Image:
        tar, offset, length = self.places[index]
        if length > LARGEST:
            raise BadImage(f"it is too large, {size(length)}; at most {size(LARGEST)} are read")
        return open_image(self.tars[tar].read(offset, length))

    def stamp(self, index: int) -> str:
        tar, offset, _ = self.places[index]
        own = self.tars[tar]
        return f"{own.path.name} {own.size} {own.changed} {offset}"


def open_tars(where: str, options: SourceOptions) -> ImageDataset:
    """The images in the tars of a folder, or those that a pattern such as `data/train-*.tar` names.

    Of a sample `KEY.jpg` the label is `KEY.cls` (a number), `KEY.json` (`label` or `cls`, a number
    or a name) or `KEY.txt` (a name). Numbers count the lines of `classnames.txt` beside the tars,
    or are the classes' names without it. Splits are what the first words of the tars' names mean
    (`train-0000.tar`), or else made as `complete_splits` says. ids are TAR/KEY.

    Where `options` name classes, nobody looks for labels: all images are without, one split.

    Raises UserError for no tars, one that is compressed, cut or damaged, two images of one key, and
    labels that are none.
    """
    paths = _tar_paths(where)
    words = [re.split(r"[^a-z]", path.name.casefold())[0] for path in paths]
    if not splits_among(words):
        words = ["train"] * len(words)
    ids: list[str] = []
    places: list[tuple[int, int, int]] = []
    tars, remarks = [], []
    labels: list[int | str | None] = []
    others: Counter[str] = Counter()  # members of other kinds, and where the first lies
    first: dict[str, Path] = {}
    for number, path in enumerate(paths):
        index, length, changed = tar_index(path)
        tars.append(Tar(path, length, changed))
        found, left_out = _samples(path, index.members)
        for key, files in found.items():
            ids.append(f"{path.name}/{key}")
            places.append((number, *files["image"]))
            labels.append(None if options.class_names else _label(tars[-1], key, files))
        remarks += left_out
        others.update(index.others)
        first = {kind: path for kind in index.others} | first
    for kind, count in others.items():
        remarks.append(f"left out {counted(count, kind)}, the first in {first[kind]}.")
    if not ids:
        raise UserError(f"The tars of wds:{where} hold no images. {' '.join(remarks)}".strip())
    images = _TarImages(tars, places)
    name = paths[0].parent.resolve().name
    about = {"name": name, "source": "wds", "version": None}
    if options.class_names:
        without = np.full(len(ids), NO_LABEL, np.int32)
        split = Split(ids, without, images, "images without labels", stamp=images.stamp)
        splits = complete_splits({UNLABELLED: split}, (), options)
        return ImageDataset(name, options.class_names, DEFAULT_TEMPLATES, splits, about, remarks)
    if all(label is None for label in labels):
        raise UserError(
            f"No image of wds:{where} has a label; name the classes with --like FILE or --classes "
            "FILE to take them as images without labels."
        )
    class_names, numbers = _numbered(where, paths[0].parent / CLASS_NAMES, labels)
    own = np.array([words[number] for number, _, _ in places])
    whole = Split(ids, numbers, images, "", stamp=images.stamp)

    def labelled(word: str) -> tuple[Split | None, int]:
        of_word = own == word
        rows = np.flatnonzero(of_word & (numbers != NO_LABEL))
        origin = f"{word} tars of {paths[0].parent}"
        part = take(whole, rows, origin) if len(rows) else None
        return part, int(of_word.sum()) - len(rows)

    published, left_out = labelled_splits(f"wds:{where}", Counter(own.tolist()), labelled)
    splits = complete_splits(published, class_names, options)
    remarks += left_out
    return ImageDataset(name, class_names, DEFAULT_TEMPLATES, splits, about, remarks)


def _tar_paths(where: str) -> list[Path]:
    root = user_path(where)
    if is_folder(root):
        try:
            paths = [path for path in root.iterdir() if TAR.search(path.name)]
        except OSError as error:
            raise unreadable(root, error) from error
    elif has_magic(where):
        paths = [Path(path) for path in glob(str(root))]  # noqa: PTH207 - it may begin anywhere
    else:
        paths = [root] if is_file(root) else []
    if not paths:
        named = printable(shortened(where))
        raise UserError(f"wds:{named} names no tars; give their folder, or a pattern of names.")
    paths.sort(key=lambda path: natural_order(path.name))
    twice, times = Counter(path.name for path in paths).most_common(1)[0]
    if times > 1:
        raise UserError(f"wds:{where} names {times} tars {twice}; give each a name of its own.")
    return paths


def _samples(
    path: Path, members: Sequence[tuple[str, int, int]]
) -> tuple[dict[str, dict[str, tuple[int, int]]], list[str]]:
    """Key → {"image" or a suffix of LABELS: (offset, bytes)}, of the samples with an image."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    outside = []
    for member, offset, length in members:
        name = member.removeprefix("./")
        folder, _, base = name.rpartition("/")
        key, dot, suffix = base.partition(".")
        if name.startswith("/") or ".." in folder.split("/"):
            outside.append(member)
            continue
        kind = "image" if is_image(base) else suffix.casefold()
        if not key or not dot or kind not in ("image", *LABELS):
            continue
        sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
        if kind in sample:
            what = "images" if kind == "image" else f"labels .{kind}"
            raise UserError(f"{path} holds two {what} of the key {quoted(key)}; pack it anew.")
        sample[kind] = offset, length
    remarks = []
    if outside:
        remarks.append(
            f"left out {counted(len(outside), 'file')} in {path} whose names lead out of it, the "
            f"first of them {quoted(outside[0])}."
        )
    return {key: files for key, files in samples.items() if "image" in files}, remarks


def _label(tar: Tar, key: str, files: dict[str, tuple[int, int]]) -> int | str | None:
    """A class by its number or its name; None where nothing says it."""
    for kind in LABELS:
        if kind not in files:
            continue
        offset, length = files[kind]
        place = f"{tar.path}: {shortened(printable(key))}.{kind}"
        try:
            if length > LARGEST_LABEL:
                raise ValueError
            text = tar.read(offset, length).decode("utf-8-sig").strip()
            if kind == "txt":
                return normalize("NFC", text) or None
            value: Any = _stated(parse_json(text)) if kind == "json" else _number(text)
        except OSError as error:
            raise UserError(f"Cannot read {tar.path}: {error.strerror}; try again.") from error
        except ValueError:
            name = " (names go into .txt or .json)" if kind == "cls" else ""
            raise UserError(f"{place} is no label; write the number of a class{name}.") from None
        if value is None:
            continue
        if isinstance(value, str):
            return normalize("NFC", value.strip()) or None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_NUMBERS:
            raise UserError(
                f"{place} says {quoted(value)}, which is no class; write its number, from 0."
            )
        return value
    return None


def _number(text: str) -> int:
    if not re.fullmatch("-?[0-9]+", text):  # int() takes underscores and digits of every script
        raise ValueError
    return int(text)


def _stated(document: Any) -> Any:
    if not isinstance(document, dict):
        raise ValueError
    return next((document[name] for name in IN_JSON if document.get(name) is not None), None)


def _numbered(
    where: str, listed: Path, labels: Sequence[int | str | None]
) -> tuple[list[str], np.ndarray]:
    """The class names, and the label of every sample, NO_LABEL where there is none."""
    there = {label for label in labels if label is not None}
    names = {label for label in there if isinstance(label, str)}
    highest = max((label for label in there if isinstance(label, int)), default=-1)
    if listed.exists():
        class_names = read_class_names(listed)
        if unknown := sorted(names - set(class_names)):
            raise UserError(f"{listed} lacks the class {quoted(unknown[0])}; add it.")
        if highest >= len(class_names):
            raise UserError(
                f"{listed} names {counted(len(class_names), 'class', 'classes')}, and the labels "
                f"of wds:{where} go up to {highest}, counted from 0; name all classes."
            )
    elif names and highest >= 0:
        raise UserError(
            f"The labels of wds:{where} are numbers ({highest}) and names "
            f"({quoted(min(names))}); name the classes in {listed}, one per line."
        )
    else:
        class_names = sorted(names, key=natural_order) or [str(n) for n in range(highest + 1)]
    number: dict[Any, int] = {name: label for label, name in enumerate(class_names)}
    number |= {label: label for label in range(len(class_names))}
    return class_names, np.array([number.get(label, NO_LABEL) for label in labels], np.int32)
