"""A folder of images: sub-folders for the splits, or straight away one folder per class."""

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from clip_adapter.cache.schema import UNLABELLED
from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.image_files import (
    Listing,
    folder_group,
    natural_order,
    split_of_files,
)
from clip_adapter.extract.datasets.source import (
    DEFAULT_TEMPLATES,
    GROUP,
    NO_LABEL,
    PARENT,
    ImageDataset,
    SourceOptions,
    Split,
    split_of,
    splits_among,
)
from clip_adapter.extract.datasets.splitting import complete_splits
from clip_adapter.files import is_folder, user_path
from clip_adapter.listener import Listener
from clip_adapter.words import counted, some

ClassImages = dict[str, list[str]]


def open_folder(folder: str, options: SourceOptions) -> ImageDataset:
    """The images below `folder`; ids are their paths relative to it, with forward slashes.

    It holds train, val and test folders (or what means these, see `split_of`) with one folder per
    class each, and may hold images without labels in a folder `unlabelled` beside these; or it
    holds one folder per class itself. The folders' names, composed (NFC), are the class
    names, in natural order (class2 before class10). Splits that are missing are made as
    `complete_splits` says. Remarks count the images that lie elsewhere. With `options.group` the
    folder within that of the class which an image lies in is its group, one of that name in every
    class; what lies in none is a group of its own.

    Raises UserError for a folder that cannot be read or holds no class folders, for two folders
    that mean the same split, and for classes with too few images.
    """
    _check_group(options)
    data, _ = _found(user_path(folder), options.listener, grouped=options.group is not None)
    splits = complete_splits(data.splits, data.class_names, options, published=False)
    return replace(data, splits=splits)


def open_images(folder: str, options: SourceOptions) -> ImageDataset:
    """The images in `folder` and its sub-folders, none of which has a label: one split, UNLABELLED,
    of a data set of the classes that `options` name. ids are as `open_folder` makes them.

    Raises UserError for a folder that cannot be read or holds no images.
    """
    root = user_path(folder)
    _check_group(options)
    _need_folder(root)
    listing = Listing(root, options.listener)
    paths = listing.below(root)
    remarks = listing.remarks()
    if not paths:
        raise UserError(f"{root} holds no images; give the folder that does. {' '.join(remarks)}")
    outer = None if options.group is None else 0
    splits = complete_splits({UNLABELLED: _unlabelled(root, paths, outer)}, (), options)
    own = root.resolve().name
    about = {"name": own, "source": "images", "version": None}
    return ImageDataset(own, options.class_names, DEFAULT_TEMPLATES, splits, about, remarks)


def _check_group(options: SourceOptions) -> None:
    if options.group not in (None, PARENT):
        raise UserError(
            f"--{GROUP} {options.group}: folders have no columns; give {PARENT}, the folder that "
            "an image lies in, or take a csv: table."
        )


def _unlabelled(root: Path, paths: Iterable[str], outer: int | None) -> Split:
    return _split(root, [(path, NO_LABEL) for path in paths], "images without labels", outer)


def _split(root: Path, rows: list[tuple[str, int]], origin: str, outer: int | None) -> Split:
    """outer: in how many folders an image lies that make no group; None where none does."""
    groups = None if outer is None else [folder_group(path, outer) for path, _ in rows]
    return split_of_files(root, rows, origin, groups)


def labelled_images(root: Path, split: str, listener: Listener | None = None) -> ImageDataset:
    """The images of the folder `split` of `root`, or all where it holds one folder per class
    itself: a data set of that one split, which is called test.

    Raises UserError as `open_folder` does, and where there is no such folder.
    """
    data, cut = _found(root, listener)
    chosen = data.splits.get(split if cut else "train")
    if chosen is None:
        raise UserError(f"{root} has no {split} folder, only {', '.join(data.splits)}.")
    return replace(data, splits={"test": chosen})


def _found(
    root: Path, listener: Listener | None, *, grouped: bool = False
) -> tuple[ImageDataset, bool]:
    """The images as they lie there, and whether they lie there in splits."""
    _need_folder(root)
    listing = Listing(root, listener)
    folders = _split_folders(root, listing)
    places = {name: f"{inner}/" for name, inner in folders.items()} or {"train": ""}
    remarks = _elsewhere(root, listing, list(folders.values()))
    beside = folders and UNLABELLED in listing.level(root).folders  # else it is a class
    unlabelled = listing.below(root / UNLABELLED) if beside else []
    images_of = {name: _class_images(root, place, listing) for name, place in places.items()}
    names = sorted({c for images in images_of.values() for c in images}, key=natural_order)
    class_names = [c for c in names if any(images.get(c) for images in images_of.values())]
    if not class_names:
        raise UserError(_no_classes(root, listing))
    remarks += listing.remarks()
    if empty := [c for c in names if c not in class_names]:
        remarks.append(f"left out {some(empty)}: no images there.")
    remarks += _doubts(root, images_of, bool(folders))
    number = {name: label for label, name in enumerate(class_names)}
    outer = (2 if folders else 1) if grouped else None
    splits = {
        name: _split(
            root,
            [(path, number[c]) for c, paths in images.items() for path in paths],
            f"folder {folders[name]}" if folders else "one folder per class",
            outer,
        )
        for name, images in images_of.items()
    }
    if unlabelled:
        paths = [f"{UNLABELLED}/{path}" for path in unlabelled]
        splits[UNLABELLED] = _unlabelled(root, paths, 1 if grouped else None)
    own = root.resolve().name
    about = {"name": own, "source": "folder", "version": None}
    data = ImageDataset(own, class_names, DEFAULT_TEMPLATES, splits, about, remarks)
    return data, bool(folders)


