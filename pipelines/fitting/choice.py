"""Choose a setting on validation data only, and fit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.evaluation import Evaluation, Journal
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Arrays, Method, Setting, Task
from clip_adapter.adapters.search import fit, search

# Two settings are told apart where chance alone would separate them so rarely.
SIGNIFICANCE = 0.05


class Record(Journal, Protocol):
    """What a search has found so far, and a place for what it finds next."""

    def add(self, evaluation: Evaluation) -> None:
        """Keep this."""


@dataclass(frozen=True)
class Chosen:
    """The chosen setting, fitted on the whole support set.

    epoch: None where nothing chose one (the last). evaluation: None where there was no choice.
    The others: see TaskResult.
    """

    setting: Setting
    epoch: int | None
    arrays: Arrays
    evaluation: Evaluation | None = None
    tried: int = 1
    diverged: int = 0
    compared: int = 1
    indistinguishable: int = 1
    note: str = ""


@dataclass(frozen=True)
class Search:
    """What there is to choose from, and by what.

    values: to try of each hyper-parameter. folds: support sets with validation sets; [] where
    nothing can choose. distinct: a validation row for each image: one that was drawn repeatedly is
    judged alike each time, and counts once in comparisons.
    """

    method: Method
    values: Mapping[str, Sequence[Value]]
    preset: str
    folds: Sequence[Task]
    distinct: npt.NDArray[np.int64]
    halving: bool = False


def choose(asked: Search, task: Task, engine: Engine, record: Record) -> Chosen | None:
    """Search, and fit the setting with the best validation accuracy (ties: lowest NLL) on `task`.

    record: what is known of an interrupted run and where new evaluations go.
    Returns None where every setting diverged, or the chosen one does on the whole support set.
    """
    method = asked.method
    if not asked.folds:
        return take_defaults(asked, task, engine)
    found: list[Evaluation] = []
    best: Evaluation | None = None
    for evaluation in search(
        method, asked.values, asked.folds, engine, record, halving=asked.halving
    ):
        record.add(evaluation)
        if best is None or _ranks(evaluation) > _ranks(best):
            best = evaluation
        # Without what was fitted, which is not to be kept for every setting.
        found.append(replace(evaluation, arrays=None))
    # Those that halving stopped on the way were judged in the middle of their schedule.
    longest = max(evaluation.epochs_run for evaluation in found)
    if best is None or best.failed or best.epochs_run < longest:
        return None
    arrays = best.arrays() if best.arrays else fit(method, best.setting, best.epoch, task, engine)
    if not is_finite(arrays):
        return None
    rungs = Counter(evaluation.epochs_run for evaluation in found)
    compared = [evaluation for evaluation in found if evaluation.epochs_run == longest]
    return Chosen(
        best.setting,
        best.epoch,
        arrays,
        best,
        tried=max(rungs.values()),
        diverged=sum(evaluation.failed for evaluation in found),
        compared=len(compared),
        indistinguishable=_indistinguishable(best, compared, asked.distinct),
    )


def take_defaults(asked: Search, task: Task, engine: Engine, note: str = "") -> Chosen | None:
    """Fit the default setting, where nothing can choose."""
    setting = asked.method.default_setting(asked.values, asked.preset)
    arrays = fit(asked.method, setting, None, task, engine)
    return Chosen(setting, None, arrays, note=note) if is_finite(arrays) else None


def is_finite(arrays: Arrays) -> bool:
    return all(np.isfinite(array).all() for array in arrays.values())


def _ranks(evaluation: Evaluation) -> tuple[int, tuple[float, float]]:
    """Longer first, then better; a setting that diverged is behind all that did not."""
    return (-1 if evaluation.failed else evaluation.epochs_run), evaluation.score


def _indistinguishable(
    best: Evaluation, others: Sequence[Evaluation], distinct: npt.NDArray[np.int64]
) -> int:
    """How many settings differ from the best by no more than chance explains, itself included.

    McNemar's exact test on the validation images, which all settings share: of the n images on
    which two settings disagree, the worse one gets k right, and under equal accuracy k is binomial
    with n trials of 1/2.
    distinct: a row of the validation set for each image.
    """
    if best.right is None:
        return 1
    own = best.right[distinct]
    count = 0
    for other in others:
        if other.right is None or other.failed:
            continue
        right = other.right[distinct]
        only_best, only_other = int(np.sum(own & ~right)), int(np.sum(~own & right))
        worse, disagreed = min(only_best, only_other), only_best + only_other
        count += _chance(worse, disagreed) >= SIGNIFICANCE
    return count


@cache
def _chance(worse: int, disagreed: int) -> float:
    """min(1, 2 P(X ≤ worse)) for X binomial with `disagreed` trials of 1/2, exactly."""
    term = total = 1
    for drawn in range(worse):
        term = term * (disagreed - drawn) // (drawn + 1)
        total += term
    return min(1.0, 2 * total / 2**disagreed)
