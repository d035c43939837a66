"""Successive halving: run every setting a little, let the best third go on, repeat.

Karnin et al. (ICML 2013), Jamieson & Talwalkar (arXiv 1502.07943). Every setting follows one
full-length schedule from its start; survivors go on where they stopped. A full grid is the same
with a single rung.
"""

import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from clip_adapter.adapters.engine.evaluation import Evaluation, Journal, Leaves
from clip_adapter.adapters.method import Setting, Task

ETA = 3
FIRST_SHARE = 0.1


@dataclass(frozen=True)
class Rung:
    """Settings to be trained from epoch `first` to `stop`, by their indices in `settings`.

    state: (fold, index) → the state at `first`; not called where that is 0. Raises KeyError where
    it was lost.
    """

    settings: Sequence[Setting]
    indices: Sequence[int]
    folds: Sequence[Task]
    first: int
    stop: int
    state: Callable[[int, int], Leaves]


Rank = tuple[float, float, int]
Train = Callable[[Rung], Iterator[tuple[int, Evaluation, Callable[[], list[Leaves]]]]]


def rung_epochs(epochs: int, every: int = 1) -> list[int]:
    """Epochs at which settings are compared: 10 % of the schedule, then three times as many.

    every: epochs between evaluations; each rung ends at one. The last is the schedule's end, and
    takes in a rung that would leave less than a third of the epochs behind it.
    """
    rungs: list[int] = []
    share = FIRST_SHARE
    while share * ETA**0.5 < 1:
        rung = max(every, round(share * epochs / every) * every)
        if rung < epochs and rung not in rungs:
            rungs.append(rung)
        share *= ETA
    return [*rungs, epochs]


def survivors(settings: int, rungs: int) -> list[int]:
    """How many settings each of so many rungs trains."""
    counts = [settings]
    for _ in range(rungs - 1):
        counts.append(-(-counts[-1] // ETA))
    return counts


def successive_halving(
    settings: Sequence[Setting],
    rungs: Sequence[int],
    folds: Sequence[Task],
    journal: Journal,
    train: Train,
) -> Iterator[Evaluation]:
    """Train all settings to the first rung, the best third of them to the second, and so on.

    Ranked by validation accuracy, ties by negative log-likelihood, then by position. A setting
    that diverged never goes on. Yields an evaluation per setting and rung.
    """
    indices = list(range(len(settings)))
    counts = [*survivors(len(settings), len(rungs)), 0]

    def forget(rung: int, index: int) -> None:
        for fold in range(len(folds)):
            # Not pop, which would read the state from disk.
            with suppress(KeyError):
                del journal.states[_name(rung, fold, index)]

    def drop(ranked: list[Rank], rung: int, going_on: int) -> None:
        """Forget those that cannot go on any more."""
        for *_, index in ranked[going_on:]:
            forget(rung, index)
        del ranked[going_on:]

    first = 0
    for rung, stop in enumerate(rungs):
        going_on = counts[rung + 1]
        known_already: set[int] = set()
        ranked: list[Rank] = []
        for index in indices:
            known = journal.known(settings[index], stop)
            if known:
                known_already.add(index)
                _place(ranked, known, index)
                yield known
        drop(ranked, rung, going_on)
        waiting = [index for index in indices if index not in known_already]
        state = partial(_state, journal, rung - 1)
        for index, evaluation, states in train(Rung(settings, waiting, folds, first, stop, state)):
            if _place(ranked, evaluation, index) < going_on:
                for fold, leaves in enumerate(states()):
                    journal.states[_name(rung, fold, index)] = leaves
            yield evaluation
            # Only now: the caller has taken note of the setting that displaces another one.
            drop(ranked, rung, going_on)
        for index in indices:
            forget(rung - 1, index)
        indices, first = sorted(index for *_, index in ranked), stop


def _place(ranked: list[Rank], evaluation: Evaluation, index: int) -> int:
    """Enter a setting into the ranking and return its place; behind all where it diverged."""
    if evaluation.failed:
        return sys.maxsize
    accuracy, negative_nll = evaluation.score
    rank = (-accuracy, -negative_nll, index)
    insort(ranked, rank)
    return bisect_left(ranked, rank)


def _state(journal: Journal, rung: int, fold: int, index: int) -> Leaves:
    return journal.states[_name(rung, fold, index)]


def _name(rung: int, fold: int, index: int) -> str:
    return f"rung-{rung}-fold-{fold}-setting-{index}"
