"""Successive halving: run every setting a little, let the best third go on, repeat.

Karnin et al. (ICML 2013), Jamieson & Talwalkar (arXiv 1502.07943). Every setting follows one
full-length schedule from its start; survivors go on where they stopped. A full grid is the same
with a single rung.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from clip_adapter.adapters.engine.evaluation import Evaluation, Journal, Leaves, Score
from clip_adapter.adapters.method import Setting, Task

ETA = 3
FIRST_SHARE = 0.1

Runs = Sequence[Sequence[Setting]]
"""The settings that each run serves: one, or several that differ in what training does not see."""


@dataclass(frozen=True)
class Rung:
    """Runs to be trained from epoch `first` to `stop`, by their indices in `runs`.

    state: (fold, index) → the state at `first`; not called where that is 0. Raises KeyError where
    it was lost.
    """

    runs: Runs
    indices: Sequence[int]
    folds: Sequence[Task]
    first: int
    stop: int
    state: Callable[[int, int], Leaves]


Ranked = list[tuple[Score, int]]
"""(score, −index) of the runs so far, the best one last; of equal ones the first is better."""
Train = Callable[[Rung], Iterator[tuple[int, list[Evaluation], Callable[[], list[Leaves]]]]]
"""Trains a rung; yields a run's index, how its settings did, and its states."""


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
    runs: Runs, rungs: Sequence[int], folds: Sequence[Task], journal: Journal, train: Train
) -> Iterator[Evaluation]:
    """Train all runs to the first rung, the best third of them to the second, and so on.

    A run is as good as the best of its settings; one that diverged never goes on. Yields an
    evaluation per setting and rung.
    """
    indices = list(range(len(runs)))
    counts = [*survivors(len(runs), len(rungs)), 0]

    def forget(rung: int, index: int) -> None:
        for fold in range(len(folds)):
            # Not pop, which would read the state from disk.
            with suppress(KeyError):
                del journal.states[_name(rung, fold, index)]

    def drop(ranked: Ranked, rung: int, going_on: int) -> None:
        """Forget those that cannot go on any more."""
        behind = max(0, len(ranked) - going_on)
        for _, negative in ranked[:behind]:
            forget(rung, -negative)
        del ranked[:behind]

    first = 0
    for rung, stop in enumerate(rungs):
        going_on = counts[rung + 1]
        waiting: list[int] = []
        ranked: Ranked = []
        for index in indices:
            known = [journal.known(setting, stop) for setting in runs[index]]
            evaluations = [evaluation for evaluation in known if evaluation]
            if len(evaluations) < len(known):
                waiting.append(index)
                continue
            _place(ranked, evaluations, index)
            yield from evaluations
        drop(ranked, rung, going_on)
        state = partial(_state, journal, rung - 1)
        for index, evaluations, states in train(Rung(runs, waiting, folds, first, stop, state)):
            if _place(ranked, evaluations, index) < going_on:
                for fold, leaves in enumerate(states()):
                    journal.states[_name(rung, fold, index)] = leaves
            yield from evaluations
            # Only now: the caller has taken note of the setting that displaces another one.
            drop(ranked, rung, going_on)
        for index in indices:
            forget(rung - 1, index)
        indices, first = sorted(-negative for _, negative in ranked), stop


def _place(ranked: Ranked, evaluations: Sequence[Evaluation], index: int) -> int:
    """Enter a run into the ranking and return how many are better; all where it diverged."""
    best = max(evaluations, key=lambda evaluation: evaluation.score)
    if best.failed:
        return sys.maxsize
    rank = (best.score, -index)
    place = bisect_left(ranked, rank)
    ranked.insert(place, rank)
    return len(ranked) - 1 - place


def _state(journal: Journal, rung: int, fold: int, index: int) -> Leaves:
    return journal.states[_name(rung, fold, index)]


def _name(rung: int, fold: int, index: int) -> str:
    return f"rung-{rung}-fold-{fold}-setting-{index}"
