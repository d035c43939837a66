"""Hyper-parameters that act after training: settings that differ in them alone share a run.

Tip-Adapter-F trains its keys at one (β, α) and then tries many on the trained keys. Such
hyper-parameters are named by `Method.after_training`; training takes `NAME_init` in their place.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from clip_adapter.adapters.engine.evaluation import Evaluation, Journal, Judged, Leaves
from clip_adapter.adapters.method import Arrays, Method, Setting, Task


def of_the_run(method: Method, setting: Setting) -> dict[str, Any]:
    """What training sees of a setting."""
    return {name: value for name, value in setting.items() if name not in method.after_training}


def during_training(method: Method, setting: Setting) -> Setting:
    """The setting by which logits are computed as long as the method trains."""
    return {**setting, **{name: setting[f"{name}_init"] for name in method.after_training}}


@lru_cache(maxsize=256)
def as_trained(method: Method) -> Method:
    """The method as a closed form that gives back what was trained, `task.extra["trained"]`."""
    return replace(method, trained=(), fit=lambda xp, task, setting: task.extra["trained"])


def with_trained(task: Task, arrays: Arrays) -> Task:
    """The task for `as_trained`."""
    return task._replace(extra={**task.extra, "trained": dict(arrays)})


class SharedRuns:
    """The runs that a list of settings needs, and a journal of these runs.

    runs: what training sees of the settings, each once. A run is known where all of its settings
    are, and did as well as the best of them.
    """

    def __init__(self, method: Method, settings: Sequence[Setting], journal: Journal) -> None:
        self._method, self._journal = method, journal
        self._members: dict[tuple[Any, ...], list[Setting]] = {}
        self._judged: dict[tuple[Any, ...], list[Evaluation]] = {}
        for setting in settings:
            self._members.setdefault(self._key(setting), []).append(setting)
        self.runs = [of_the_run(method, members[0]) for members in self._members.values()]

    @property
    def states(self) -> MutableMapping[str, Leaves]:
        """The journal's."""
        return self._journal.states

    def known(self, run: Setting, epochs_run: int) -> Evaluation | None:
        """How the best of a run's settings did, where all are known."""
        members = self._members[self._key(run)]
        found = [evaluation for s in members if (evaluation := self._journal.known(s, epochs_run))]
        return self._best(found) if len(found) == len(members) else None

    def judged(
        self, run: Evaluation, judge: Callable[[Sequence[Setting]], Sequence[Judged]]
    ) -> Evaluation:
        """How the best of a run's settings did.

        judge: how settings do on what the run trained.
        """
        if not self._method.after_training:
            return self._best([run])
        members = self._members[self._key(run.setting)]
        seconds = run.seconds / len(members)
        return self._best(
            [
                # A run that diverged on the way has diverged, whatever comes after it.
                replace(
                    run,
                    setting=setting,
                    accuracy=accuracy,
                    nll=run.nll if run.failed else nll,
                    seconds=seconds,
                    images=images,
                )
                for setting, (accuracy, nll, images) in zip(members, judge(members), strict=True)
            ]
        )

    def take(self, best: Evaluation) -> list[Evaluation]:
        """All evaluations of the run to which `best` belongs."""
        return self._judged.pop(self._key(best.setting))

    def _best(self, evaluations: list[Evaluation]) -> Evaluation:
        self._judged[self._key(evaluations[0].setting)] = evaluations
        return max(evaluations, key=lambda evaluation: evaluation.score)

    def _key(self, setting: Setting) -> tuple[Any, ...]:
        return tuple(of_the_run(self._method, setting).items())
