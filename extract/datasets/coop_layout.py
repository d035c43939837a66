"""CoOp's folder layout with its published splits (arXiv 2109.01134, DATASETS.md of its repository).

A data set's folder holds its images and, next to them, a split file: JSON of
`{"train": [[path, label, class name], …], "val": …, "test": …}` for most, text lists for
FGVC-Aircraft, and nothing for ImageNet and its variants, whose folders are the labels. The order of
the rows is the file's, so that few-shot draws equal the published ones.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict
from unicodedata import normalize

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.catalogue import CatalogueEntry, load_catalogue
from clip_adapter.extract.datasets.image_files import (
    Listing,
    require_files,
    split_of_files,
)
from clip_adapter.extract.datasets.source import (
    DEFAULT_TEMPLATES,
    ImageDataset,
    SourceOptions,
)
from clip_adapter.extract.datasets.splitting import complete_splits
from clip_adapter.files import is_file, is_folder, read_users_text, user_path
from clip_adapter.records import from_file
from clip_adapter.words import some

Rows = list[tuple[str, int]]
SPLITS = ("train", "val", "test")
ANY_NUMBER = 0  # of classes, in a split file of one's own
ARTICLE = "see DATASETS.md in github.com/KaiyangZhou/CoOp"


class SplitFile(TypedDict):
    """Path, label and class name of every image."""

    train: list[tuple[str, int, str]]
    val: list[tuple[str, int, str]]
    test: list[tuple[str, int, str]]


def open_coop(path: str, options: SourceOptions) -> ImageDataset:
    """The data set of the literature in the folder `path`; ids are the paths in its split file.

    It is told by the folder's name, or by the split file that lies there. A split file of another
    name, if it is the only one there, is somebody's own: of that data set where the folder has its
    name, else of a data set of one's own, with the classes that the file names. ImageNet has no val
    split here (CoOp validates on its test images; we don't) unless `options` ask for a fraction
    of train.

    Raises UserError where the folder, its split file or some of its images are missing, saying
    what belongs where, and for a split file that contradicts itself.
    """
    folder = user_path(path)
    if not is_folder(folder):
        raise UserError(f"There is no folder {folder}; put CoOp's layout there ({ARTICLE}).")
    listing = Listing(folder, options.listener)
    entry = _recognised(folder)
    class_names: Sequence[str] = entry.class_names
    if entry.coop_split_file:
        rows, class_names = _read_split_file(
            folder / entry.coop_split_file, entry.classes, entry.name
        )
        origin = _published(entry, rows)
    elif entry.coop_lists:
        rows, class_names = _read_lists(folder, entry)
        origin = "published lists of images per split"
    else:
        rows, origin = _read_folders(folder, entry, listing), "one folder of images per class"
        if "train" in rows and options.val is None:
            options = replace(options, val=0.0)
    paths = [path for split in rows.values() for path, _ in split]
    inner = entry.coop_images
    if entry.classes == ANY_NUMBER:
        inner = _image_folder(folder, paths[0], listing) if paths else "."
    root = folder / inner
    require_files(root, paths, f"extract the images there ({ARTICLE})")
    splits = {
        name: split_of_files(root, split, f"{name}: {origin}") for name, split in rows.items()
    }
    provenance = {"name": entry.name, "source": "CoOp layout", "version": entry.coop_split_file}
    return ImageDataset(
        entry.name,
        class_names,
        entry.templates,
        complete_splits(splits, class_names, options),
        provenance,
        listing.remarks(),
    )


def coop_instructions(entry: CatalogueEntry, root: Path | None) -> str:
    """What to put where, for a data set in CoOp's layout."""
    place = root or Path("DATA_ROOT")
    folder = place / entry.coop_dir
    files = entry.coop_split_file or ", ".join(
        [*entry.coop_lists.values(), *filter(None, [entry.coop_classes_file])]
    )
    if files:
        what = f"images into {folder / entry.coop_images} and {files} into {folder}"
    else:  # whose folders are the labels
        below = " and ".join(str(folder / images) for images in entry.coop_folders.values())
        what = f"images into {below}, a folder for each class"
    return f"put its {what} ({ARTICLE}), and give --data-root {place}"


def _recognised(folder: Path) -> CatalogueEntry:
    entries = load_catalogue().values()
    name = folder.resolve().name
    by_name = [e for e in entries if name == e.coop_dir]
    by_file = [e for e in entries if e.coop_split_file and is_file(folder / e.coop_split_file)]
    if by_file or (by_name and not by_name[0].coop_split_file):
        return (by_name + by_file)[0]
    own = sorted(path.name for path in folder.glob("*split*.json") if is_file(path))
    if len(own) > 1:
        raise UserError(f"{folder} holds {some(own)}, which all look like split files; keep one.")
    if own and by_name:
        return replace(by_name[0], coop_split_file=own[0])
    if own:
        return CatalogueEntry(name, ANY_NUMBER, DEFAULT_TEMPLATES, coop_split_file=own[0])
    if by_name:
        return by_name[0]
    known = ", ".join(e.coop_dir for e in entries)
    raise UserError(
        f"{folder} is not recognised as a data set in CoOp's layout: it holds no "
        f"split_zhou_*.json file and is not called one of {known}; for any other folder of "
        f"images use folder:{folder}."
    )


def _image_folder(folder: Path, first: str, listing: Listing) -> str:
    """In which folder there the first image of a split file of one's own lies."""
    places = [".", *listing.level(folder).folders]
    return next((place for place in places if is_file(folder / place / first)), "images")


def _read_split_file(path: Path, classes: int, name: str) -> tuple[dict[str, Rows], list[str]]:
    if not path.exists():
        if deeper := sorted(path.parent.glob(f"*/{path.name}")):
            raise UserError(
                f"{path.parent} has no {path.name}, but {deeper[0].parent} has; give that folder."
            )
        raise UserError(
            f"{path.parent} has no {path.name}; download it and put it there ({ARTICLE})."
        )
    stored: Mapping[str, Any] = from_file(
        SplitFile, path, "a split file of CoOp's", f"; download it again ({ARTICLE})"
    )
    listed = {split: stored[split] for split in SPLITS}
    rows = {split: [(path, label) for path, label, _ in own] for split, own in listed.items()}
    named = {(label, normalize("NFC", own)) for part in listed.values() for _, label, own in part}
    labels = [label for label, _ in sorted(named)]
    if labels != list(range(len(labels) if classes == ANY_NUMBER else classes)):
        many = "labels from 0 on" if classes == ANY_NUMBER else f"{classes} classes"
        raise UserError(
            f"{path} has {len(labels)} pairs of label and class name, where {name} has {many}; "
            f"download it again ({ARTICLE})."
        )
    return rows, [name for _, name in sorted(named)]


def _published(entry: CatalogueEntry, rows: Mapping[str, Rows]) -> str:
    sizes = {name: len(split) for name, split in rows.items()}
    if entry.classes == ANY_NUMBER:
        return f"split file {entry.coop_split_file}"
    if entry.coop_split_sizes and sizes != dict(entry.coop_split_sizes):
        return f"{entry.coop_split_file}, which has not the sizes of the published split"
    return f"published split {entry.coop_split_file}"


def _read_lists(folder: Path, entry: CatalogueEntry) -> tuple[dict[str, Rows], list[str]]:
    class_names = _lines(folder / str(entry.coop_classes_file))
    labels = {name: label for label, name in enumerate(class_names)}
    if len(labels) != entry.classes:
        raise UserError(
            f"{folder / str(entry.coop_classes_file)} names {len(labels)} classes, where "
            f"{entry.name} has {entry.classes}; put the original file there ({ARTICLE})."
        )
    rows: dict[str, Rows] = {}
    for split, name in entry.coop_lists.items():
        rows[split] = []
        for line in _lines(folder / name):
            image, _, class_name = line.partition(" ")
            if class_name not in labels:
                raise UserError(
                    f"{folder / name} has the line {reprlib.repr(line)}, whose class is not in "
                    f"{entry.coop_classes_file}; put the original files there ({ARTICLE})."
                )
            rows[split].append((f"{image}.jpg", labels[class_name]))
    return rows, class_names


def _lines(path: Path) -> list[str]:
    if not path.exists():
        raise UserError(f"{path.parent} has no {path.name}; put it there ({ARTICLE}).")
    return [line.strip() for line in read_users_text(path).splitlines() if line.strip()]


def _read_folders(folder: Path, entry: CatalogueEntry, listing: Listing) -> dict[str, Rows]:
    rows: dict[str, Rows] = {}
    for split, inner in entry.coop_folders.items():
        if not is_folder(folder / inner):
            raise UserError(
                f"{folder} has no folder {inner} with one folder of images per class; "
                f"put it there ({ARTICLE})."
            )
        names = listing.level(folder / inner).folders
        if len(names) != entry.classes:
            raise UserError(
                f"{folder / inner} has {len(names)} class folders, where {entry.name} has "
                f"{entry.classes}; put all of them there ({ARTICLE})."
            )
        rows[split] = [
            (f"{inner}/{name}/{path}", label)
            for label, name in enumerate(names)
            for path in listing.below(folder / inner / name)
        ]
    return rows
