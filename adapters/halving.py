"""Successive halving: run every setting a little, let the best third go on, repeat.

Karnin et al. (ICML 2013), Jamieson & Talwalkar (arXiv 1502.07943). Every setting follows one
full-length schedule from its start; survivors go on where they stopped. A full grid is the same
climb with a single rung.
"""

import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from clip_adapter.adapters.engine import Leaves
from clip_adapter.adapters.method import Evaluation, Search, Setting
from clip_adapter.adapters.training import Schedule, Task

ETA = 3
FIRST_SHARE = 0.1


@dataclass(frozen=True)
class Leg:
    """Settings to be trained from epoch `start` to `stop`, by their indices in `settings`.

    state: (fold, index) → the state at `start`; not called where `start` is 0.
    """

    settings: Sequence[Setting]
    indices: Sequence[int]
    folds: Sequence[Task]
    start: int
    stop: int
    state: Callable[[int, int], Leaves]


Rank = tuple[float, float, int]
Train = Callable[[Leg], Iterator[tuple[int, Evaluation, Callable[[], list[Leaves]]]]]


def halving_rungs(schedule: Schedule) -> list[int]:
    """Epochs at which settings are compared: 10 % of the schedule, then three times as many.

    Each rung ends at an evaluation; the last is the schedule's end, and takes in a rung that would
    leave less than a third of the epochs behind it.
    """
    every = schedule.evaluate_every
    rungs = []
    share = FIRST_SHARE
    while share * ETA**0.5 < 1:
        rung = max(every, round(share * schedule.epochs / every) * every)
        if rung < schedule.epochs and rung not in rungs:
            rungs.append(rung)
        share *= ETA
    return [*rungs, schedule.epochs]


def survivors(settings: int, rungs: Sequence[int]) -> list[int]:
    """How many settings each rung trains."""
    counts = [settings]
    for _ in rungs[1:]:
        counts.append(-(-counts[-1] // ETA))
    return counts


def climb(
    settings: Sequence[Setting], rungs: Sequence[int], search: Search, train: Train
) -> Iterator[Evaluation]:
    """Train all settings to the first rung, the best third of them to the second, and so on.

    Ranked by validation accuracy, ties by negative log-likelihood, then by position. A setting
    that diverged never goes on. Yields an evaluation per setting and rung.
    """
    indices = list(range(len(settings)))
    counts = [*survivors(len(settings), rungs), 0]

    def forget(rung: int, index: int) -> None:
        for fold in range(len(search.folds)):
            # Not pop, which would read the state from disk.
            with suppress(KeyError):
                del search.states[_name(rung, fold, index)]

    def drop(ranked: list[Rank], rung: int, going_on: int) -> None:
        """Forget those that cannot go on any more."""
        for *_, index in ranked[going_on:]:
            forget(rung, index)
        del ranked[going_on:]

    start = 0
    for rung, stop in enumerate(rungs):
        going_on = counts[rung + 1]
        found: dict[int, Evaluation] = {}
        ranked: list[Rank] = []
        for index in indices:
            known = search.known(settings[index], stop)
            if known:
                found[index] = known
                _place(ranked, known, index)
                yield known
        drop(ranked, rung, going_on)
        leg = Leg(
            settings,
            [index for index in indices if index not in found],
            search.folds,
            start,
            stop,
            partial(_state, search, rung - 1),
        )
        for index, evaluation, states in train(leg):
            # Without what was fitted, which is not to be kept for every setting.
            found[index] = replace(evaluation, arrays=None)
            if _place(ranked, evaluation, index) < going_on:
                for fold, state in enumerate(states()):
                    search.states[_name(rung, fold, index)] = state
            yield evaluation
            # Only now: the caller has taken note of the setting that displaces another one.
            drop(ranked, rung, going_on)
        for index in indices:
            forget(rung - 1, index)
        indices, start = sorted(index for *_, index in ranked), stop


def _place(ranked: list[Rank], evaluation: Evaluation, index: int) -> int:
    """Enter a setting into the ranking and return its place; behind all where it diverged."""
    if evaluation.failed:
        return sys.maxsize
    accuracy, negative_nll = evaluation.score
    rank = (-accuracy, -negative_nll, index)
    insort(ranked, rank)
    return bisect_left(ranked, rank)


def _state(search: Search, rung: int, fold: int, index: int) -> Leaves:
    return search.states[_name(rung, fold, index)]


def _name(rung: int, fold: int, index: int) -> str:
    return f"rung-{rung}-fold-{fold}-setting-{index}"
