"""`clip-adapter report`: the results of several runs side by side."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from clip_adapter.cache.errors import UserError
from clip_adapter.pipelines.argument_types import Positional
from clip_adapter.pipelines.command import run_command

Row = dict[str, Any]
Run = tuple[dict[str, Any], list[Row]]
"""The arguments of a run, and the rows of its summary.csv."""

# Arguments that change no number of a method, and those that change a baseline's.
IGNORED = {"baselines", "layout", "cache", "shots"}
JUDGED_BY = {"seeds", "select", "train_classes", "augment"}
# What a run was asked for in any case, and columns of summary.csv (no accuracies where all
# settings diverged).
ASKED = {
    "method": str,
    "shots": list,
    "seeds": list,
    "select": str,
    "train_classes": str,
    "cache_sha256": str,
}
NEEDED = {"method", "shots", "seeds", "diverged"}


@dataclass(frozen=True)
class ReportConfig:
    """Print the test accuracies of finished runs side by side.

    Attributes:
        runs: Run folders that `fit` wrote.
    """

    runs: Positional[tuple[Path, ...]]


def report(config: ReportConfig) -> None:
    """Print a table: a row for each number of shots, a column for each method of each run.

    A column is named after its method and the arguments in which the runs differ; a baseline that
    several runs have stands there once.

    Raises UserError for a folder without a finished run, and for runs on different caches.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from clip_adapter.pipelines.tables import KINDS, percent

    if not config.runs:
        raise UserError("Name at least one run folder.")
    runs = [_read(path) for path in config.runs]
    if len({arguments["cache_sha256"] for arguments, _ in runs}) > 1:
        raise UserError("These runs were made on different caches; compare runs on one.")
    columns: dict[str, dict[str, str]] = {}
    for path, (arguments, rows) in zip(config.runs, runs, strict=True):
        for row in rows:
            # Whatever else was asked for changes nothing about the baselines.
            ignored = IGNORED if row["method"] == "clip-adapter" else set(arguments) - JUDGED_BY
            name = row["method"] + _difference(arguments, runs, ignored)
            for kind, words in KINDS[arguments["train_classes"]].items():
                cell = percent(row, kind)
                column = columns.setdefault(name + words, {})
                if column.get(row["shots"], cell) != cell:
                    column = columns.setdefault(f"{name}{words} ({path.name})", {})
                column[row["shots"]] = cell
    for line in [*_about(config.runs[0]), *_common(config.runs, runs)]:
        print(line)
    table = Table(title="test accuracy (%), mean ± standard deviation over seeds", box=SIMPLE_HEAD)
    table.add_column("shots", justify="right")
    for name in columns:
        table.add_column(name.replace(" ", "\n", 1), justify="right")
    numbers = dict.fromkeys(shots for column in columns.values() for shots in column)
    for shots in sorted(numbers, key=lambda text: (text == "all", len(text), text)):
        table.add_row(shots, *(column.get(shots, "–") for column in columns.values()))
    width = max(80, 16 * len(columns) + 10)
    Console(width=width, highlight=False, markup=False).print(table)


def _read(path: Path) -> Run:
    from clip_adapter.pipelines.run_folder import read_arguments
    from clip_adapter.pipelines.tables import KINDS, SELECTION_WORDS

    arguments = read_arguments(path)
    known = all(isinstance(arguments.get(name), kind) for name, kind in ASKED.items())
    known = known and arguments["select"] in SELECTION_WORDS
    if not known or arguments["train_classes"] not in KINDS:
        raise UserError(f"{path / 'run.json'} is not of this version of fit; fit it again.")
    summary = path / "summary.csv"
    if not summary.exists():
        raise UserError(
            f"{path} holds a run that has not finished; go on with: fit --resume {path}"
        )
    try:
        with summary.open(newline="") as file:
            table = list(csv.DictReader(file))
        # Cells without a heading have the name None, headings without a cell the value None.
        whole = all(row.keys() >= NEEDED and None not in [*row, *row.values()] for row in table)
        rows = [_numbers(row) for row in table] if whole else []
    except (OSError, ValueError, csv.Error):
        rows = []
    if not rows:
        raise UserError(f"{summary} cannot be read; fit --resume {path} writes it anew.")
    return arguments, rows


def _numbers(row: dict[str, str]) -> Row:
    """A row of summary.csv with its means and deviations as numbers, None where empty."""
    measures = {name: value for name, value in row.items() if name.endswith(("_mean", "_std"))}
    numbers: Row = {name: float(value) if value else None for name, value in measures.items()}
    return row | {"diverged": int(row["diverged"])} | numbers


def _about(run: Path) -> list[str]:
    """Backbone, data set and split source in words."""
    try:
        about = json.loads((run / "provenance.json").read_text())["about"]
    except (OSError, ValueError, KeyError, TypeError):
        about = None
    if not isinstance(about, list):
        raise UserError(f"{run} has no readable provenance.json; fit it again.")
    return about


def _common(paths: Sequence[Path], runs: "Sequence[Run]") -> list[str]:
    """Seeds and selection, where the runs have them in common; else their columns are named so."""
    from clip_adapter.pipelines.run_folder import read_selected
    from clip_adapter.pipelines.tables import judged_by

    seeds = {", ".join(map(str, arguments["seeds"])) for arguments, _ in runs}
    judged = {
        judged_by(a["select"], a["shots"], a["method"], read_selected(path))
        for path, (a, _) in zip(paths, runs, strict=True)
    }
    return [
        *(f"seeds {words}" for words in seeds if len(seeds) == 1),
        *(f"selected on {words}" for words in judged if len(judged) == 1),
    ]


def _difference(arguments: dict[str, Any], runs: "Sequence[Run]", ignored: set[str]) -> str:
    """The arguments in which the runs differ, as ` name value`, but for the ignored ones."""
    differing = [
        name
        for name in arguments
        if name not in ignored and any(other.get(name) != arguments[name] for other, _ in runs)
    ]
    return "".join(f" {name} {_words(arguments[name])}" for name in differing)


def _words(value: Any) -> str:
    if value is None or value == []:
        return "default"
    if isinstance(value, list):
        numbers = " ".join(map(str, value))
        return numbers if len(value) == 1 or all(isinstance(v, int) for v in value) else "selected"
    return str(value)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter report`."""
    run_command(ReportConfig, report, "clip-adapter report", arguments)
