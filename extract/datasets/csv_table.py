"""A CSV file that lists images and their labels."""

import csv
import reprlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clip_adapter.cache.errors import UserError
from clip_adapter.extract.datasets.image_files import (
    ImageFiles,
    natural_order,
    require_files,
)
from clip_adapter.extract.datasets.source import (
    DEFAULT_TEMPLATES,
    SPLIT_NAMES,
    ImageDataset,
    SourceOptions,
    Split,
)
from clip_adapter.extract.datasets.splitting import complete_splits
from clip_adapter.extract.files import text_file, user_path

REQUIRED = ("path", "label")


def open_csv(path: str, options: SourceOptions) -> ImageDataset:
    """The images of a table with the columns path, label and, if it likes, split.

    The first row names the columns; others than these are ignored. Labels are class names, taken
    in natural order. Relative paths start from `options.image_root`, or from the table's own
    folder. split is train, val (or valid, validation) or test; rows keep their order within it.
    Without that column, splits are made as `complete_splits` says. ids are the paths as written.

    Raises UserError for a table that cannot be read, missing columns, incomplete rows, repeated
    paths and unknown splits (with the line), and for images that do not exist.
    """
    table = user_path(path)
    root = options.image_root or table.parent
    rows: dict[str, list[tuple[str, str]]] = {}
    for split, path, label in _rows(table):
        rows.setdefault(split, []).append((path, label))
    if not rows:
        raise UserError(f"{table} has no rows; list your images below the row of column names.")
    paths = [path for split in rows.values() for path, _ in split]
    require_files(root, paths, "correct the paths, or say with --image-root where they start")
    class_names = sorted({label for s in rows.values() for _, label in s}, key=natural_order)
    splits = {name: _split(root, split, class_names, table) for name, split in rows.items()}
    return ImageDataset(
        table.stem,
        class_names,
        DEFAULT_TEMPLATES,
        complete_splits(splits, class_names, options, published=False),
        {"name": table.stem, "source": "csv", "version": None},
    )


def _rows(table: Path) -> Iterator[tuple[str, str, str]]:
    lines: dict[str, int] = {}
    try:
        with text_file(table, "utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames
            if not columns:
                raise UserError(f"{table} is empty; name the columns path and label.")
            if missing := [name for name in REQUIRED if name not in columns]:
                raise UserError(
                    f"{table} has no column {' and no column '.join(missing)} in its first row "
                    f"({reprlib.repr(columns)[1:-1]}); name the columns path, label and, if you "
                    "like, split."
                )
            for row in reader:
                yield _checked_row(f"{table}, line {reader.line_num}", row, lines, reader.line_num)
    except csv.Error as error:
        raise UserError(f"{table} is not a valid CSV file: {error}; save it again.") from error


def _checked_row(
    place: str, row: dict[str, str | None], lines: dict[str, int], line: int
) -> tuple[str, str, str]:
    path, label = ((row[name] or "").strip() for name in REQUIRED)
    if not path or not label:
        raise UserError(f"{place}: {'path' if not path else 'label'} is empty; fill it in.")
    if path in lines:
        raise UserError(
            f"{place}: {reprlib.repr(path)} stands in line {lines[path]} already; keep one of them."
        )
    lines[path] = line
    written = row.get("split", "train") or ""
    split = SPLIT_NAMES.get(written.strip().lower())
    if split is None:
        raise UserError(
            f"{place}: unknown split {reprlib.repr(written)}; write train, val or test."
        )
    return split, path, label


def _split(root: Path, rows: list[tuple[str, str]], class_names: list[str], table: Path) -> Split:
    label = {name: index for index, name in enumerate(class_names)}
    paths = [path for path, _ in rows]
    labels = np.array([label[name] for _, name in rows], np.int32)
    files = ImageFiles(root, paths)
    return Split(paths, labels, files, f"rows of {table.name}", files.file)