def _need_folder(root: Path) -> None:
    if not is_folder(root):
        raise UserError(f"There is no folder {root}; give the folder that holds your images.")


def _split_folders(root: Path, listing: Listing) -> dict[str, str]:
    """Split → folder. A folder called train counts only where it holds folders, and images beside
    them only where a second such folder, or nothing else, lies there: a train can also be a class
    of things."""
    names = listing.level(root).folders
    meant = splits_among(names)
    levels = {name: listing.level(root / name) for name in meant}
    nested = [name for name in meant if levels[name].folders]
    only_splits = len(meant) == len(names)
    if only_splits and not nested and any(level.images for level in levels.values()):
        raise UserError(
            f"{root} holds {some(names)} with images but without a folder for each class; put the "
            "images of every class into a folder with its name there."
        )
    chosen: dict[str, str] = {}
    for name in nested:
        if levels[name].images and len(nested) == 1 and not only_splits:
            continue
        split = meant[name]
        if split in chosen:
            raise UserError(
                f"{root} holds {chosen[split]} and {name}, which both mean the {split} split; "
                "keep one of them."
            )
        chosen[split] = name
    return chosen


def _elsewhere(root: Path, listing: Listing, split_folders: list[str]) -> list[str]:
    """Remarks on images that are in no class folder, or in folders that are no splits."""
    remarks = []
    places = [root, *(root / name for name in split_folders)]
    loose = [place / name for place in places for name in listing.level(place).images]
    folders = listing.level(root).folders
    if loose and folders:
        remarks.append(
            f"left out {counted(len(loose), 'image')} beside the class folders, the first of them "
            f"{loose[0]}; put each into the folder of its class."
        )
    known = [*split_folders, UNLABELLED]
    others = [name for name in folders if name not in known] if split_folders else []
    for name in others:
        if images := listing.below(root / name):
            remarks.append(
                f"left out {counted(len(images), 'image')} in {root / name}: it is no split with "
                f"class folders, as {some(split_folders)} beside it."
            )
    return remarks


def _class_images(root: Path, place: str, listing: Listing) -> ClassImages:
    """Class → its images' paths below the root. place: of the class folders, with a slash.

    A name is one class in whichever form a file system gives its accents.
    """
    classes: ClassImages = {}
    for name in listing.level(root / place).folders:
        images = listing.below(root / place / name)
        own = classes.setdefault(unicodedata.normalize("NFC", name), [])
        own += [f"{place}{name}/{image}" for image in images]
    return classes


def _no_classes(root: Path, listing: Listing) -> str:
    level = listing.level(root)
    if level.folders:
        passed_over = " ".join(listing.remarks()).rstrip(".")
        because = f" ({passed_over})" if passed_over else ""
        return f"The folders in {root} hold no images{because}; put some there."
    each = "put the images of every class into a folder with its name"
    if level.images:
        images = counted(len(level.images), "image")
        return f"{root} holds {images} and no folders; give the folder above it, or {each}."
    return f"{root} holds no folders; {each}."


def _doubts(root: Path, images_of: dict[str, ClassImages], cut: bool) -> list[str]:
    """Remarks where folders may be no classes.

    Raises UserError where all images lie in the folders of a single one.
    """
    classes = {
        name: paths for images in images_of.values() for name, paths in images.items() if paths
    }
    if len(classes) == 1:
        (paths,) = classes.values()
        common, inner = _common(paths)
        if inner:
            raise UserError(
                f"{root} has one class folder with images, {common}, and they lie in folders of "
                f"it, {some(inner)}; if these are the classes or splits, give {root / common}."
            )
    remarks = []
    if not cut:
        inside = {name: {_inner(path) for path in paths} for name, paths in classes.items()}
        deep = [name for name, folders in inside.items() if "" not in folders]
        if len(deep) > 1:
            folders = sorted(set.union(*(inside[name] for name in deep)), key=natural_order)
            remarks.append(
                f"took {some(deep)} for classes, though all of their images lie deeper, in folders "
                f"of theirs ({some(folders)}): if these are the classes, call the outer ones "
                "train, val and test, or give one of them."
            )
        if misread := [name for name in classes if split_of(name)]:
            remarks.append(f"took {some(misread)} for classes: there are no class folders in them.")
    return remarks


def _inner(path: str) -> str:
    """The folder of its class's that an image lies in, "" for none."""
    return path.split("/")[1] if path.count("/") > 1 else ""


def _common(paths: Iterable[str]) -> tuple[str, list[str]]:
    """The folder that all of them lie in, and the folders in it that they lie in; [] where some
    lie in it itself."""
    places = {os.path.dirname(path) for path in paths}  # noqa: PTH120
    common = os.path.commonpath(places)
    if common in places:
        return common, []
    inner = {place[len(common) + 1 :].split("/")[0] for place in places}
    return common, sorted(inner, key=natural_order)
