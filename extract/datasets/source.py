"""What every source of images gives to the encode loop, and what must hold of it."""

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.words import counted, some

MINIMUM_CLASSES = 2
CLASS_NAME_MAX = 1000  # each takes the room of the longest in a cache
DEFAULT_TEMPLATES = ("a photo of a {}.",)
# What a table says of each image, by the names that these columns have.
COLUMNS = ("path", "label", "split")
GROUP = "group"  # the same of images that belong together
PARENT = "parent"  # in its place: the folder that an image lies in
# What sources call their splits, and what we call them; `eval` as the package `datasets` has it.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NO_LABEL = -1  # of the images of the split UNLABELLED
# What may stand beside one of these: `test_set`, `train2017`, `images-val`.
FILLERS = {"data", "dataset", "image", "images", "img", "set", "split"}


def split_of(name: str) -> str | None:
    """The split that a name means, in any case: `Training`, `dev`, `test_set`; None for others."""
    words = [word for word in re.findall(r"[^\W\d_]+", name.casefold()) if word not in FILLERS]
    return SPLIT_NAMES.get(words[0].removesuffix("set")) if len(words) == 1 else None


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """Name → split, of those that mean one. What is called `eval` where another name means test and
    none val is not for testing: it is val."""
    splits = {name: split for name in names if (split := split_of(name))}
    evals = [name for name in splits if "eval" in name.casefold()]
    others = {split for name, split in splits.items() if name not in evals}
    if "test" in others and "val" not in others:
        splits |= dict.fromkeys(evals, "val")
    return splits


@dataclass(frozen=True)
class Split:
    """One split in its source's order.

    ids: N strings that find the images again. labels: (N,) int32, NO_LABEL where nobody knows.
    read: index → image as stored, opened when asked for; raises OSError or ValueError, then or when
        its pixels are loaded, for an image that cannot be decoded. Safe in several threads and
        cheap to pickle.
    origin: where the split came from, in words, for the cache.
    file: index → the file that holds this image and no other, where there is one.
    content: index → the image's bytes, where ids are but numbers, which others have when rows come
        and go.
    stamp: index → what tells that the image is the one that it was, where no file does.
    groups: N names, equal ones of images that belong on one side (a burst, a video, a patient);
        None where nobody says so.
    """

    ids: Sequence[str]
    labels: npt.NDArray[np.int32]
    read: Callable[[int], Image.Image]
    origin: str
    file: Callable[[int], Path] | None = None
    content: Callable[[int], bytes] | None = None
    groups: Sequence[str] | None = None
    stamp: Callable[[int], str] | None = None


@dataclass(frozen=True)
class ImageDataset:
    """A labelled data set, which may have a split UNLABELLED beside the others, or no other.

    provenance: JSON, which goes into the cache as it is. remarks: sentences for whoever uses it.
    """

    name: str
    class_names: Sequence[str]
    templates: Sequence[str]
    splits: Mapping[str, Split]
    provenance: Mapping[str, Any]
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class SourceOptions:
    """Where sources find their files, and how those without splits are divided.

    data_dir: TensorFlow Datasets' own folder; None for its default.
    data_root: the folder in which CoOp-layout folders lie.
    image_root: what relative paths of a CSV file start from; None for the file's own folder.
    val, test: fractions of the training images that make these splits where a source has none;
        None for 0.2 and 0.3 (see `splitting.complete_splits`).
    seed: of that division.
    columns: what a table calls these of its columns (see COLUMNS), where not so.
    group: what says of which group an image is: `parent`, the folder that it lies in, or a table's
        column; None for the column `group`, where a table has one.
    class_names: of a source that knows none.
    listener: hears how far the search for files is.
    """

    data_dir: Path | None = None
    data_root: Path | None = None
    image_root: Path | None = None
    val: float | None = None
    test: float | None = None
    seed: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    class_names: Sequence[str] = ()
    listener: Listener = field(default_factory=Listener, compare=False)


def checked(dataset: ImageDataset) -> ImageDataset:
    """The data set itself.

    Raises UserError for fewer than two classes, an empty split, a class without training images
    (unless the whole data set is for testing), an id that occurs twice in a split, and names that
    a cache cannot store.
    """
    if len(dataset.class_names) < MINIMUM_CLASSES:
        raise UserError(
            f"{dataset.name} has {counted(len(dataset.class_names), 'class', 'classes')} "
            f"({', '.join(map(repr, dataset.class_names))}); at least two are needed."
        )
    for text in dataset.class_names:
        check_storable(text, "class name")
        if len(text) > CLASS_NAME_MAX:
            raise UserError(
                f"The class name {reprlib.repr(text)} has {len(text):,} characters, more than "
                f"{CLASS_NAME_MAX:,}; name the class shorter."
            )
    for name, split in dataset.splits.items():
        if not len(split.labels):
            raise UserError(f"The {name} split of {dataset.name} has no images; add some.")
        for text in split.ids:
            check_storable(text, "name")
        for text in set(split.groups or ()):
            check_storable(text, "group")
        if len(set(split.ids)) < len(split.ids):
            repeated, times = Counter(split.ids).most_common(1)[0]
            raise UserError(
                f"{reprlib.repr(repeated)} occurs {times} times in the {name} split of "
                f"{dataset.name}; list every image once."
            )
    _check_training_images(dataset)
    return dataset


def check_storable(text: str, what: str) -> None:
    """Raises UserError for text that a cache cannot hold: no valid Unicode, or with a NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"The {what} {text!r} is not valid UTF-8, so a cache cannot hold it; write it anew."
        ) from None
    if "\0" in text:
        raise UserError(
            f"The {what} {reprlib.repr(text)} holds a NUL, which a cache cannot hold; write it "
            "anew."
        )


def _check_training_images(dataset: ImageDataset) -> None:
    if "train" not in dataset.splits:
        return
    counts = np.bincount(dataset.splits["train"].labels, minlength=len(dataset.class_names))
    empty = [dataset.class_names[label] for label in np.flatnonzero(counts == 0).tolist()]
    if empty:
        raise UserError(
            f"No training images for class {some(empty)}; "
            "add some or leave the class out everywhere."
        )
