"""What a run leaves behind, written so that a killed run can go on.

run.json         the plan: what was asked for, resolved in full, with the version
provenance.json  backbone, data set and split source in words
tasks.json       the ids of every support and validation set, in drawing order
results.csv      a row per fit, appended as it ends (under halving: per setting and rung)
grids/           a file per closed form and task: the validation accuracy of every setting
selected.jsonl   a line per method and task, and per value of an ablation: the chosen setting and
                 its test accuracy
predictions/     a file per method and task: what was predicted for each test image
summary.csv      a row per method and number of shots, written last
adapter.*, adapters/   the fitted adapters
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

from clip_adapter import files
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.pipelines.fitting.record import GRIDS, TASK_COLUMNS, Row, is_sound
from clip_adapter.pipelines.fitting.results import (
    MEASURES,
    MethodSummary,
    TaskKey,
    TaskResult,
)
from clip_adapter.pipelines.reporting.table import Table

OUTCOME_COLUMNS = (
    *("epochs_run", "best_epoch", "val_accuracy", "val_nll"),
    *("status", "seconds", "images"),
)
PLAN, SELECTED, FITS = "run.json", "selected.jsonl", "results.csv"
PARTS = "parts"  # run folders of this run's own, until it takes them over
OWN_FOLDERS = ("adapters", "predictions", "halving", GRIDS)
# Files of a run's first moments, before its plan is there: they hold nothing.
BEFORE_THE_PLAN = {f"{PLAN}.new"}


class RunFolder:
    """The folder of one run, new or gone on with; one process at a time has it open.

    Raises UserError where the folder cannot be written, is not empty (and `resume` is false),
    holds another plan, or is open elsewhere.
    """

    def __init__(self, path: Path, plan: Plan, *, resume: bool) -> None:
        self.path = path
        names = {name: None for planned in plan.all_methods for name in planned.values}
        self.setting_columns = tuple(names)
        self._hyper = {p.method.name: p.method.hyper for p in plan.all_methods}
        self._columns = (*TASK_COLUMNS, *self.setting_columns, *OUTCOME_COLUMNS)
        self._key_columns = (*TASK_COLUMNS, *self.setting_columns, "epochs_run")
        self._images_alike = plan.score == "accuracy"
        self._known: dict[tuple[str, ...], Row] = {}
        self._results: dict[tuple[TaskKey, str], TaskResult] = {}
        self._places: dict[tuple[TaskKey, str], int] = {}
        with ExitStack() as undo, writing(path):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is a file; a run is kept in a folder.")
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            undo.callback(os.close, self._lock)
            if resume:
                files.refuse_links(path, (*OWN_FOLDERS, PARTS))
                self._known = {self._key(row): row for row in self._read_fits()}
                own, rows = plan.identities, read_selected(path)
                self._results = {row.identity: row for row in rows if row.identity in own}
            else:
                _check_empty(path)
                # The plan comes first: from now on the run can go on.
                files.write_text(path / PLAN, json.dumps(plan.document(), indent=1))
            self._fits = (path / FITS).open("a", newline="")
            undo.callback(self._fits.close)
            self._writer = csv.DictWriter(self._fits, self._columns, lineterminator="\n")
            if not self._fits.tell():
                self._writer.writeheader()
            undo.pop_all()

    def _read_fits(self) -> list[Row]:
        """The complete rows of results.csv; a last line that was cut off is removed, and so are
        lines that this program has not written."""
        path = self.path / FITS
        try:
            text = files.read_bytes(path).decode("utf-8", errors="replace")
        except FileNotFoundError:
            path.unlink(missing_ok=True)  # a link to a file that would be made by writing to it
            return []
        try:
            rows = list(csv.DictReader(StringIO(text[: text.rfind("\n") + 1])))
        except csv.Error:
            rows = []
        sound = [
            row
            for row in map(self._completed, rows)
            if row.keys() == set(self._columns) and is_sound(row, images_alike=self._images_alike)
        ]
        rewritten = StringIO(newline="")
        writer = csv.DictWriter(rewritten, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sound)
        if rewritten.getvalue() != text or path.is_symlink():
            files.write_text(path, rewritten.getvalue())
        return sound

    def _completed(self, row: Row) -> Row:
        """The row with the columns of hyper-parameters that came after it was written."""
        table = self._hyper.get(row.get("method", ""), {})
        younger = {}
        for name in self.setting_columns:
            hyper = table.get(name)
            if name not in row and (hyper is None or hyper.absent is not None):
                has_effect = hyper and hyper.applies_to_cells(row)
                younger[name] = str(hyper.absent) if hyper and has_effect else ""
        return row | younger

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(column, "")) for column in self._key_columns)

    def results(self, *, held: bool = False) -> list[TaskResult]:
        """What was selected so far, also where it could not be written; or the ablations'."""
        return [row for row in self._results.values() if bool(row.held) == held]

    def add_result(self, result: TaskResult) -> None:
        self._results[result.identity] = result
        self._write_results()

    def _write_results(self) -> None:
        found = sorted(self._results.items(), key=lambda item: self._places.get(item[0], -1))
        self._results = dict(found)
        rows = [json.dumps(asdict(row)) + "\n" for row in self._results.values()]
        with writing(self.path):
            files.write_text(self.path / SELECTED, "".join(rows))

    @property
    def identities(self) -> set[tuple[TaskKey, str]]:
        """Of what has a result, ablations too."""
        return {*self._results}

    def take_parts(self, plan: Plan, order: Sequence[tuple[TaskKey, str]]) -> None:
        """Take over what was fitted in parts of this run. order: of the results from now on."""
        self._places = {one: place for place, one in enumerate(order)}
        if not (self.path / PARTS).is_dir():
            return
        for path in sorted(plan.parent for plan in (self.path / PARTS).glob(f"*/{PLAN}")):
            with closing(RunFolder(path, plan, resume=True)) as part, writing(self.path):
                for name in OWN_FOLDERS:
                    if (path / name).is_dir():
                        shutil.copytree(path / name, self.path / name, dirs_exist_ok=True)
                for key, row in part._known.items():
                    if key not in self._known:
                        self.add_fit(row)
                        self._known[key] = row
                self._results |= part._results
        with writing(self.path):
            self._write_results()
            shutil.rmtree(self.path / PARTS)

    def known(self, row: Row) -> Row | None:
        """What was noted of a fit."""
        return self._known.get(self._key(row)) if self._known else None

    def add_fit(self, row: Row) -> None:
        """Append a fit to results.csv; it is with the operating system when this returns."""
        with writing(self.path):
            self._writer.writerow(row)
            self._fits.flush()

    def write_summary(self, rows: Sequence[MethodSummary]) -> None:
        parts = [f"{name}_{part}" for name in MEASURES for part in ("mean", "std")]
        cells = []
        for row in rows:
            spreads = [getattr(row, name) for name in MEASURES]
            means = [cell for s in spreads for cell in ((s.mean, s.std) if s else (None, None))]
            worst = row.worst_tenth.mean if row.worst_tenth else None
            cells.append([row.method, row.shots, row.seeds, row.diverged, *means, worst])
        head = ["method", "shots", "seeds", "diverged", *parts, "worst_tenth"]
        self.write("summary.csv", Table(head, cells).csv().encode())

    def write_json(self, name: str, document: Any) -> None:
        self.write(name, json.dumps(document, indent=1).encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run, whole or not at all."""
        path = self.path / name
        with writing(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, content)

    def close(self) -> None:
        with suppress(OSError):
            self._fits.close()
        os.close(self._lock)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of the disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write to {path}: {error.strerror or error}.") from error


def new_folder(parent: Path = Path("runs")) -> Path:
    """Make runs/<UTC time>, with a number behind it where another run has taken that.

    Raises UserError where it cannot be made.
    """
    stem = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for number in count():
            path = parent / (f"{stem}-{number}" if number else stem)
            with suppress(FileExistsError):
                path.mkdir()
                break
    return path


def adapter_folder(method: str, shots: object, seed: int) -> str:
    """Where a run folder keeps the adapter of a method on a task."""
    return f"adapters/{method}/shots-{shots}-seed-{seed}"


def read_selected(path: Path) -> list[TaskResult]:
    """The rows of selected.jsonl of a run, without a last line that was cut off.

    Raises UserError where they cannot be read.
    """
    selected = path / SELECTED
    try:
        lines = files.read_text(selected).splitlines(keepends=True)
        return [TaskResult.of_document(files.parse_json(ln)) for ln in lines if ln.endswith("\n")]
    except FileNotFoundError:
        return []
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{selected} cannot be read; fit it again.") from error


def read_plan(path: Path) -> Plan:
    """The plan of the run in this folder.

    Raises UserError where there is none, or one of another version.
    """
    plan = path / PLAN
    try:
        if not plan.is_file():
            raise UserError(f"{path} holds no run of `fit` (there is no {PLAN}).")
        return Plan.of_document(files.parse_json(files.read_text(plan)))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{plan} cannot be read; start a new run.") from error
    except ValueError as error:
        reason = "it is no JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{plan} cannot be used: {reason}; start a new run.") from error


def _lock(path: Path) -> int:
    """A descriptor of the folder, locked; closing it, or the end of the process, frees it."""
    descriptor = os.open(path, os.O_RDONLY)
    if not files.take_lock(descriptor, path):
        os.close(descriptor)
        raise UserError(f"Another process is writing to {path}; wait until it ends.")
    return descriptor


def _check_empty(path: Path) -> None:
    if (path / PLAN).exists():
        raise UserError(f"{path} already holds a run; choose another --out, or --resume it.")
    if any(entry.name not in BEFORE_THE_PLAN for entry in path.iterdir()):
        raise UserError(f"{path} is not empty; choose another --out.")
