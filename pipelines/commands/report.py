"""`clip-adapter report`: finished runs side by side, as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from clip_adapter.errors import UserError
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.console.running import run_command
from clip_adapter.pipelines.console.terminal import Terminal
from clip_adapter.pipelines.saved.adapter_file import know_method
from clip_adapter.words import printable

if TYPE_CHECKING:
    from clip_adapter.pipelines.reporting.accuracies import Ablation, Accuracies
    from clip_adapter.pipelines.reporting.sections.pairs import Pairs
    from clip_adapter.pipelines.reporting.table import Table


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
    print(_printed(config.format, table, factors, pairs), end="", flush=True)
    if config.html == "none":
        return
    from clip_adapter.pipelines.reporting.page import find_cache, write_page

    path = config.html or runs[0].path / "report.html"
    with find_cache(runs, config.cache) or nullcontext() as cache:
        write_page(path, runs, entries, table, factors, cache, config.images)
    Terminal("report").note(f"the page is {path}, its figures are beside it in figures/")


def _printed(
    form: str, table: Accuracies, ablations: Sequence[Ablation], pairs: Sequence[Pairs]
) -> str:
    """The tables; as CSV one, which has every number at full length."""
    from clip_adapter.pipelines.reporting.table import markdown, terminal_width

    if form == "csv":
        return _numbers(table, ablations, pairs).csv()
    further = [*(one.table for one in ablations), *(one.table for one in pairs)]
    if form == "md":
        about = "".join(f"{markdown(line)}  \n" for line in table.about)
        return "\n".join([about, *(each.markdown() for each in (table.table, *further))])
    if form == "tex":
        caption = "; ".join([table.title, "columns are shots per class", *table.about])
        first = replace(table.table, caption=caption)
        drawn = (each.latex() for each in (first, *further))
        return "% needs \\usepackage{booktabs}\n" + "\n".join(drawn)
    width = terminal_width()
    about = "".join(
        f"{line}\n"
        for words in table.about
        for line in wrap(printable(words), width, subsequent_indent="  ")
    )
    return table.answer(width) + about + "".join(f"\n{each.text(width)}" for each in further)


def _numbers(table: Accuracies, ablations: Sequence[Ablation], pairs: Sequence[Pairs]) -> Table:
    """A row for each entry, kind and number of shots, with accuracies in [0, 1]; `factor` and
    `value` are those of an ablation, and empty in the rows of the table of accuracies. In rows of
    the factor `against` the value is another entry, and the mean is the difference from it."""
    from clip_adapter.pipelines.reporting.accuracies import Line
    from clip_adapter.pipelines.reporting.table import Table

    lines = list(table.lines)
    for ablation in ablations:
        kind = ablation.kind
        lines += [Line(entry, "test_accuracy", kind) for entry in ablation.entries]
    rows: list[list[Any]] = []
    for line in lines:
        entry = line.entry
        held = [cell for factor in entry.held.items() for cell in factor]
        for shots, row in entry.summary.items():
            spread = line.spread(shots)
            means = (spread.mean, spread.std) if spread else (None, None)
            numbers = shots, " ".join(map(str, entry.seeds(shots))), row.diverged, *means
            rows.append([entry.label, line.kind or "all", *numbers, row.test_images, *held])
    for at in pairs:
        for one, p in zip(at.differences, at.corrected, strict=True):
            seeds, mean = " ".join(map(str, one.seeds)), float(one.gained.mean())
            numbers = at.shots, seeds, None, mean, None, one.gained.shape[1]
            start = [one.one.label, one.one.train_classes, *numbers]
            rows.append([*start, "against", one.other.label, one.p, p])
    head = ("entry", "kind", "shots", "seeds", "diverged", "mean", "std", "test_images")
    filled = [row + [None] * (12 - len(row)) for row in rows]
    return Table([*head, "factor", "value", "p", "p_holm"], filled)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter report`."""
    run_command(ReportConfig, report, "clip-adapter report", arguments)
