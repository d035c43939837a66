"""`clip-adapter report`: finished runs side by side, as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from clip_adapter.pipelines.argument_types import Positional
from clip_adapter.pipelines.command import run_command


@dataclass(frozen=True)
class ReportConfig:
    """Print the test accuracies of finished runs side by side.

    Runs of different seeds, shots or methods on one cache make one table.

    Attributes:
        runs: Run folders that `fit` wrote.
        format: How the table is printed; md, tex and csv are for papers and programs.
    """

    runs: Positional[tuple[Path, ...]]
    format: Literal["text", "md", "tex", "csv"] = "text"


def report(config: ReportConfig) -> None:
    """Print a table: a row for each number of shots, a column for each method of the runs.

    A column is named after its method and the arguments in which the runs differ; what several runs
    have alike stands there once, over all their seeds.

    Raises UserError for a folder without a finished run, and for runs on different caches.
    """
    from rich.console import Console

    from clip_adapter.pipelines.reporting.accuracies import accuracies
    from clip_adapter.pipelines.reporting.entries import pool
    from clip_adapter.pipelines.reporting.formats import FORMATS
    from clip_adapter.pipelines.reporting.runs import load_runs

    runs = load_runs(config.runs)
    table = accuracies(runs, pool(runs))
    print(FORMATS[config.format](table, Console().width), end="")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter report`."""
    run_command(ReportConfig, report, "clip-adapter report", arguments)
