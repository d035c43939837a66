"""How predictions are printed, as a table, CSV or JSON, row by row as they come; and the files that
`evaluate` writes beside its scores."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
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

    top: (class name, probability), most probable first; empty where the image cannot be read.
    answer: what is promised beside them; None where nothing is. unreadable: why it cannot be read,
    or None.
    """

    path: Path
    top: tuple[tuple[str, float], ...] = ()
    answer: Answer | None = None
    unreadable: str | None = None


class Scope(Protocol):
    """What is known before the first prediction, so that columns can be set."""

    @property
    def paths(self) -> Sequence[Path]: ...

    @property
    def class_names(self) -> Sequence[str]: ...


def write_table(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """Aligned columns: the path, then name and probability of each class; or the classes of its
    set, or that it shows none of them."""
    path_width = max(cell_len(printable(str(path))) for path in scope.paths)
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
    ranks = 0
    for prediction in predictions:
        if not ranks:
            ranks = len(prediction.top)
            columns = ((f"class_{n}", f"probability_{n}") for n in range(1, ranks + 1))
            names = [*_promised(prediction), *(name for pair in columns for name in pair)]
            writer.writerow(["image", *names])
        pairs = ((cell(name), rounded(p)) for name, p in prediction.top)
        said = _promised(prediction)
        if "classes" in said:
            said["classes"] = class_words(said["classes"])
        own = [cell(value) if isinstance(value, str) else value for value in said.values()]
        writer.writerow([cell(str(prediction.path)), *own, *(x for pair in pairs for x in pair)])


def write_json(out: TextIO, scope: Scope, predictions: Iterable[Prediction]) -> None:
    """One array, an object per image on a line of its own; names are exact."""
    separator = "["
    for prediction in predictions:
        top = [{"class": name, "probability": rounded(p)} for name, p in prediction.top]
        said = _promised(prediction)
        row = json.dumps({"image": str(prediction.path), **said, "top": top})
        print(f"{separator}\n{row}", end="", file=out)
        separator = ","
    print("[]" if separator == "[" else "\n]", file=out)


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
FORMATS: dict[str, Writer] = {"table": write_table, "csv": write_csv, "json": write_json}


@contextmanager
def predictions_file(
    path: Path | None, class_names: Sequence[str]
) -> Iterator[Callable[..., None] | None]:
    """Of `evaluate`: a function that writes rows, into a file that gets its name when all is
    written."""
    if path is None:
        yield None
        return
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                ["image", "class", "predicted", "probability", "zero_shot", "fitted_on"]
            )
            names = [cell(name) for name in class_names]

            def write(ids: Sequence[str], *columns: npt.NDArray[Any]) -> None:
                for name, label, predicted, before, seen, share in zip(
                    ids, *(column.tolist() for column in columns), strict=True
                ):
                    shown = names[label], names[predicted], rounded(share), names[before]
                    writer.writerow([cell(name), *shown, "yes" if seen else "no"])

            yield write
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def check_place(path: Path | None, suffix: str) -> None:
    """Raises UserError for a file of another kind, and where none can be written."""
    if path is None:
        return
    if path.suffix != suffix:
        kind = suffix[1:].upper()
        raise UserError(f"{path} is written as {kind}; give it a name that ends in {suffix}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no such folder, or it is one itself.")
