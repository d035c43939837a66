"""What must hold for every data set, wherever it comes from."""

import reprlib
from collections import Counter

import numpy as np

from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.words import counted, some

MINIMUM_CLASSES = 2
CLASS_NAME_MAX = 1000  # each takes the room of the longest in a cache


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
