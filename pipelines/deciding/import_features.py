"""Features that something else has encoded: what a file or clip-retrieval's folder holds."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from clip_adapter.errors import UserError, first_line
from clip_adapter.extract.datasets.image_files import natural_order
from clip_adapter.extract.datasets.table import DELIMITERS
from clip_adapter.files import is_there, read_users_text, unreadable
from clip_adapter.listener import Listener
from clip_adapter.pipelines.deciding.feature_table import require_pyarrow, stated_classes
from clip_adapter.words import counted, quoted, shortened, some

FEATURES = ("features", "image_features", "embeddings", "embedding", "img_emb")
# What columns are called, in any case: ours first, then clip-retrieval's and others'.
COLUMNS = {
    "id": ("id", "path", "image_path", "image", "key"),
    "label": ("label", "labels", "class"),
    "split": ("split",),
    "group": ("group",),
}
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Found:
    """arrays: of floating-point numbers and two axes or three, by their names. columns: a value for
    each row, by the names of COLUMNS. class_names: where the file states them."""

    path: Path
    arrays: Mapping[str, np.ndarray]
    columns: Columns = field(default_factory=dict)
    class_names: Sequence[str] = ()

    def features(self, *axes: int) -> np.ndarray:
        """The array that is called so, or the only one, float16 or float32. axes: how many it may
        have. Raises UserError for none, or several, and for one without rows."""
        fitting = {name: own for name, own in self.arrays.items() if own.ndim in axes}
        named = [name for name in FEATURES if name in fitting] or list(fitting)
        if not named or (len(fitting) > 1 and named[0] not in FEATURES):
            there = some([f"{name} {own.shape}" for name, own in self.arrays.items()])
            raise UserError(
                f"{self.path} holds {there or 'no table of floating-point numbers'}; give one with "
                "a row for each image (or class), or call it features."
            )
        array = fitting[named[0]]
        if not array.size:
            raise UserError(f"{self.path} holds no rows.")
        return array if array.dtype == np.float16 else array.astype(np.float32, copy=False)


def read_found(path: Path) -> Found:
    """What a file or a folder holds; nothing in it is executed.

    Raises UserError for what is missing, damaged, of another kind, or holds Python objects.
    """
    if not is_there(path):
        raise UserError(f"{path} does not exist; name a file of features or a folder with img_emb.")
    if path.is_dir():
        return _folder(path)
    kinds = ", ".join(READERS)
    if path.suffix not in READERS:
        raise UserError(f"{path} is none of what is read: {kinds}, or a folder with img_emb.")
    try:
        return READERS[path.suffix](path)
    except UserError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # every library has errors of its own kinds
        reason = shortened(first_line(error), 200)
        if any(word in str(error).casefold() for word in ("pickle", "object", "weights_only")):
            reason = "it holds Python objects, which are not run; save the numbers alone"
        elif isinstance(error, LookupError):  # such as 101, a byte that torch.load does not know
            reason = "it is damaged, or a file of another kind"
        raise UserError(f"{path} cannot be read as {path.suffix}: {reason}.") from error


def read_table(path: Path) -> Columns:
    """The columns of a CSV or Parquet table that are called like those of COLUMNS.

    Raises UserError for one without labels, and as `read_found` does.
    """
    if path.suffix == ".parquet":
        columns = read_found(path).columns
    else:
        text = read_users_text(path)
        mark = max(DELIMITERS, key=text.partition("\n")[0].count)
        try:
            rows = list(csv.DictReader(StringIO(text, newline=""), delimiter=mark))
        except csv.Error as error:
            raise UserError(f"{path} is not a valid CSV file: {error}; save it again.") from error
        columns = _columns(
            {name: [row[name] for row in rows] for name in (rows or [{}])[0] if name}
        )
    if "label" not in columns:
        raise UserError(f"{path} has no rows, or no column label in its first row; add them.")
    return columns


def _columns(lists: Columns) -> dict[str, Sequence[Any]]:
    there = {name.strip().casefold(): own for name, own in lists.items()}
    known = {what: [n for n in names if n in there] for what, names in COLUMNS.items()}
    return {what: there[names[0]] for what, names in known.items() if names}


def _found(path: Path, named: Mapping[str, Any]) -> Found:
    """Of arrays, tensors and lists by their names."""
    arrays = {}
    for name, own in named.items():
        if hasattr(own, "detach"):  # a tensor; NumPy has no bfloat16
            own = (own.float() if str(own.dtype) == "torch.bfloat16" else own).detach().numpy()
        arrays[str(name)] = np.asarray(own)
    floats = {n: own for n, own in arrays.items() if own.dtype.kind == "f" and own.ndim > 1}
    lists = {n: own.tolist() for n, own in arrays.items() if own.ndim == 1}
    return Found(path, floats, _columns(lists))


def _npy(path: Path) -> Found:
    return _found(path, {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)})


def _npz(path: Path) -> Found:
    with np.load(path, allow_pickle=False) as archive:
        return _found(path, {name: archive[name] for name in archive.files})


def _safetensors(path: Path) -> Found:
    from safetensors.torch import load_file

    return _found(path, load_file(path))


def _pt(path: Path) -> Found:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    return _found(path, content if isinstance(content, dict) else {path.stem: content})


def _parquet(path: Path) -> Found:
    require_pyarrow(path)
    import pyarrow as pa
    from pyarrow import compute, parquet

    table = parquet.read_table(path)
    arrays, lists = {}, {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        lists_of = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if not any(own(column.type) for own in lists_of):
            lists[name] = column.to_pylist()
        elif pa.types.is_floating(column.type.value_type):
            widths = compute.unique(compute.list_value_length(column))
            if len(widths) != 1 or not widths[0].is_valid:
                raise UserError(f"{path}: the lists in {quoted(name)} are of different lengths.")
            flat = column.flatten().to_numpy(zero_copy_only=False)
            arrays[name] = flat.reshape(len(column), -1)
    return Found(path, arrays, _columns(lists), stated_classes(table.schema))


READERS = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _pt,
    ".parquet": _parquet,
}


def _folder(folder: Path) -> Found:
    """clip-retrieval's: `img_emb/*.npy`, and `metadata/*.parquet` with as many rows each."""
    shards, tables = (
        sorted(folder.glob(pattern), key=lambda path: natural_order(path.name))
        for pattern in ("img_emb/*.npy", "metadata/*.parquet")
    )
    if not shards or (tables and len(tables) != len(shards)):
        raise UserError(
            f"{folder} has {counted(len(shards), 'file')} img_emb/*.npy and {len(tables)} "
            "metadata/*.parquet; name a folder with as many of both, or with the former alone."
        )
    rows = [read_found(shard).features(2) for shard in shards]
    if len({own.shape[1] for own in rows}) > 1:
        raise UserError(f"The files in {folder / 'img_emb'} have rows of different widths.")
    found = [read_found(table).columns for table in tables]
    for table, shard, own, columns in zip(tables, shards, rows, found, strict=False):
        if any(len(values) != len(own) for values in columns.values()):
            raise UserError(f"{table} has not as many rows as {shard}, {len(own)}; pair them.")
    shared = set.intersection(*map(set, found)) if found else set()
    merged = {name: [value for columns in found for value in columns[name]] for name in shared}
    return Found(folder, {"features": np.concatenate(rows)}, merged)


