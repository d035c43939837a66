"""Any two methods against each other: McNemar's test on the test images that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import numpy.typing as npt

from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.reporting.entries import Entry
from clip_adapter.pipelines.reporting.figures import Section, points
from clip_adapter.pipelines.reporting.significance import holm, mcnemar
from clip_adapter.pipelines.reporting.table import Table
from clip_adapter.words import counted

LEAST_SHOWN = 0.001
ABOUT = (
    "Is one of two methods right on more of the test images on which they differ than chance "
    "explains? McNemar's exact test; where there are several seeds an image counts for the method "
    "that is right on it in more of them. p-values are Holm's, over all pairs of a table: where "
    "those below 0.05 are called different, the chance that any call is false is at most 5 %. This "
    "is about "
    "the draw of the test images; how a method varies with the seeds is in its ±."
)


@dataclass(frozen=True)
class Against:
    """One entry against another. classes: `all`, or `base` of runs on half of them. seeds: those
    that both have. difference: in accuracy, mean over them. p, corrected: McNemar's, and with
    Holm's correction over the pairs of the table."""

    one: str
    other: str
    classes: str
    seeds: Sequence[int]
    images: int
    difference: float
    p: float
    corrected: float


@dataclass(frozen=True)
class Pairs:
    """All pairs of entries at a number of shots that have test images and seeds in common."""

    dataset: str
    shots: Shots
    found: Sequence[Against]

    @property
    def table(self) -> Table:
        """Row minus column."""
        cells: dict[tuple[str, str], str] = {}
        for a in self.found:
            p = f"{a.corrected:.3f}" if a.corrected >= LEAST_SHOWN else f"<{LEAST_SHOWN}"
            cells[a.one, a.other] = f"{points(a.difference)} ({p})"
            cells[a.other, a.one] = f"{points(0 - a.difference)} ({p})"
        of = " of the base classes" if all(a.classes == "base" for a in self.found) else ""
        names = list(dict.fromkeys(name for pair in cells for name in pair))
        rows = [[cells.get((row, c), "" if c == row else "–") for c in names] for row in names]
        return Table(
            ["", *names],
            [[name, *row] for name, row in zip(names, rows, strict=True)],
            f"difference in test accuracy{of} in points at {shots_words(self.shots)}, row minus "
            "column (in brackets p: McNemar's exact test on the test images, Holm over "
            f"{counted(len(self.found), 'pair')})",
            label=f"{self.dataset} pairs",
        )


def pairwise(entries: Sequence[Entry], shots: Sequence[Shots]) -> list[Pairs]:
    """At each of these numbers of shots at which some entries can be compared.

    Raises UserError where predictions cannot be read.
    """
    name = str(entries[0].first.provenance.dataset["name"]) if entries else ""
    return [Pairs(name, number, found) for number in shots if (found := _found(entries, number))]


def _found(entries: Sequence[Entry], shots: Shots) -> list[Against]:
    right = {
        entry.label: {seed: own.right for seed, own in entry.predictions(shots).items()}
        for entry in entries
    }
    classes = {entry.label: entry.train_classes for entry in entries}
    found = [
        against
        for one, other in combinations(right, 2)
        if classes[one] == classes[other] and (against := _against(one, other, classes[one], right))
    ]
    corrected = holm([a.p for a in found])
    return [replace(a, corrected=p) for a, p in zip(found, corrected, strict=True)]


Right = Mapping[int, npt.NDArray[np.bool_]]


def _against(one: str, other: str, classes: str, right: Mapping[str, Right]) -> Against | None:
    own, others = right[one], right[other]
    seeds = sorted(own.keys() & others.keys())
    if not seeds or any(len(own[seed]) != len(others[seed]) for seed in seeds):
        return None
    gained = np.sum([own[s].astype(np.int64) - others[s] for s in seeds], axis=0)
    p = mcnemar(int(np.sum(gained > 0)), int(np.sum(gained < 0)))
    difference = float(gained.mean()) / len(seeds)
    return Against(one, other, classes, seeds, len(gained), difference, p, p)


def pairs_section(entries: Sequence[Entry], shots: Sequence[Shots]) -> Section | None:
    """A table for each number of shots; None where there is nothing to compare."""
    tables = [pairs.table for pairs in pairwise(entries, shots)]
    return Section("Any two methods", [ABOUT], tables=tables) if tables else None
