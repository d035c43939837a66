"""How predictions are printed or written, as a table, CSV, JSON, JSON lines or Parquet, row by row
as they come; and the files that `evaluate` writes beside its scores."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len

from clip_adapter import files
from clip_adapter.words import printable


@dataclass(frozen=True)
class Prediction:
    """What an image shows.

    path: of a file, or the id in a cache. top: (class name, probability), most probable first;
    empty where the image cannot be read.
    unreadable: why it cannot be read, or None.
    """

    path: Path | str
    top: tuple[tuple[str, float], ...] = ()
    unreadable: str | None = None


class Scope(Protocol):
    """What is known before the first prediction, so that columns can be set."""

    def names(self) -> Iterator[Path | str]: ...

    @property
    def class_names(self) -> Sequence[str]: ...


def write_table(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """Aligned columns: the path, then name and probability of each class."""
    path_width = max(cell_len(printable(str(path))) for path in scope.names())
    name_width = max(cell_len(printable(name)) for name in scope.class_names)
    for prediction in predictions:
        cells = [_padded(str(prediction.path), path_width)]
        for name, probability in prediction.top:
            cells.append(f"{_padded(name, name_width)} {100 * probability:5.1f} %")
        print("   ".join(cells), file=out)


def write_csv(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """A header, then a row per image: image, class_1, probability_1, class_2, …

    Names that begin with = + - @ get an apostrophe before them; in JSON names are exact.
    """
    writer = csv.writer(out, lineterminator="\n")
    ranks = 0
    for prediction in predictions:
        if not ranks:
            ranks = len(prediction.top)
            columns = ((f"class_{n}", f"probability_{n}") for n in range(1, ranks + 1))
            writer.writerow(["image", *(name for pair in columns for name in pair)])
        pairs = ((cell(name), rounded(p)) for name, p in prediction.top)
        writer.writerow([cell(str(prediction.path)), *(x for pair in pairs for x in pair)])


def write_json(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """One array, an object per image on a line of its own; names are exact."""
    separator = "["
    for prediction in predictions:
        print(f"{separator}\n{_json(prediction)}", end="", file=out)
        separator = ","
    print("[]" if separator == "[" else "\n]", file=out)


def _json(prediction: Prediction) -> str:
    top = [{"class": name, "probability": rounded(p)} for name, p in prediction.top]
    return json.dumps({"image": str(prediction.path), "top": top})


def write_json_lines(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """An object per image on a line of its own, as in the array of `write_json`."""
    for prediction in predictions:
        print(_json(prediction), file=out)


def write_parquet(path: Path, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """A row per image with the columns of the CSV file; names are exact. Some rows at a time are in
    memory."""
    import pyarrow as pa
    from pyarrow import parquet

    types = {str: pa.string(), float: pa.float64(), list: pa.list_(pa.string())}
    with ExitStack() as stack:
        writer = None
        columns = map(_columns, predictions)
        while rows := list(islice(columns, ROWS_AT_ONCE)):
            if writer is None:
                schema = pa.schema([(name, types[type(own)]) for name, own in rows[0].items()])
                writer = stack.enter_context(parquet.ParquetWriter(path, schema))
            writer.write_table(pa.Table.from_pylist(rows, schema))
        if writer is None:
            parquet.write_table(pa.table({"image": pa.array([], pa.string())}), path)


def _columns(prediction: Prediction) -> dict[str, Any]:
    """Column → value."""
    row: dict[str, Any] = {"image": str(prediction.path)}
    for rank, (name, probability) in enumerate(prediction.top, 1):
        row |= {f"class_{rank}": name, f"probability_{rank}": rounded(probability)}
    return row


def write_file(path: Path, form: str, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """Write predictions into a file, which gets its name when all of them are there."""
    with files.written(path) as temporary:
        if form == PARQUET:
            write_parquet(temporary, scope, predictions)
            return
        with temporary.open("x", encoding="utf-8", newline="") as file:
            FORMATS[form](file, scope, predictions)


def cell(text: str) -> str:
    """A name that no spreadsheet takes for a formula: an apostrophe makes it text."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def _padded(text: str, width: int) -> str:
    shown = printable(text)
    return shown + " " * (width - cell_len(shown))


def rounded(probability: float) -> float:
    """To six significant digits, which is what float32 logits carry."""
    return float(f"{probability:.6g}")


Writer = Callable[[TextIO, Scope, Iterable[Prediction]], None]
FORMATS: dict[str, Writer] = {
    "table": write_table,
    "csv": write_csv,
    "json": write_json,
    "jsonl": write_json_lines,
}
PARQUET = "parquet"  # which is no text: into a file only
ROWS_AT_ONCE = 4096


@contextmanager
def predictions_file(
    path: Path | None, class_names: Sequence[str]
) -> Iterator[Callable[..., None] | None]:
    """Of `evaluate`: a function that writes rows, into a file that gets its name when all is
    written."""
    if path is None:
        yield None
        return
    with (
        files.written(path) as temporary,
        temporary.open("x", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "class", "predicted", "probability", "zero_shot", "fitted_on"])
        names = [cell(name) for name in class_names]

        def write(ids: Sequence[str], *columns: npt.NDArray[Any]) -> None:
            for name, label, predicted, before, seen, share in zip(
                ids, *(column.tolist() for column in columns), strict=True
            ):
                shown = names[label], names[predicted], rounded(share), names[before]
                writer.writerow([cell(name), *shown, "yes" if seen else "no"])

        yield write


def write_features(
    path: Path,
    ids: Sequence[str],
    labels: npt.NDArray[np.int32],
    features: npt.NDArray[np.float32],
    class_names: Sequence[str],
) -> None:
    """Of `evaluate`: an .npz file whose arrays numpy.load reads without pickle: ids (N,) text,
    labels (N,) int32 in class_names (C,) text, features (N, D) float32. It is whole or absent."""
    content = BytesIO()
    np.savez(
        content,
        ids=np.array(ids, np.str_),
        labels=labels,
        features=features,
        class_names=np.array(class_names, np.str_),
    )
    files.write_bytes(path, content.getvalue())