def joined(found: Found, table: Columns, name: Path, listener: Listener) -> Columns:
    """The columns of the features and of a table: by ids where both have some, else row by row.
    None stands in rows that the table does not name; how many rows name no image is said.

    Raises UserError where numbers of rows differ, and for ids that occur twice or nowhere.
    """
    own, theirs = found.columns.get("id"), table.get("id")
    if own is None or theirs is None:
        rows = len(found.features(2))
        if len(table["label"]) != rows:
            raise UserError(
                f"{name} has {counted(len(table['label']), 'row')} and {found.path} {rows}; give "
                "one for each, in the same order, or the images' paths in both."
            )
        return {**found.columns, **table}
    own = texts_of(own)
    place = {key: row for row, key in enumerate(texts_of(theirs))}
    order = [place.get(key) for key in own]
    if len(place) < len(theirs) or not any(row is not None for row in order):
        what = "an image twice" if len(place) < len(theirs) else f"none of {found.path}'s images"
        called = some(own)
        raise UserError(f"{name} names {what}; there they are called {called}: name each once.")
    if left := len(place.keys() - set(own)):
        those = counted(left, "row is", "rows are")
        listener.warn(f"{name}: {those} left out, which name no image of {found.path}")
    taken = {what: values for what, values in table.items() if what != "id"}
    picked = {w: [None if r is None else own[r] for r in order] for w, own in taken.items()}
    return {**found.columns, **picked}


def texts_of(values: Sequence[Any]) -> list[str]:
    """Values of a column as they are written, composed (NFC), "" where there is none."""
    return ["" if v is None or v != v else normalize("NFC", _written(v)) for v in values]


def _written(value: Any) -> str:
    if isinstance(value, bytes):  # NumPy's dtype S
        return value.decode(errors="backslashreplace").strip()
    # Whole numbers become floating-point ones where a column lacks some.
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()


def class_numbers(labels: Sequence[str], class_names: Sequence[str]) -> npt.NDArray[np.int32]:
    """(N,): which class each label names, or is the number of; −1 where it is empty.

    Raises UserError for labels that are neither.
    """
    there = set(labels) - {""}
    named = {name: number for number, name in enumerate(class_names)}
    for known in (named, {str(number): number for number in named.values()}):
        if there <= known.keys():
            return np.array([known.get(label, -1) for label in labels], np.int32)
    unknown = sorted(there - named.keys(), key=natural_order)
    raise UserError(
        f"{some(unknown)} are labels of none of the {len(class_names)} classes; name the classes "
        "with --classes as the labels do, or label by numbers from 0."
    )


def named_classes(labels: Sequence[str]) -> list[str]:
    """The classes that labels name, in natural order.

    Raises UserError for numbers, of which nobody says what they mean, and where there are none.
    """
    there = set(labels) - {""}
    if all(label.lstrip("-").isdecimal() for label in there):
        what = "The labels are numbers" if there else "No image has a label"
        raise UserError(f"{what}; say with --classes FILE which classes there are.")
    return sorted(there, key=natural_order)
