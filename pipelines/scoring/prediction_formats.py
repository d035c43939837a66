"""How predictions are printed or written, as a table, CSV, JSON, JSON lines or Parquet, row by row
as they come; and the files that `evaluate` writes beside its scores."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len

from clip_adapter import files
from clip_adapter.adapters.registry import METHODS
from clip_adapter.errors import UserError
from clip_adapter.pipelines.deciding.answers import NONE, Answer, class_words
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter
from clip_adapter.words import printable


@dataclass(frozen=True)
class Prediction:
    """What an image shows.

    path: of a file, or the id in a cache. top: (class name, probability), most probable first;
    empty where the image cannot be read. answer: what is promised beside them; None where nothing
    is. unreadable: why it cannot be read, or None.
    """

    path: Path | str
    top: tuple[tuple[str, float], ...] = ()
    answer: Answer | None = None
    unreadable: str | None = None


class Scope(Protocol):
    """What is known before the first prediction, so that columns can be set."""

    def names(self) -> Iterator[Path | str]: ...

    def columns(self) -> Mapping[str, type]: ...

    @property
    def class_names(self) -> Sequence[str]: ...


def write_table(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """Aligned columns: the path, then name and probability of each class; or the classes of its
    set, or that it shows none of them."""
    path_width = max((cell_len(printable(str(path))) for path in scope.names()), default=0)
    name_width = max(cell_len(printable(name)) for name in scope.class_names)
    for prediction in predictions:
        cells = [_padded(str(prediction.path), path_width)]
        answer = prediction.answer
        if answer and answer.is_none:
            cells += [_padded(NONE, name_width), f"(nearest: {printable(prediction.top[0][0])})"]
        elif answer and answer.classes:
            cells.append(_padded(class_words([name for name, _ in answer.classes]), name_width))
            cells += [f"{100 * probability:5.1f} %" for _, probability in answer.classes]
        else:
            for name, probability in prediction.top:
                cells.append(f"{_padded(name, name_width)} {100 * probability:5.1f} %")
        print("   ".join(cells), file=out)


def write_csv(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """A header, then a row per image: image, class_1, probability_1, class_2, … Where something is
    promised, `answer` and, of what was asked for, `classes` and `known` come before class_1.

    Names that begin with = + - @ get an apostrophe before them; in JSON names are exact.
    """
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(scope.columns())
    for row in map(columns_of, predictions):
        texts = (class_words(own) if isinstance(own, list) else own for own in row.values())
        writer.writerow([cell(own) if isinstance(own, str) else own for own in texts])


def write_json(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """One array, an object per image on a line of its own; names are exact."""
    separator = "["
    for prediction in predictions:
        print(f"{separator}\n{_json(prediction)}", end="", file=out)
        separator = ","
    print("[]" if separator == "[" else "\n]", file=out)


def _json(prediction: Prediction) -> str:
    top = [{"class": name, "probability": rounded(p)} for name, p in prediction.top]
    return json.dumps({"image": str(prediction.path), **_promised(prediction), "top": top})


def write_json_lines(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """An object per image on a line of its own, as in the array of `write_json`."""
    for prediction in predictions:
        print(_json(prediction), file=out)


def write_parquet(
    path: Path,
    scope: Scope,
    predictions: Iterable[Prediction],
    stated: Mapping[bytes, str] | None = None,
) -> None:
    """A row per image with the columns of the CSV file; names are exact but for bytes
    that are no UTF-8. Some rows at a time are in memory.

    stated: what stands in the schema's metadata.
    """
    import pyarrow as pa
    from pyarrow import parquet

    types = {str: pa.string(), float: pa.float64(), list: pa.list_(pa.string())}
    schema = pa.schema([(name, types[kind]) for name, kind in scope.columns().items()], stated)
    with parquet.ParquetWriter(path, schema) as writer:
        columns = map(columns_of, predictions)
        while rows := list(islice(columns, ROWS_AT_ONCE)):
            exact = [{name: _unicode(value) for name, value in row.items()} for row in rows]
            writer.write_table(pa.Table.from_pylist(exact, schema))


def _unicode(value: Any) -> Any:
    """A file's name may have bytes that are no UTF-8, which stand as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def columns_of(prediction: Prediction) -> dict[str, Any]:
    """Column → value."""
    row: dict[str, Any] = {"image": str(prediction.path), **_promised(prediction)}
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


def _promised(prediction: Prediction) -> dict[str, Any]:
    """What is answered beside the most probable classes, by column."""
    answer = prediction.answer
    if answer is None:
        return {}
    said: dict[str, Any] = {"answer": NONE if answer.is_none else prediction.top[0][0]}
    if answer.classes:
        said["classes"] = [name for name, _ in answer.classes]
    if answer.known is not None:
        said["known"] = rounded(answer.known)
    return said


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


Floats = npt.NDArray[np.float32]
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


def adapt_of(adapter: SavedAdapter) -> Callable[[Floats], Floats]:
    """Features as the adapter takes them (N, F) → image features that it compares with the classes,
    (N, D) float32, un-normalised.

    Raises UserError for a method that moves no image features.
    """
    adapt = adapter.method.adapt
    if adapt is None:
        names = ", ".join(name for name, method in METHODS.items() if method.adapt)
        raise UserError(
            f"{adapter.info.method} moves no image features, so there are none for --features; "
            f"these do: {names}."
        )
    formula, setting, head = adapt, adapter.info.setting, adapter.head
    return lambda features: np.asarray(
        formula(np, adapter.arrays, setting, features, head), np.float32
    )


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """A CSV file of columns of one length; nothing for None and NaN, names as `cell` has them."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([*map(_shown, row)] for row in zip(*columns.values(), strict=True))
    files.write_text(path, out.getvalue())


def _shown(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if np.isnan(value) else rounded(value)
    return cell(value) if isinstance(value, str) else value


def check_place(path: Path | None, suffix: str, *, force: bool) -> None:
    """Raises UserError for a file of another kind, where none can be written, and where one is that
    is not to be overwritten."""
    if path is None:
        return
    if path.suffix != suffix:
        kind = suffix[1:].upper()
        raise UserError(f"{path} is written as {kind}; give it a name that ends in {suffix}.")
    files.check_writable(path)
    files.check_new(path, force)
