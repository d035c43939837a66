"""What a run leaves behind, written so that a killed run can go on.

run.json        the arguments and the cache's identity
provenance.json backbone, data set and split source in words, and the version
tasks.json      the ids of every support and validation set, in drawing order
results.csv     a row per fit, appended as it ends (under halving: per setting and rung)
selected.jsonl  a line per method and task: the chosen setting and its test accuracy
summary.csv     a row per method and number of shots, written last
adapter.*, adapters/   the fitted adapters
"""

import csv
import json
import os
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from clip_adapter.adapters.engine import Leaves
from clip_adapter.adapters.method import Evaluation, Setting
from clip_adapter.cache import files
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.files import take_lock
from clip_adapter.console.progress import Advance

SETTING_COLUMNS = (
    "branch",
    "alpha",
    "beta",
    "alpha_init",
    "beta_init",
    "reduction",
    "learning_rate",
    "weight_decay",
    "optimizer",
    "warmup",
    "drop_last",
    "epochs",
    "batch_size",
    "evaluate_every",
    "C",
)
TASK_COLUMNS = ("method", "shots", "seed")
OUTCOME_COLUMNS = ("epochs_run", "best_epoch", "val_accuracy", "val_nll", "status", "seconds")
RESULT_COLUMNS = (*TASK_COLUMNS, *SETTING_COLUMNS, *OUTCOME_COLUMNS)

Row = dict[str, Any]


