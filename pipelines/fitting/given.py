"""What a method is given of each task, and what tasks that differ in their seed alone begin with
together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clip_adapter.adapters.engine.evaluation import Journal
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import balanced
from clip_adapter.adapters.engine.search import rungs_of, runs_of
from clip_adapter.adapters.method import Method, Task, same_program
from clip_adapter.pipelines.fitting.choice import Search
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.data import Data
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.pipelines.fitting.tasks import RULES, Fold, TaskRows

Whole = tuple[Task, list[Task]]
"""A task, and the parts of it that judge."""


@dataclass(frozen=True)
class Given:
    """The arrays of tasks, by the run's selection rule."""

    plan: Plan
    data: Data
    engine: Engine
    _begun: dict[tuple[str, Shots, int], Whole] = field(default_factory=dict)

    def folds(self, method: Method, rows: TaskRows) -> list[Fold]:
        rule = RULES[self.plan.select]
        is_closed = not (method.is_trained or method.solver)
        divide = rule.folds if is_closed else rule.of_trained or rule.folds
        return divide(rows, self.data.support_labels)

    def parts(self, method: Method, rows: TaskRows, divided: Sequence[Fold]) -> list[Task]:
        return self.weighed([self.data.task(method, rows, fold) for fold in divided])

    def weighed(self, parts: list[Task]) -> list[Task]:
        return balanced(parts) if parts and self.plan.score == "balanced-accuracy" else parts

    def begun(self, method: Method, rows: TaskRows) -> Whole | None:
        """Once, what `begin` has made of a task."""
        return self._begun.pop((method.name, rows.shots, rows.seed), None)

    def begin(
        self,
        asked: Search,
        whole: Whole,
        peers: Sequence[TaskRows],
        journal: Journal,
        epoch: int | None,
    ) -> None:
        """Train what a task and its peers begin with in one launch, where the engine trains side
        by side; nothing where an interrupted run has some of it.

        peers: tasks of other seeds that the same is asked of later. epoch: of `take_defaults`.
        """
        method = asked.method
        if not method.is_trained or self.engine.placement == "sequential" or not peers:
            return
        runs, stop = runs_of(method, asked.values), epoch
        if whole[1]:
            stop = rungs_of(runs[0][0], halving=asked.halving)[0]
            if any(journal.known(setting, stop) for run in runs for setting in run):
                return
        else:
            runs = [[method.default_setting(asked.values, asked.preset)]]
        several = [whole]
        for rows in peers:
            own = self.data.task(method, rows), self.parts(method, rows, self.folds(method, rows))
            several.append(own)
            self._begun[method.name, rows.shots, rows.seed] = own
        settings = [method.of_the_run(run[0]) for run in runs]
        for _, members in same_program(method, settings):
            alike = [settings[member] for member in members]
            for tasks in zip(*(parts or [task] for task, parts in several), strict=True):
                self.engine.begin(method, alike, tasks, stop)
