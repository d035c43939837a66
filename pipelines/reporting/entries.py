"""What is compared: a method with all that decides its numbers, pooled over runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, count
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.method import Method
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import Shots, numbers_decided
from clip_adapter.pipelines.fitting.plan import PlannedMethod
from clip_adapter.pipelines.fitting.predictions import (
    Predictions,
    predictions_path,
    read_predictions,
)
from clip_adapter.pipelines.fitting.results import Held, MethodSummary, TaskResult, summarise
from clip_adapter.pipelines.fitting.run_folder import SELECTED
from clip_adapter.pipelines.reporting.runs import Run
from clip_adapter.words import dashed

Task = tuple[Shots, int]
"""(shots, seed)."""
Member = tuple[Run, PlannedMethod]
Decisive = dict[str, Any]
VALUES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of a table, a line of a figure.

    label: the method, and the arguments in which it differs from others of the same method.
    asked: whether some run was about it, rather than had it as a baseline.
    rows: of each task the result, and the run whose folder has its predictions and its adapter.
    held: the factor of an ablation and its value, {} for an entry that counts.
    """

    label: str
    planned: PlannedMethod
    asked: bool
    rows: Mapping[Task, tuple[TaskResult, Run]]
    held: Held
    _right: dict[Shots, dict[int, npt.NDArray[np.bool_]]] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        return self.planned.method

    @property
    def first(self) -> Run:
        """A run that has it; what decides its numbers is alike in all that have."""
        return next(iter(self.rows.values()))[1]

    @property
    def train_classes(self) -> str:
        return self.first.plan.train_classes

    def results(self, shots: Shots | None = None) -> list[TaskResult]:
        """At this number of shots, or all, in the order of shots and seeds."""
        own = [result for result, _ in self.rows.values() if shots in (None, result.shots)]
        return sorted(own, key=lambda result: (_place(result.shots), result.seed))

    def seeds(self, shots: Shots) -> tuple[int, ...]:
        return tuple(result.seed for result in self.results(shots))

    @cached_property
    def summary(self) -> dict[Shots, MethodSummary]:
        """Mean and spread over seeds, by the number of shots."""
        return {row.shots: row for row in summarise(self.results())}

    @property
    def tested(self) -> list[Shots]:
        """The numbers of shots at which there is a test accuracy."""
        return [shots for shots, row in self.summary.items() if row.test_accuracy]

    def predictions(self, shots: Shots) -> dict[int, Predictions]:
        """Seed → what was predicted for each test image, where there is a test accuracy.

        Raises UserError where predictions cannot be read, or are not those that it counts.
        """
        return {
            seed: _counted(result, run)
            for (number, seed), (result, run) in self.rows.items()
            if number == shots and result.test_accuracy is not None
        }

    def right(self, shots: Shots) -> dict[int, npt.NDArray[np.bool_]]:
        """Seed → whether each test image is classified correctly; read once."""
        if shots not in self._right:
            self._right[shots] = {s: own.right for s, own in self.predictions(shots).items()}
        return self._right[shots]


def _counted(row: TaskResult, run: Run) -> Predictions:
    own = read_predictions(run.path, *row.key)
    both = np.concatenate([own.labels, own.predicted])
    sound = (
        len(own.labels) == row.test_images > 0
        and len(own.ids) == row.test_images
        and both.dtype.kind == "i"
        and bool(np.all((both >= 0) & (both < len(run.class_names))))
        and bool(np.all((own.confidence >= 0) & (own.confidence <= 1)))
        and isclose(own.accuracy, row.test_accuracy or 0.0, abs_tol=1e-6)
    )
    if not sound:
        path = run.path / predictions_path(*row.key)
        raise UserError(f"{path} is not what {SELECTED} counts; fit it again.")
    return own


def in_order(shots: set[Shots]) -> list[Shots]:
    """Table of shots, `all` last."""
    return sorted(shots, key=_place)


def _place(shots: Shots) -> tuple[bool, Shots]:
    return shots == "all", shots


