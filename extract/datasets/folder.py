"""A folder of images: sub-folders for the splits, or straight away one folder per class."""

from collections import Counter
from pathlib import Path

import numpy as np

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.words import some
from clip_adapter.extract.datasets.image_files import (
    ImageFiles,
    holds_images,
    images_below,
    natural_order,
    unread_remarks,
    visible_folders,
)
from clip_adapter.extract.datasets.source import (
    DEFAULT_TEMPLATES,
    SPLIT_NAMES,
    ImageDataset,
    SourceOptions,
    Split,
)
from clip_adapter.extract.datasets.splitting import complete_splits
from clip_adapter.extract.files import is_folder, user_path

ClassImages = dict[str, list[str]]


def open_folder(folder: str, options: SourceOptions) -> ImageDataset:
    """The images below `folder`; ids are their paths relative to it, with forward slashes.

    It holds train, val (or valid, validation) and test folders with one folder per class each, or
    one folder per class itself. The folders' names are the class names, in natural order (class2
    before class10); one without any image is left out, with a remark. Splits that are missing are
    made as `complete_splits` says.

    Raises UserError for a folder that cannot be read or holds no class folders, for two folders
    that mean the same split, and for classes with too few images.
    """
    root = user_path(folder)
    class_names, splits, remarks = _found(root)
    whole = complete_splits(splits, class_names, options, published=False)
    return _data_set(root, class_names, whole, remarks)


def labelled_images(root: Path, split: str) -> ImageDataset:
    """The images of the folder `split` of `root`, or all where it holds one folder per class
    itself: a data set of that one split, which is called test.

    Raises UserError as `open_folder` does, and where there is no such folder.
    """
    class_names, splits, remarks = _found(root)
    chosen = splits.get(split) if _split_folders(root) else splits["train"]
    if chosen is None:
        raise UserError(f"{root} has no {split} folder, only {', '.join(splits)}.")
    return _data_set(root, class_names, {"test": chosen}, remarks)


def _found(root: Path) -> tuple[list[str], dict[str, Split], list[str]]:
    """The class names, the splits as they lie there, and remarks."""
    if not is_folder(root):
        raise UserError(f"There is no folder {root}; give the folder that holds your images.")
    folders = {name: root / inner for name, inner in _split_folders(root).items()}
    origins = {name: f"folder {place.name}" for name, place in folders.items()}
    if not folders:
        folders, origins = {"train": root}, {"train": "one folder per class"}
    unread: Counter[str] = Counter()
    found = {name: _class_images(root, place, unread) for name, place in folders.items()}
    names = sorted({c for images in found.values() for c in images}, key=natural_order)
    class_names = [c for c in names if any(images.get(c) for images in found.values())]
    remarks = unread_remarks(unread)
    if not names:
        raise UserError(
            f"{root} holds no folders; put the images of every class into a folder with its name."
        )
    if not class_names:
        passed_over = f" ({remarks[0].rstrip('.')})" if remarks else ""
        raise UserError(f"The folders in {root} hold no images{passed_over}; put some there.")
    if empty := [c for c in names if c not in class_names]:
        remarks.append(f"left out {some(empty)}: no images there.")
    splits = {
        name: _split(root, images, class_names, origins[name]) for name, images in found.items()
    }
    return class_names, splits, remarks


def _data_set(
    root: Path, class_names: list[str], splits: dict[str, Split], remarks: list[str]
) -> ImageDataset:
    name = root.resolve().name
    about = {"name": name, "source": "folder", "version": None}
    return ImageDataset(name, class_names, DEFAULT_TEMPLATES, splits, about, remarks)


def _split_folders(root: Path) -> dict[str, str]:
    """Split → folder. A folder called train counts only where it holds folders and no images
    itself, since a train can also be a class of things."""
    chosen: dict[str, str] = {}
    for inner in visible_folders(root):
        split = SPLIT_NAMES.get(inner.lower())
        if split is None or not _holds_only_folders(root / inner):
            continue
        if split in chosen:
            raise UserError(
                f"{root} holds {chosen[split]} and {inner}, which both mean the {split} split; "
                "keep one of them."
            )
        chosen[split] = inner
    return chosen


def _holds_only_folders(folder: Path) -> bool:
    return bool(visible_folders(folder)) and not holds_images(folder)


def _class_images(root: Path, folder: Path, unread: Counter[str]) -> ClassImages:
    prefix = folder.relative_to(root).as_posix()
    prefix = "" if prefix == "." else f"{prefix}/"
    return {
        name: [f"{prefix}{name}/{path}" for path in images_below(folder / name, unread)]
        for name in visible_folders(folder)
    }


def _split(root: Path, images: ClassImages, class_names: list[str], origin: str) -> Split:
    label = {name: index for index, name in enumerate(class_names)}
    paths = [path for name in images for path in images[name]]
    labels = [label[name] for name in images for _ in images[name]]
    files = ImageFiles(root, paths)
    return Split(paths, np.array(labels, np.int32), files, origin, files.file)
