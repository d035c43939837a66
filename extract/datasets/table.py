"""A CSV file that lists images and their labels."""

import csv
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from clip_adapter.cache.schema import UNLABELLED
from clip_adapter.errors import UserError
from clip_adapter.extract.datasets.image_files import (
    folder_group,
    natural_order,
    require_files,
    split_of_files,
)
from clip_adapter.extract.datasets.source import (
    COLUMNS,
    DEFAULT_TEMPLATES,
    GROUP,
    NO_LABEL,
    PARENT,
    ImageDataset,
    SourceOptions,
    split_of,
    splits_among,
)
from clip_adapter.extract.datasets.splitting import complete_splits
from clip_adapter.files import read_users_text, user_path
from clip_adapter.words import counted, shortened, some

REQUIRED = ("path", "label")
DELIMITERS = ",;\t|"
# Columns that `suggest` writes beside those to fill in, to help whoever does.
SUGGESTED = ("guess", "probability")


class Row(NamedTuple):
    """split: as written. label: "" for none. group: None where the table has none."""

    split: str
    path: str
    label: str
    group: str | None


def open_csv(path: str, options: SourceOptions) -> ImageDataset:
    """The images of a table with the columns path, label and, if it likes, split and group.

    The first row names the columns, in any case; `options.columns` maps names of one's own. Others
    are not read, which a remark says. Fields are separated by commas, semicolons, tabs or bars.
    Labels are class names, composed (NFC), taken in natural order. Relative paths start from
    `options.image_root`, or from the table's own folder. split is train, val or test, or what means
    these (see `split_of`); rows keep their order within it. Without that column, splits are made as
    `complete_splits` says. Rows whose label is empty make the split UNLABELLED, whatever
    their split, which a remark says. ids are the paths as written. Images of one group, by that
    column or as `options.group` says, stay on one side of the splits that are made.

    Raises UserError for a table that cannot be read, missing columns, rows with too few or too many
    fields, repeated paths and unknown splits (with the line), and for images that do not exist.
    """
    table = user_path(path)
    root = options.image_root or table.parent
    file = StringIO(read_users_text(table), newline="")
    try:
        columns = dict(options.columns)
        if options.group not in (None, PARENT):
            columns[GROUP] = options.group
        listed, unread = _rows(table, file, columns, by_folder=options.group == PARENT)
    except csv.Error as error:
        raise UserError(f"{table} is not a valid CSV file: {error}; save it again.") from error
    if not listed:
        raise UserError(f"{table} has no rows; list your images below the row of column names.")
    paths = [row.path for row in listed]
    require_files(root, paths, "correct the paths, or say with --image-root where they start")
    class_names = sorted({row.label for row in listed if row.label}, key=natural_order)
    number = {name: label for label, name in enumerate(class_names)}
    means = splits_among({row.split for row in listed if row.label})
    rows: dict[str, list[Row]] = {}
    for row in listed:
        rows.setdefault(means[row.split] if row.label else UNLABELLED, []).append(row)
    remarks = [*unread, *_without_label(table, rows)]
    origin = f"rows of {table.name}"
    splits = {
        name: split_of_files(
            root,
            [(row.path, number.get(row.label, NO_LABEL)) for row in own],
            origin,
            None if own[0].group is None else [row.group or "" for row in own],
        )
        for name, own in rows.items()
    }
    return ImageDataset(
        table.stem,
        class_names,
        DEFAULT_TEMPLATES,
        complete_splits(splits, class_names, options, published=False),
        {"name": table.stem, "source": "csv", "version": None},
        remarks,
    )


def _without_label(table: Path, rows: Mapping[str, list[Row]]) -> list[str]:
    """A remark on the rows without a label, if there are any. Raises UserError where none has
    one."""
    if not (unlabelled := rows.get(UNLABELLED)):
        return []
    if len(rows) == 1:
        raise UserError(
            f"{table} has no label in any row; fill in some, or give the images' folder with "
            "--dataset images:FOLDER and --like."
        )
    return [
        f"{table} has {counted(len(unlabelled), 'row')} without a label, the first of them "
        f"{shortened(unlabelled[0].path)}: taken as unlabelled images, whatever their split."
    ]