def pool(runs: Sequence[Run], beside: Sequence[Run] = ()) -> list[Entry]:
    """The entries of runs on one cache, in their order.

    beside: runs on other caches, from which the labels have to tell them as well.
    Tasks of several runs make one entry where all that decides a method's numbers is alike. Where
    two runs have different numbers for one task all the same, each keeps an entry of its own.
    """
    pooled: dict[tuple[str, str, str], list[Member]] = defaultdict(list)
    known: dict[tuple[str, tuple[str, ...]], dict[str, Decisive]] = defaultdict(dict)
    helds: dict[str, Held] = {}
    for run in (*runs, *beside):
        for held, planned in run.plan.parts:
            name, own, values = planned.method.name, decisive(run, planned, held), str(dict(held))
            known[name, (*held,)][str(own)] = own
            helds[values] = held
            if any(run is one for one in runs):
                pooled[name, values, str(own)].append((run, planned))
    entries: list[Entry] = []
    for (name, values, _), members in pooled.items():
        held = helds[values]
        label = name + _difference(*members[0], held, [*known[name, (*held,)].values()])
        entries += _entries(label, members, held)
    taken: dict[str, set[str]] = defaultdict(set)
    return [
        replace(entry, label=_unused(entry.label, taken[str(dict(entry.held))]))
        for entry in entries
        if entry.rows
    ]


def _unused(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; then it is taken too."""
    numbered = (f"{name} #{number}" for number in count(2))
    free = next(one for one in chain([name], numbered) if one not in taken)
    taken.add(free)
    return free


def decisive(run: Run, planned: PlannedMethod, held: Held) -> Decisive:
    """All but what is held that decides what a method's numbers on a task are, by name."""
    stated = {name: getattr(run.plan, name) for name in numbers_decided(planned.method)}
    if planned.method.hyper:  # by which images are divided where settings are chosen
        stated["groups"] = run.plan.groups
    if planned.baseline:
        stated["unlabelled"] = ""  # what is chosen is refined, baselines stay as they are
    values = {name: tuple(own) for name, own in planned.values.items() if name not in held}
    return stated | values


def _difference(run: Run, planned: PlannedMethod, held: Held, others: Sequence[Decisive]) -> str:
    own = decisive(run, planned, held)
    differing = [name for name in own if any(one.get(name) != own[name] for one in others)]
    return "".join(f" {_flag(planned.method, name)} {_words(own[name])}" for name in differing)


def _flag(method: Method, name: str) -> str:
    return dashed(method.flag(name) if name in method.hyper else name)


def _words(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if len(value) > VALUES_SHOWN:
        return f"{len(value)} values"
    return " ".join(f"{v:g}" if isinstance(v, float) else _words(v) for v in value)


def _entries(label: str, members: Sequence[Member], held: Held) -> list[Entry]:
    """One entry, or one for each run whose numbers contradict those before it."""
    groups: list[tuple[str, list[Member], dict[Task, tuple[TaskResult, Run]]]] = []
    for run, planned in members:
        own = {
            (result.shots, result.seed): (result, run)
            for result in run.results
            if result.method == planned.method.name and result.held == held
        }
        for _, group, rows in groups:
            shared = own.keys() & rows.keys()
            if all(_same(own[task][0], rows[task][0]) for task in shared):
                group.append((run, planned))
                rows.update({task: own[task] for task in own if task not in rows})
                break
        else:
            name = f"{label} ({folder_name(run.path)})" if groups else label
            groups.append((name, [(run, planned)], own))
    return [
        Entry(name, group[0][1], any(not planned.baseline for _, planned in group), rows, held)
        for name, group, rows in groups
    ]


def _same(one: TaskResult, other: TaskResult) -> bool:
    return (one.setting, one.test_accuracy, one.new_accuracy) == (
        *(other.setting, other.test_accuracy, other.new_accuracy),
    )


def folder_name(path: Path) -> str:
    return path.name or path.resolve().name
