"""Data sets of the Hugging Face hub, or folders that its package `datasets` can read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_adapter.errors import UserError, first_line
from clip_adapter.extract.datasets.image_files import natural_order
from clip_adapter.extract.datasets.source import (
    DEFAULT_TEMPLATES,
    ImageDataset,
    SourceOptions,
    Split,
)
from clip_adapter.extract.datasets.splitting import complete_splits, labelled_splits, take
from clip_adapter.extract.encoding.images import open_image
from clip_adapter.files import is_file, user_path
from clip_adapter.words import quoted

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder
TEXT = ("string", "large_string")
LABEL_NAMES = ("label", "labels", "class", "category")


def open_hugging_face(name: str, options: SourceOptions) -> ImageDataset:
    """The data set `ORG/NAME` of the hub, or a local folder, with one image and one label column.

    A folder is one that `save_to_disk` wrote, of a DatasetDict or of one Dataset, or that
    `load_dataset` understands. The columns are those that `options.columns` names, or found by
    their types: Image; ClassLabel, or text where there is none. Class names are the label's, or
    the texts in natural order. Splits mean what their names say (see `split_of`); those that are
    missing or unlabelled are made as `complete_splits` says. ids are split/index. Code that comes
    with a data set is never run. Remarks count what is left out.

    Raises UserError where the package is missing, the data set cannot be had, or which column is
    meant cannot be told.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"hf:{name} needs the package datasets: pip install 'clip-adapter[hf]'."
        ) from None
    if "split" in options.columns:
        raise UserError(f"hf:{name} has splits, not a column of them; leave out split=.")
    if name.startswith("~"):
        name = str(user_path(name))
    loaded = _load(datasets, name)
    columns = next(iter(loaded.values())).features
    of_images, labels = (_of_type(columns, kind) for kind in (datasets.Image, datasets.ClassLabel))
    image = _column(name, "path", options, of_images, "type Image")
    own, kind = options.columns.get("label"), "type ClassLabel"
    if (not labels or own not in (None, *labels)) and (texts := _texts(columns, own)):
        labels, kind = texts, "text"
    label = _column(name, "label", options, labels, kind)
    class_names, numbers = _numbered(name, {s: _labels(t, label) for s, t in loaded.items()})

    def labelled(published: str) -> tuple[Split | None, int]:
        table, labels = loaded[published], numbers[published]
        rows = np.flatnonzero(labels >= 0)
        undecoded = table.cast_column(image, datasets.Image(decode=False))
        images = _TableImages(undecoded.select_columns([image]), image)
        ids = [f"{published}/{row}" for row in range(len(table))]
        origin = f"{published} split of hf:{name}"
        whole = Split(ids, labels, images, origin, content=images.content)
        return take(whole, rows, origin) if len(rows) else None, len(table) - len(rows)

    counts = {published: len(table) for published, table in loaded.items()}
    splits, remarks = labelled_splits(f"hf:{name}", counts, labelled)
    fingerprints = {split: table._fingerprint for split, table in loaded.items()}
    return ImageDataset(
        name,
        class_names,
        DEFAULT_TEMPLATES,
        complete_splits(splits, class_names, options),
        {"name": name, "source": f"hf:{name}", "version": fingerprints},
        remarks,
    )


def _load(datasets: Any, name: str) -> dict[str, Any]:
    """The tables by split."""
    try:
        if any(is_file(Path(name) / mark) for mark in SAVED):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name)
    except Exception as error:  # the package raises errors of many kinds, its hub client others
        raise UserError(
            f"hf:{name} cannot be loaded: {first_line(error)}; check the name, or give a local "
            "folder."
        ) from error
    if isinstance(found, datasets.Dataset):  # of one split, which it may or may not know
        return {str(found.split or "train"): found}
    return dict(found)


def _of_type(columns: Any, kind: type) -> list[str]:
    return [column for column, feature in columns.items() if isinstance(feature, kind)]


def _texts(columns: Any, own: str | None) -> list[str]:
    """The columns whose texts may be class names: the one asked for, whose numbers may be too, or
    those that are called a label, or all."""
    kinds = {name: str(getattr(feature, "dtype", "")) for name, feature in columns.items()}
    if own is not None:
        return [own] if kinds.get(own, "").startswith((*TEXT, "int", "uint", "bool")) else []
    texts = [name for name, kind in kinds.items() if kind in TEXT]
    return [name for name in texts if name.casefold() in LABEL_NAMES] or texts


def _column(name: str, what: str, options: SourceOptions, columns: Sequence[str], kind: str) -> str:
    """The column that was asked for, or else the only one found."""
    own = options.columns.get(what)
    if own is not None and own not in columns:
        raise UserError(f"hf:{name} has no column {quoted(own)} that could be its {what}.")
    if own is None and len(columns) != 1:
        raise UserError(
            f"hf:{name} has {len(columns)} columns of {kind} ({', '.join(columns) or 'none'}); "
            f"exactly one is needed, or --columns {what}=NAME."
        )
    return own or columns[0]


def _labels(table: Any, column: str) -> tuple[list[str] | None, Sequence[Any]]:
    """The class names that belong to a split's labels, where there are such, and the labels."""
    if column not in table.column_names:
        return None, [None] * len(table)
    return getattr(table.features[column], "names", None), table[column]


def _numbered(
    name: str, labels: Mapping[str, tuple[list[str] | None, Sequence[Any]]]
) -> tuple[list[str], dict[str, npt.NDArray[np.int32]]]:
    """The class names, and the label of every row of every split, -1 where there is none."""
    if stated := [names for names, _ in labels.values() if names is not None]:
        if any(names != stated[0] for names in stated):
            raise UserError(f"hf:{name} numbers its classes otherwise in each split; save it anew.")
        of: dict[Any, int] = {number: number for number in range(len(stated[0]))}
        texts = {split: list(values) for split, (_, values) in labels.items()}
        class_names = list(stated[0])
    else:
        texts = {
            split: ["" if v is None else normalize("NFC", str(v).strip()) for v in values]
            for split, (_, values) in labels.items()
        }
        there = {text for own in texts.values() for text in own} - {""}
        class_names = sorted(there, key=natural_order)
        of = {text: number for number, text in enumerate(class_names)}
    return class_names, {
        split: np.array([of.get(v, -1) for v in values], np.int32)
        for split, values in texts.items()
    }


@dataclass(frozen=True)
class _TableImages:
    """index → image of a memory-mapped table, which threads may share."""

    table: Any
    column: str

    def __call__(self, index: int) -> Image.Image:
        return open_image(self._stored(index))

    def content(self, index: int) -> bytes:
        stored = self._stored(index)
        try:
            return stored.read_bytes() if isinstance(stored, Path) else stored
        except OSError:  # which reading the image will say
            return str(stored).encode()

    def _stored(self, index: int) -> Path | bytes:
        """No bytes, which are no image, for a row without one."""
        stored = self.table[index][self.column] or {}
        path, content = stored.get("path"), stored.get("bytes")
        return Path(path) if content is None and path else content or b""
