"""What must hold for every data set, wherever it comes from."""

from collections import Counter

import numpy as np

from clip_adapter.cache.errors import UserError
from clip_adapter.cache.words import counted, some
from clip_adapter.extract.datasets.source import ImageDataset

MINIMUM_CLASSES = 2


def checked(dataset: ImageDataset) -> ImageDataset:
    """The data set itself.

    Raises UserError for fewer than two classes, an empty split, a class without training images
    (unless the whole data set is for testing), an id that occurs twice in a split, and names that
    are no valid Unicode, which a cache cannot store.
    """
    if len(dataset.class_names) < MINIMUM_CLASSES:
        raise UserError(
            f"{dataset.name} has {counted(len(dataset.class_names), 'class', 'classes')} "
            f"({', '.join(map(repr, dataset.class_names))}); at least two are needed."
        )
    for text in dataset.class_names:
        _check_unicode(text)
    for name, split in dataset.splits.items():
        if not len(split.labels):
            raise UserError(f"The {name} split of {dataset.name} has no images; add some.")
        for text in split.ids:
            _check_unicode(text)
        if len(set(split.ids)) < len(split.ids):
            repeated, times = Counter(split.ids).most_common(1)[0]
            raise UserError(
                f"{repeated!r} occurs {times} times in the {name} split of {dataset.name}; "
                "list every image once."
            )
    _check_training_images(dataset)
    return dataset


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"The name {text!r} is not valid UTF-8, so a cache cannot hold it; rename the file."
        ) from None


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
