"""The table of test accuracies: a row for each number of shots, a column for each entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.results import MethodSummary, Spread
from clip_adapter.pipelines.fitting.tables import kinds, meanings
from clip_adapter.pipelines.reporting.entries import Entry, in_order
from clip_adapter.pipelines.reporting.runs import Run


@dataclass(frozen=True)
class Column:
    """What stands below one heading.

    measure: the field of MethodSummary that it shows. kind: its name, "" for the accuracy on all
    classes. seeds: by the number of shots.
    """

    label: str
    kind: str
    measure: str
    cells: dict[Shots, MethodSummary]
    seeds: dict[Shots, tuple[int, ...]]

    @property
    def heading(self) -> str:
        return f"{self.label} {self.kind}".rstrip()

    def spread(self, shots: Shots) -> Spread | None:
        row = self.cells.get(shots)
        return getattr(row, self.measure) if row else None


@dataclass(frozen=True)
class Accuracies:
    """dataset: its name. title: what the numbers are. about: what they rest on, a sentence each."""

    dataset: str
    title: str
    about: Sequence[str]
    shots: Sequence[Shots]
    columns: Sequence[Column]


def accuracies(runs: Sequence[Run], entries: Sequence[Entry]) -> Accuracies:
    """The table of these entries, which come from these runs on one cache."""
    rows = [(entry.train_classes, row) for entry in entries for row in entry.summary.values()]
    shown = {
        classes: kinds(classes, (row for own, row in rows if own == classes))
        for classes in dict(rows)
    }
    columns = [
        Column(
            entry.label,
            words.strip(),
            measure,
            entry.summary,
            {shots: entry.seeds(shots) for shots in entry.summary},
        )
        for entry in entries
        for measure, words in shown[entry.train_classes].items()
    ]
    shots = in_order({shots for column in columns for shots in column.cells})
    counts = {len(seeds) for column in columns for seeds in column.seeds.values()}
    about = [*runs[0].provenance.lines(), *_seeds(entries), *_judged(entries)]
    title = f"test accuracy (%), {over(counts)}{meanings(shown.get('all', ()))}"
    return Accuracies(str(runs[0].provenance.dataset["name"]), title, about, shots, columns)


def over(counts: set[int]) -> str:
    """What the numbers behind ± are, of cells over so many seeds."""
    if counts <= {1}:
        return "± standard error of the test images, one seed"
    over = "mean ± standard deviation over seeds"
    return over if 1 not in counts else f"{over} (of one seed ± standard error of the test images)"


def _seeds(entries: Sequence[Entry]) -> list[str]:
    """The seeds, once where all numbers have the same ones, else for each entry."""
    stated = {
        entry.label: tuple(dict.fromkeys(entry.seeds(shots) for shots in entry.summary))
        for entry in entries
    }
    if len(set(stated.values())) == 1 and all(len(some) == 1 for some in stated.values()):
        (seeds,) = next(iter(stated.values()))
        return [f"seeds {_listed(seeds)}"]
    lines = []
    for entry in entries:
        if len(stated[entry.label]) == 1:
            lines.append(f"{entry.label}: seeds {_listed(stated[entry.label][0])}")
        else:
            by_shots = (f"{_listed(entry.seeds(n))} at {n}" for n in entry.summary)
            lines.append(f"{entry.label}: seeds {'; '.join(by_shots)} shots")
    return lines


def _judged(entries: Sequence[Entry]) -> list[str]:
    """What settings were selected on, once where that is alike for all."""
    stated = {entry.label: words for entry in entries if (words := entry.judged())}
    if len(set(stated.values())) == 1:
        return [f"selected on {next(iter(stated.values()))}"]
    return [f"{label}: selected on {words}" for label, words in stated.items()]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