class RunFolder:
    """The folder of one run, new or gone on with; one process at a time has it open.

    arguments: what the run was asked for, as JSON.
    Raises UserError where the folder cannot be written, is not empty (and `resume` is false),
    holds a run with other arguments, or is open elsewhere.
    """

    def __init__(self, path: Path, arguments: Row, *, resume: bool) -> None:
        self.path = path
        self._known: dict[tuple[str, ...], Row] = {}
        with ExitStack() as undo:
            try:
                if path.is_file():
                    raise UserError(f"{path} is a file; a run is kept in a folder.")
                if not resume:
                    path.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(path)
                undo.callback(os.close, self._lock)
                if resume:
                    _check_same(path, read_arguments(path), arguments)
                    rows = self._read_results()
                    self._known = {_key(row, row["epochs_run"]): row for row in rows}
                else:
                    _check_empty(path)
                    (path / "results.csv").write_text(",".join(RESULT_COLUMNS) + "\n")
                    (path / "selected.jsonl").write_text("")
                    files.write_text(path / "run.json", json.dumps(arguments, indent=1))
                self._results = (path / "results.csv").open("a", newline="")
            except OSError as error:
                raise UserError(f"Cannot write to {path}: {error.strerror}.") from error
            undo.pop_all()
        self._writer = csv.DictWriter(self._results, RESULT_COLUMNS, lineterminator="\n")

    def _read_results(self) -> list[Row]:
        """The complete rows of results.csv; a last line that was cut off is removed."""
        path = self.path / "results.csv"
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            files.write_text(path, whole)
        return list(csv.DictReader(StringIO(whole)))

    def selected(self) -> list[Row]:
        return read_selected(self.path)

    def add_selected(self, row: Row) -> None:
        rows = [*self.selected(), row]
        files.write_text(
            self.path / "selected.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        )

    def record(self, task: Row, advance: Advance) -> "TaskRecord":
        """The part of the record that belongs to a task (method, shots, seed)."""
        return TaskRecord(self, task, advance)

    def known(self, task: Row, setting: Setting, epochs_run: int) -> Row | None:
        return self._known.get(_key(task | setting, epochs_run))

    def add_result(self, row: Row) -> None:
        """Append a fit to results.csv; it is with the operating system when this returns."""
        self._writer.writerow(row)
        self._results.flush()

    def write_summary(self, rows: Sequence[Row]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(self.path / "summary.csv", text.getvalue())

    def write_json(self, name: str, document: Any) -> None:
        files.write_text(self.path / name, json.dumps(document, indent=1))

    def close(self) -> None:
        self._results.close()
        os.close(self._lock)


class TaskRecord:
    """What a search on one task has found (a selection.Record)."""

    def __init__(self, folder: RunFolder, task: Row, advance: Advance) -> None:
        self._folder = folder
        self._task = task
        self._advance = advance
        self._best = 0.0
        self.evaluations = 0
        name = "-".join(str(task[column]) for column in TASK_COLUMNS)
        self.states: MutableMapping[str, Leaves] = StateFolder(folder.path / "halving" / name)

    def known(self, setting: Setting, epochs_run: int) -> Evaluation | None:
        row = self._folder.known(self._task, setting, epochs_run)
        if row is None:
            return None
        return Evaluation(
            setting,
            epochs_run,
            int(row["best_epoch"]),
            float(row["val_accuracy"]),
            float(row["val_nll"]),
            float(row["seconds"]),
        )

    def add(self, evaluation: Evaluation) -> None:
        self.evaluations += 1
        self._best = max(self._best, evaluation.score[0])
        self._advance(1, f"{self._task['shots']} shots, best val {100 * self._best:.1f} %")
        if self.known(evaluation.setting, evaluation.epochs_run):
            return
        self._folder.add_result(
            self._task
            | evaluation.setting
            | {
                "epochs_run": evaluation.epochs_run,
                "best_epoch": evaluation.epoch,
                "val_accuracy": evaluation.accuracy,
                "val_nll": evaluation.nll,
                "status": "failed" if evaluation.failed else "ok",
                "seconds": round(evaluation.seconds, 4),
            }
        )


class StateFolder(MutableMapping[str, Leaves]):
    """States of runs that may go on, one file each; the folder is there only while it has any."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def __getitem__(self, name: str) -> Leaves:
        if not self._path(name).exists():
            raise KeyError(name)
        try:
            tensors = load_file(self._path(name))
        except SafetensorError as error:
            raise UserError(f"{self._path(name)} is damaged; start a new run.") from error
        return [tensors[str(index)] for index in range(len(tensors))]

    def __setitem__(self, name: str, leaves: Leaves) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        content = save({str(index): leaf for index, leaf in enumerate(leaves)})
        # Megabytes for each setting: waiting for the disk would take as long as training.
        files.write_bytes(self._path(name), content, sync=False)

    def __delitem__(self, name: str) -> None:
        if not self._path(name).exists():
            raise KeyError(name)
        self._path(name).unlink()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()
            if not any(self._folder.parent.iterdir()):
                self._folder.parent.rmdir()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self._folder.glob("*.safetensors"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def new_folder(parent: Path = Path("runs")) -> Path:
    """Make runs/<UTC time>, with a number behind it where another run has taken that.

    Raises UserError where it cannot be made.
    """
    stem = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in count():
            path = parent / (f"{stem}-{number}" if number else stem)
            with suppress(FileExistsError):
                path.mkdir()
                break
    except OSError as error:
        raise UserError(f"Cannot write to {parent}: {error.strerror}.") from error
    return path


def read_selected(path: Path) -> list[Row]:
    """The rows of selected.jsonl of a run, without a last line that was cut off.

    Raises UserError where they cannot be read.
    """
    try:
        lines = (path / "selected.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        if not all(row.keys() >= set(TASK_COLUMNS) for row in rows):
            raise ValueError("not the rows of a run")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path / 'selected.jsonl'} cannot be read; fit it again.") from error
    return rows


def read_arguments(path: Path) -> Row:
    """What the run in this folder was asked for.

    Raises UserError where there is none.
    """
    try:
        arguments = json.loads((path / "run.json").read_text())
    except (OSError, ValueError):
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"{path} holds no run of `fit` (there is no readable run.json).")
    return arguments


def _lock(path: Path) -> int:
    """A descriptor of the folder, locked; closing it, or the end of the process, frees it."""
    descriptor = os.open(path, os.O_RDONLY)
    if not take_lock(descriptor, path):
        os.close(descriptor)
        raise UserError(f"Another process is writing to {path}; wait until it ends.")
    return descriptor


def _check_empty(path: Path) -> None:
    if (path / "run.json").exists():
        raise UserError(f"{path} already holds a run; choose another --out, or --resume it.")
    if any(path.iterdir()):
        raise UserError(f"{path} is not empty; choose another --out.")


def _key(row: Row, epochs_run: int | str) -> tuple[str, ...]:
    values = [row.get(column, "") for column in (*TASK_COLUMNS, *SETTING_COLUMNS)]
    return (*map(str, values), str(epochs_run))


def _check_same(path: Path, earlier: Row, now: Row) -> None:
    now = json.loads(json.dumps(now))
    # The content of the cache counts, not where it lies.
    names = (earlier.keys() | now.keys()) - {"cache"}
    differing = sorted(name for name in names if earlier.get(name) != now.get(name))
    if differing == ["cache_sha256"]:
        raise UserError(
            f"{now['cache']} is no longer the cache that {path} was started on; start a new run."
        )
    if differing:
        raise UserError(
            f"{path} holds a run with other arguments ({', '.join(differing)} differ); "
            "give --resume alone, or start a new run."
        )
