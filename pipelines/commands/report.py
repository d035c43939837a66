"""`clip-adapter report`: finished runs side by side, as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from clip_adapter.errors import UserError
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.console.running import run_command
from clip_adapter.pipelines.console.terminal import Terminal
from clip_adapter.pipelines.saved.adapter_file import know_method


@dataclass(frozen=True)
class ReportConfig:
    """Print the test accuracies of finished runs side by side.

    Runs of different seeds, shots or methods on one cache make one table.

    Attributes:
        runs: Run folders that `fit` wrote.
        format: How the table is printed; md, tex and csv are for papers and programs.
        html: Where the page goes, with its figures beside it in figures/, or none; by default
            report.html in the first run's folder.
        cache: The cache of the runs, where it lies elsewhere now.
        images: Folder that the images' ids start from, for the pictures of the page; without it
            they are taken from the folder that was extracted where it lies in the cache's own.
        method: MODULE:NAME of each method of the runs that is one of your own.
    """

    runs: Positional[tuple[Path, ...]]
    format: Literal["text", "md", "tex", "csv"] = "text"
    html: Path | Literal["none"] | None = None
    cache: Path | None = None
    images: Path | None = None
    method: tuple[str, ...] = ()


def report(config: ReportConfig) -> None:
    """Print a table: a row for each number of shots, a column for each method of the runs.

    A column is named after its method and the arguments in which the runs differ; what several runs
    have alike stands there once, over all their seeds. A table for each factor of `fit --ablate`
    follows, and one of the differences between any two columns at the most shots.

    Beside it one HTML page is written that needs nothing from outside.

    Raises UserError for a folder without a finished run, and for runs on different caches.
    """
    from clip_adapter.pipelines.fitting.predictions import PREDICTIONS
    from clip_adapter.pipelines.reporting.accuracies import ablations, accuracies
    from clip_adapter.pipelines.reporting.entries import pool
    from clip_adapter.pipelines.reporting.printed import printed
    from clip_adapter.pipelines.reporting.runs import load_runs
    from clip_adapter.pipelines.reporting.sections.pairs import pairwise

    for name in config.method:
        know_method(name)
    if config.images and not config.images.is_dir():
        raise UserError(f"--images: there is no folder {config.images}.")
    runs = load_runs(config.runs)
    every = pool(runs)
    entries = [entry for entry in every if not entry.held]
    table, factors = accuracies(runs, entries), ablations(every)
    kept = all((run.path / PREDICTIONS).is_dir() for run in runs)
    if not kept:
        Terminal("report").note("without the runs' predictions/ no two methods can be tested")
    # Of what is read by people, one table of pairs: at the most shots.
    shots = table.shots if config.format == "csv" else table.shots[-1:]
    pairs = pairwise(entries, shots) if kept else []
    print(printed(config.format, table, factors, pairs), end="", flush=True)
    if config.html == "none":
        return
    from clip_adapter.pipelines.reporting.page import find_cache, write_page

    path = config.html or runs[0].path / "report.html"
    with find_cache(runs, config.cache) or nullcontext() as cache:
        write_page(path, runs, entries, table, factors, cache, config.images)
    Terminal("report").note(f"the page is {path}, its figures are beside it in figures/")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter report`."""
    run_command(ReportConfig, report, "clip-adapter report", arguments)
