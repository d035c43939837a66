"""What is compared: a method with all that decides its numbers, pooled over runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from clip_adapter.adapters.method import Method
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.plan import PlannedMethod
from clip_adapter.pipelines.fitting.results import MethodSummary, TaskResult, summarise
from clip_adapter.pipelines.fitting.tables import judged_by
from clip_adapter.pipelines.reporting.runs import Run
from clip_adapter.words import dashed

Task = tuple[Shots, int]
"""(shots, seed)."""
Identity = tuple[str, str]
VALUES_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """A result, and the run whose folder has its predictions and its adapter."""

    result: TaskResult
    run: Run


@dataclass(frozen=True)
class Entry:
    """A column of a table, a line of a figure.

    label: the method, and the arguments in which it differs from others of the same method.
    asked: whether some run was about it, rather than had it as a baseline.
    found: a result for each task.
    """

    label: str
    planned: PlannedMethod
    asked: bool
    found: Mapping[Task, Found]

    @property
    def method(self) -> Method:
        return self.planned.method

    @property
    def first(self) -> Run:
        """A run that has it; what decides its numbers is alike in all that have."""
        return next(iter(self.found.values())).run

    @property
    def train_classes(self) -> str:
        return self.first.plan.train_classes

    def results(self, shots: Shots) -> list[TaskResult]:
        """At this number of shots, in the order of the seeds."""
        chosen = sorted(task for task in self.found if task[0] == shots)
        return [self.found[task].result for task in chosen]

    def seeds(self, shots: Shots) -> tuple[int, ...]:
        return tuple(sorted(seed for number, seed in self.found if number == shots))

    @property
    def summary(self) -> dict[Shots, MethodSummary]:
        """Mean and spread over seeds, by the number of shots."""
        return {
            shots: summarise(self.results(shots))[0]
            for shots in in_order({shots for shots, _ in self.found})
        }

    def judged(self) -> str:
        """What chose its settings, in words; "" where there is nothing to choose."""
        if not self.method.hyper:
            return ""
        results = [found.result for found in self.found.values()]
        return judged_by(self.first.plan.select, list(self.summary), results)


def in_order(shots: set[Shots]) -> list[Shots]:
    """Numbers of shots, `all` last."""
    return sorted(shots, key=lambda number: (number == "all", number))


def pool(runs: Sequence[Run], beside: Sequence[Run] = ()) -> list[Entry]:
    """The entries of runs on one cache, in their order.

    beside: runs on other caches, from which the labels have to tell them as well.
    Tasks of several runs make one entry where all that decides a method's numbers is alike. Where
    two runs have different numbers for one task all the same, each keeps an entry of its own.
    """
    pooled: dict[Identity, list[tuple[Run, PlannedMethod]]] = defaultdict(list)
    for run in runs:
        for planned in run.plan.methods:
            identity = planned.method.name, str(decisive(run, planned))
            pooled[identity].append((run, planned))
    entries = []
    for (name, _), members in pooled.items():
        others = [own[0] for (method, _), own in pooled.items() if method == name]
        others += [(r, p) for r in beside for p in r.plan.methods if p.method.name == name]
        label = name + _difference(*members[0], others)
        entries += _entries(label, members)
    taken: set[str] = set()
    return [replace(entry, label=unused(entry.label, taken)) for entry in entries]


def unused(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; then it is taken too."""
    numbered = (f"{name} #{number}" for number in count(2))
    free = next(one for one in chain([name], numbered) if one not in taken)
    taken.add(free)
    return free


def decisive(run: Run, planned: PlannedMethod) -> dict[str, Any]:
    """All that decides what a method's numbers on a task are, by name."""
    plan, method = run.plan, planned.method
    stated: dict[str, Any] = {"train_classes": plan.train_classes}
    if method.hyper:
        stated |= {"select": plan.select, "repeat": plan.repeat}
    if method.uses_views:
        stated["augment"] = plan.augment
    if method.is_trained:
        stated["search"] = plan.search
    return stated | {name: tuple(values) for name, values in planned.values.items()}


def _difference(run: Run, planned: PlannedMethod, others: Sequence[tuple[Run, Any]]) -> str:
    own = decisive(run, planned)
    rest = [decisive(*other) for other in others]
    differing = [name for name in own if any(one.get(name) != own[name] for one in rest)]
    flags = {name: dashed(planned.method.flag(name)) for name in differing}
    return "".join(f" {flag} {_words(own[name])}" for name, flag in flags.items())


def _words(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if len(value) > VALUES_SHOWN:
        return f"{len(value)} values"
    return " ".join(f"{v:g}" if isinstance(v, float) else _words(v) for v in value)


def _entries(label: str, members: Sequence[tuple[Run, PlannedMethod]]) -> list[Entry]:
    """One entry, or one for each run whose numbers contradict those before it."""
    groups: list[tuple[str, list[tuple[Run, PlannedMethod]], dict[Task, Found]]] = []
    for run, planned in members:
        own = {
            (result.shots, result.seed): Found(result, run)
            for result in run.results
            if result.method == planned.method.name
        }
        for _, group, found in groups:
            shared = own.keys() & found.keys()
            if all(_same(own[task].result, found[task].result) for task in shared):
                group.append((run, planned))
                found.update({task: own[task] for task in own if task not in found})
                break
        else:
            name = f"{label} ({folder_name(run.path)})" if groups else label
            groups.append((name, [(run, planned)], own))
    return [
        Entry(name, group[0][1], any(not planned.baseline for _, planned in group), found)
        for name, group, found in groups
    ]


def _same(one: TaskResult, other: TaskResult) -> bool:
    return (one.setting, one.test_accuracy, one.new_accuracy) == (
        *(other.setting, other.test_accuracy, other.new_accuracy),
    )


def folder_name(path: Path) -> str:
    return path.name or path.resolve().name
