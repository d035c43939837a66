"""Choose a setting and an epoch, on validation data only, and fit it."""

from collections import defaultdict
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from clip_adapter.adapters.engine import Engine, Leaves
from clip_adapter.adapters.method import Arrays, Evaluation, Grid, Method, Search, Setting
from clip_adapter.pipelines.tasks import CachedData, Draw, Selection, folds, whole_task


class Record(Protocol):
    """What a search has found so far, kept where an interruption does not reach it."""

    @property
    def states(self) -> MutableMapping[str, Leaves]: ...

    def known(self, setting: Setting, epochs_run: int) -> Evaluation | None: ...

    def add(self, evaluation: Evaluation) -> None: ...


@dataclass(frozen=True)
class Chosen:
    """The chosen setting, fitted on the whole support set.

    epoch: None where nothing chose one (the last). evaluation: None where there was no choice.
    tried, failed: how many settings. as_far: those that trained as long as the chosen one.
    flat: those of them within one standard error of the best.
    note: what a reader has to know about the choice, or "".
    """

    setting: Setting
    epoch: int | None
    arrays: Arrays
    evaluation: Evaluation | None = None
    tried: int = 1
    failed: int = 0
    as_far: int = 1
    flat: int = 1
    note: str = ""


def choose(
    method: Method,
    grid: Grid,
    data: CachedData,
    drawn: Draw,
    rule: Selection,
    engine: Engine,
    record: Record,
) -> Chosen | None:
    """Search the grid and fit the setting with the best validation accuracy (ties: lowest NLL).

    record: what is known of an interrupted run and where new evaluations go.
    Returns None where every setting diverged, or the chosen one does on the whole support set.
    """
    task = whole_task(data, drawn)
    parts = folds(data, drawn) if rule == "cv" else [task]
    if rule == "none" or not parts:
        setting = method.single(grid)
        note = "" if rule == "none" else "a class has one image, cv impossible: defaults taken"
        arrays = method.fit(setting, None, task, engine)
        return Chosen(setting, None, arrays, note=note) if _is_finite(arrays) else None
    best: Evaluation | None = None
    accuracies: dict[int, list[float]] = defaultdict(list)
    search = Search(grid, parts, record.known, record.states)
    for evaluation in method.search(search, engine):
        record.add(evaluation)
        accuracies[evaluation.epochs_run].append(evaluation.score[0])
        if _is_better(evaluation, best):
            best = evaluation
    if best is None:
        return None
    arrays = best.arrays() if best.arrays else method.fit(best.setting, best.epoch, task, engine)
    if not _is_finite(arrays):
        return None
    # Halving leaves most settings behind on the way; only those that went as far compare.
    as_far = accuracies[best.epochs_run]
    # An image that was drawn repeatedly is judged alike each time: it counts once.
    judged = len(np.unique(drawn.support if rule == "cv" else drawn.validation))
    return Chosen(
        best.setting,
        best.epoch,
        arrays,
        best,
        tried=max(map(len, accuracies.values())),
        failed=int(np.isneginf([a for some in accuracies.values() for a in some]).sum()),
        as_far=len(as_far),
        flat=_within_one_standard_error(as_far, best.score[0], judged),
    )


def _is_finite(arrays: Arrays) -> bool:
    return all(np.isfinite(array).all() for array in arrays.values())


def _is_better(evaluation: Evaluation, best: Evaluation | None) -> bool:
    """Whether to choose this one instead: it ran longer, or as long with a better score."""
    if evaluation.failed:
        return False
    if best is None:
        return True
    return (evaluation.epochs_run, evaluation.score) > (best.epochs_run, best.score)


def _within_one_standard_error(scores: list[float], best: float, images: int) -> int:
    """Settings whose accuracy is within √(p(1 − p)/n) of the best accuracy p on n images."""
    error = np.sqrt(best * (1 - best) / images)
    return int(np.sum(np.array(scores) >= best - error))