def _rows(
    table: Path, file: TextIO, columns: Mapping[str, str], *, by_folder: bool
) -> tuple[list[Row], list[str]]:
    """What each row says, and a remark on columns that are not read.

    by_folder: groups are the folders of the images, whatever columns there are.
    """
    headers: dict[str, list[str]] = {mark: next(_reader(file, mark), []) for mark in DELIMITERS}
    delimiter = max(
        headers, key=lambda mark: (len(_places(headers[mark], columns)), len(headers[mark]))
    )
    reader = _reader(file, delimiter)
    header = [name.strip() for name in next(reader, [])]
    if not header:
        raise UserError(f"{table} is empty; name the columns path and label.")
    places = _places(header, columns)
    _check_columns(table, header, columns, places)
    if by_folder:
        places.pop(GROUP, None)
    lines: dict[str, int] = {}
    rows = [
        _checked_row(
            f"{table}, line {reader.line_num}", row, header, places, lines, reader.line_num
        )
        for row in reader
        if row
    ]
    if by_folder:
        rows = [row._replace(group=folder_group(row.path)) for row in rows]
    others = [
        name
        for number, name in enumerate(header)
        if name and number not in places.values() and name not in SUGGESTED
    ]
    remark = f"{table} has {counted(len(others), 'column')} that no one reads: {some(others)}"
    advice = "--columns path=NAME,label=NAME,split=NAME says which to read."
    return rows, [f"{remark}; {advice}"] if others else []


def _reader(file: TextIO, delimiter: str) -> Any:
    """Of the rows, from the first one on."""
    file.seek(0)
    return csv.reader(file, delimiter=delimiter, skipinitialspace=True)


def _places(header: Sequence[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Which column is the path, the label, the split, the group, as far as they are there."""
    named = [name.strip().casefold() for name in header]
    names = (*COLUMNS, GROUP)
    wanted = {name: columns.get(name, name).strip().casefold() for name in names}
    return {name: named.index(own) for name, own in wanted.items() if own in named}


def _check_columns(
    table: Path, header: Sequence[str], columns: Mapping[str, str], places: Mapping[str, int]
) -> None:
    needed = dict.fromkeys((*REQUIRED, *columns))
    if missing := [columns.get(name, name) for name in needed if name not in places]:
        raise UserError(
            f"{table} has no column {' and no column '.join(missing)} in its first row "
            f"({reprlib.repr(list(header))[1:-1]}); name the columns path, label and, if you like, "
            "split, or say what they are called: --columns path=NAME,label=NAME."
        )
    named = Counter(name.casefold() for name in header)
    if twice := [header[n] for n in places.values() if named[header[n].casefold()] > 1]:
        raise UserError(f"{table} has the column {twice[0]} twice; keep one of them.")


def _checked_row(
    place: str,
    row: Sequence[str],
    header: Sequence[str],
    places: Mapping[str, int],
    lines: dict[str, int],
    line: int,
) -> Row:
    if any(field.strip() for field in row[len(header) :]):
        raise UserError(
            f"{place} has {len(row)} fields where the first row names {len(header)}; put a field "
            "that holds the separator into quotes."
        )
    cells = {name: row[n].strip() if n < len(row) else "" for name, n in places.items()}
    path, label = cells["path"], unicodedata.normalize("NFC", cells["label"])
    if not path or len(row) <= places["label"]:
        raise UserError(f"{place}: {'path' if not path else 'label'} is empty; fill it in.")
    if path in lines:
        raise UserError(
            f"{place}: {reprlib.repr(path)} stands in line {lines[path]} already; keep one of them."
        )
    lines[path] = line
    written = cells.get("split", "train")
    if split_of(written) is None and (label or written):
        raise UserError(
            f"{place}: unknown split {reprlib.repr(written)}; write train, val or test."
        )
    if (group := cells.get(GROUP)) == "":
        raise UserError(
            f"{place}: {header[places[GROUP]]}, an image's group, is empty; fill it in."
        )
    return Row(written, path, label, group)
