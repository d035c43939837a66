"""Any two methods against each other: McNemar's test on the test images that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.reporting.entries import Entry
from clip_adapter.pipelines.reporting.figures import Section, points
from clip_adapter.pipelines.reporting.significance import holm
from clip_adapter.pipelines.reporting.table import NOTHING, Table
from clip_adapter.pipelines.reporting.verdict import Difference, compare
from clip_adapter.words import counted

LEAST_SHOWN = 0.001
ABOUT = (
    "Is one of two methods right on more of the test images on which they differ than chance "
    "explains? McNemar's exact test; where there are several seeds an image counts for the method "
    "that is right on it in more of them. p-values are Holm's, over all pairs of a table: where "
    "those below 0.05 are called different, the chance that any call is false is at most 5 %. This "
    "is about the draw of the test images; how a method varies with the seeds is in its ±."
)


@dataclass(frozen=True)
class Pairs:
    """All pairs of entries at a number of shots that have test images and seeds in common.

    corrected: of each McNemar's p-value with Holm's correction over all of them.
    """

    shots: Shots
    differences: Sequence[Difference]
    corrected: Sequence[float]

    @property
    def table(self) -> Table:
        """Row minus column."""
        cells: dict[tuple[str, str], str] = {}
        for difference, p in zip(self.differences, self.corrected, strict=True):
            words = f"{p:.3f}" if p >= LEAST_SHOWN else f"<{LEAST_SHOWN}"
            mean, pair = difference.gained.mean(), (difference.one.label, difference.other.label)
            cells[pair] = f"{points(mean)} ({words})"
            cells[pair[::-1]] = f"{points(0 - mean)} ({words})"
        first = self.differences[0].one.first
        base = all(d.one.train_classes == "base" for d in self.differences)
        of = " of the base classes" if base else ""
        names = list(dict.fromkeys(name for pair in cells for name in pair))
        return Table(
            ["", *names],
            [
                [name, *(cells.get((name, c), "" if c == name else NOTHING) for c in names)]
                for name in names
            ],
            f"difference in test accuracy{of} in points at {shots_words(self.shots)}, row minus "
            "column (in brackets p: McNemar's exact test on the test images, Holm over "
            f"{counted(len(self.differences), 'pair')})",
            label=f"{first.provenance.dataset['name']} pairs",
        )


def pairwise(entries: Sequence[Entry], shots: Sequence[Shots]) -> list[Pairs]:
    """At each of these numbers of shots at which some entries can be compared.

    Raises UserError where predictions cannot be read.
    """
    pairs = []
    for number in shots:
        differences = [
            difference
            for one, other in combinations(entries, 2)
            if one.train_classes == other.train_classes
            and (difference := compare(one, other, number))
        ]
        if differences:
            pairs.append(Pairs(number, differences, holm([d.p for d in differences])))
    return pairs


def pairs_section(entries: Sequence[Entry], shots: Sequence[Shots]) -> Section | None:
    """A table for each number of shots; None where there is nothing to compare."""
    tables = [pairs.table for pairs in pairwise(entries, shots)]
    return Section("Any two methods", [ABOUT], tables=tables) if tables else None
