"""Data sets of the Hugging Face hub, or folders that its package `datasets` can read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_adapter.cache.errors import UserError
from clip_adapter.extract.datasets.source import (
    DEFAULT_TEMPLATES,
    SPLIT_NAMES,
    ImageDataset,
    SourceOptions,
    Split,
)
from clip_adapter.extract.datasets.splitting import complete_splits
from clip_adapter.extract.files import is_file, user_path
from clip_adapter.extract.images import open_image


def open_hugging_face(name: str, options: SourceOptions) -> ImageDataset:
    """The data set `ORG/NAME` of the hub, or a local folder, with one image and one label column.

    A folder is one that `save_to_disk` wrote or that `load_dataset` understands. The columns are
    found by their types, Image and ClassLabel; class names are the label's. Splits that are
    missing or unlabelled are made as `complete_splits` says. ids are split/index. Code that comes
    with a data set is never run.

    Raises UserError where the package is missing, the data set cannot be had, or it has not
    exactly one column of each type.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"hf:{name} needs the package datasets: pip install 'clip-adapter[hf]'."
        ) from None
    if name.startswith("~"):
        name = str(user_path(name))
    loaded = _load(datasets, name)
    columns = next(iter(loaded.values())).features
    image = _only_column(name, columns, datasets.Image)
    label = _only_column(name, columns, datasets.ClassLabel)
    splits = {}
    for published, table in loaded.items():
        labels = np.array(table[label], np.int32)
        if published in SPLIT_NAMES and (labels >= 0).all():
            undecoded = table.cast_column(image, datasets.Image(decode=False))
            splits[SPLIT_NAMES[published]] = Split(
                [f"{published}/{row}" for row in range(len(labels))],
                labels,
                _TableImages(undecoded.select_columns([image]), image),
                f"{published} split of hf:{name}",
            )
    if not splits:
        raise UserError(
            f"hf:{name} has no train, validation or test split with labels; "
            f"it has {', '.join(loaded)}."
        )
    class_names = columns[label].names
    fingerprints = {split: table._fingerprint for split, table in loaded.items()}
    return ImageDataset(
        name,
        class_names,
        DEFAULT_TEMPLATES,
        complete_splits(splits, class_names, options),
        {"name": name, "source": f"hf:{name}", "version": fingerprints},
    )


def _load(datasets: Any, name: str) -> Any:
    try:
        if is_file(Path(name) / "dataset_dict.json"):
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name)
    except Exception as error:  # the package raises errors of many kinds, its hub client others
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"hf:{name} cannot be loaded: {reason}; check the name, or give a local folder."
        ) from error


def _only_column(name: str, columns: Any, kind: type) -> str:
    found = [column for column, feature in columns.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise UserError(
            f"hf:{name} has {len(found)} columns of type {kind.__name__} "
            f"({', '.join(found) or 'none'}); exactly one is needed."
        )
    return found[0]


@dataclass(frozen=True)
class _TableImages:
    """index → image of a memory-mapped table, which threads may share."""

    table: Any
    column: str

    def __call__(self, index: int) -> Image.Image:
        stored = self.table[index][self.column]
        return open_image(Path(stored["path"]) if stored["bytes"] is None else stored["bytes"])
