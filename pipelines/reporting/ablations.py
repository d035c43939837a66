"""Ablations of finished runs: test accuracy at every value of a factor, pooled over runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from clip_adapter.pipelines.fitting.ablation_rows import AblationRow, ablated
from clip_adapter.pipelines.fitting.config import Shots, shots_words
from clip_adapter.pipelines.fitting.plan import METHOD
from clip_adapter.pipelines.fitting.results import MethodSummary, summarise
from clip_adapter.pipelines.fitting.tables import KINDS, accuracy
from clip_adapter.pipelines.reporting.accuracies import over
from clip_adapter.pipelines.reporting.entries import (
    decisive,
    folder_name,
    in_order,
    unused,
)
from clip_adapter.pipelines.reporting.figures import Numbers
from clip_adapter.pipelines.reporting.runs import Run

MEASURE = "test_accuracy"


@dataclass(frozen=True)
class Series:
    """A method at a value of the factor. cells, seeds: by the number of shots."""

    method: str
    value: str
    cells: dict[Shots, MethodSummary]
    seeds: dict[Shots, tuple[int, ...]]


@dataclass(frozen=True)
class Ablation:
    """A factor in runs that pool. folder: of the run, where others' ablations of the factor do not
    pool with it, else "". first: one of the runs. series: numbers by size, then words."""

    factor: str
    folder: str
    first: Run
    series: Sequence[Series]

    @property
    def shots(self) -> list[Shots]:
        return in_order({shots for one in self.series for shots in one.cells})

    @property
    def several(self) -> bool:
        """Whether a value alone does not say which method it is of."""
        return self.factor != METHOD and len({one.method for one in self.series}) > 1

    @property
    def name(self) -> str:
        return f"{self.factor} ({self.folder})" if self.folder else self.factor

    @property
    def kind(self) -> str:
        """The classes whose accuracy it is: `base`, or "" for all."""
        return KINDS[self.first.plan.train_classes][MEASURE].strip()

    @property
    def accuracy(self) -> str:
        """What is measured."""
        return f"test accuracy{f' of the {self.kind} classes' if self.kind else ''} (%)"

    @property
    def numbers(self) -> Numbers:
        """A row for each value, a column for each number of shots."""
        counts = {len(seeds) for one in self.series for seeds in one.seeds.values()}
        rows = [
            [
                f"{one.method} {one.value}" if self.several else one.value,
                *(accuracy(one.cells[n], MEASURE) if n in one.cells else "–" for n in self.shots),
            ]
            for one in self.series
        ]
        return Numbers(
            [self.factor, *map(shots_words, self.shots)],
            rows,
            f"ablation of {self.name}: {self.accuracy}, {over(counts)}; an analysis, which "
            "chooses nothing",
        )


def pooled_ablations(runs: Sequence[Run]) -> list[Ablation]:
    """The ablations of runs on one cache, those of one factor one after the other.

    Runs pool where all else that decides the numbers is alike, and no number contradicts another.
    """
    found = []
    for factor in dict.fromkeys(factor for run in runs for factor in run.plan.ablate):
        groups = _groups([run for run in runs if factor in run.plan.ablate], factor)
        taken: set[str] = set()
        for members in groups:
            name = unused(folder_name(members[0].path), taken)
            folder = name if len(groups) > 1 else ""
            rows = {row.key: row for run in members for row in _rows(run, factor)}
            found.append(Ablation(factor, folder, members[0], _series(rows.values())))
    return found


def _rows(run: Run, factor: str) -> list[AblationRow]:
    return [row for row in run.ablations if row.factor == factor]


def _groups(runs: Sequence[Run], factor: str) -> list[list[Run]]:
    groups: list[list[Run]] = []
    for run in runs:
        own = {row.key: row.result.test_accuracy for row in _rows(run, factor)}
        for group in groups:
            theirs = [row for other in group for row in _rows(other, factor)]
            agree = all(
                own.get(r.key, r.result.test_accuracy) == r.result.test_accuracy for r in theirs
            )
            if agree and _rest(group[0], factor) == _rest(run, factor):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _rest(run: Run, factor: str) -> dict[str, object]:
    """All but the factor's values that decides the numbers, by method."""
    planned = {one.name: one for name, _, one in ablated(run.plan) if name == factor}
    values = {
        name: {n: own for n, own in one.values.items() if n != factor}
        for name, one in planned.items()
    }
    return {name: decisive(run, replace(planned[name], values=own)) for name, own in values.items()}


def _series(rows: Iterable[AblationRow]) -> list[Series]:
    grouped: dict[tuple[str, str], list[AblationRow]] = {}
    for row in rows:
        grouped.setdefault((row.result.method, _short(row)), []).append(row)

    def place(key: tuple[str, str]) -> tuple[int, bool, float]:
        method, value = key
        number = number_of(value)
        return methods.index(method), number is None, number or 0.0

    methods = list(dict.fromkeys(method for method, _ in grouped))
    return [
        Series(
            *key,
            {row.shots: row for row in summarise(one.result for one in grouped[key])},
            {
                n: tuple(sorted(r.result.seed for r in grouped[key] if r.result.shots == n))
                for n in {r.result.shots for r in grouped[key]}
            },
        )
        for key in sorted(grouped, key=place)
    ]


def _short(row: AblationRow) -> str:
    return f"{row.value:g}" if isinstance(row.value, float) else str(row.value)


def number_of(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
