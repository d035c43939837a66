"""Choose a setting on validation data only, and fit it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import Protocol

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.engine.evaluation import Evaluation, Journal
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import fit, search
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Arrays, Method, Rounds, Setting, Task

# Two settings are told apart where chance alone would separate them so rarely.
SIGNIFICANCE = 0.05
# Nats by which float32 alone moves the loss of an image.
ROUNDING = 1e-3


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
    outdoes_zero_shot: bool | None = None

    def outdoes(self, asked: Search, reference: Evaluation) -> bool | None:
        """Whether validation shows this to be better than `reference`: more images are right, and
        they are likelier by more than chance explains, for as many settings as were compared
        (Bonferroni). None where nothing judged."""
        if self.evaluation is None:
            return None
        bound = t_quantile(1 - SIGNIFICANCE / self.compared, len(asked.distinct) - 1)
        likelier = asked.excess(reference, self.evaluation) > bound
        return bool(likelier and self.evaluation.accuracy > reference.accuracy)


@dataclass(frozen=True)
class Search:
    """What there is to choose from, and by what.

    values: to try of each hyper-parameter. folds: support sets with validation sets; [] where
    nothing can choose. rounds: as `search` takes them. distinct: a validation row for each image:
    one that was drawn repeatedly is judged alike each time, and counts once in comparisons.
    """

    method: Method
    values: Mapping[str, Sequence[Value]]
    preset: str
    folds: Sequence[Task]
    distinct: npt.NDArray[np.int64]
    halving: bool = False
    rounds: tuple[Task, Rounds] | None = None

    def excess(self, one: Evaluation, other: Evaluation) -> float:
        """How much less likely the validation images are by `one` than by `other`, in standard
        errors of the mean difference over images; 0 where that cannot be told, as of one image.

        Within one standard error is how a simpler model is preferred in pruning trees (Breiman et
        al., Classification and Regression Trees, 1984, section 3.4.3).
        """
        if one.images is None or other.images is None:
            return 0.0
        difference = (one.images.losses.astype(np.float64) - other.images.losses)[self.distinct]
        weights = self._weights()
        mean = float(weights @ difference)
        count = len(difference)
        variance = float(weights**2 @ (difference - mean) ** 2) * count / max(count - 1, 1)
        return mean / math.sqrt(variance) if variance else 0.0

    def _weights(self) -> npt.NDArray[np.float64]:
        """Of the distinct validation images; their sum is 1."""
        given = [
            np.ones(len(fold.validation_labels))
            if fold.validation_weights is None
            else np.asarray(fold.validation_weights, np.float64)
            for fold in self.folds
        ]
        own = np.concatenate(given)[self.distinct]
        return own / own.sum()


def choose(asked: Search, task: Task, engine: Engine, record: Record) -> Chosen | None:
    """Search, and fit on `task` the setting that validation prefers (see `_contenders`).

    record: what is known of an interrupted run and where new evaluations go.
    Returns None where every setting diverged, or the chosen one does on the whole support set.
    """
    method = asked.method
    if not asked.folds:
        return take_defaults(asked, task, engine)
    found: list[Evaluation] = []
    contenders: list[Evaluation] = []
    for evaluation in search(
        method,
        asked.values,
        asked.folds,
        engine,
        record,
        halving=asked.halving,
        rounds=asked.rounds,
    ):
        record.add(evaluation)
        contenders = _contenders(asked, [*contenders, evaluation])
        # Without what was fitted, which is not to be kept for every setting.
        found.append(replace(evaluation, arrays=None))
    # Those that halving stopped on the way were judged in the middle of their schedule.
    longest = max(evaluation.epochs_run for evaluation in found)
    best = _contenders(asked, found)[0]
    if best.failed or best.epochs_run < longest:
        return None
    is_closed = not (method.is_trained or method.solver)
    if is_closed and len(found) > 1 and _all_alike(found):
        default = take_defaults(asked, task, engine)
        return default and replace(default, evaluation=best, compared=len(found))
    fitted = next((c.arrays for c in contenders if c.setting == best.setting), None)
    arrays = fitted() if fitted else fit(method, best.setting, best.epoch, task, engine)
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


def _all_alike(evaluations: Sequence[Evaluation]) -> bool:
    """Whether every setting says the same of every validation image: GDA's weight, say, where the
    folds leave one image a class, and with it no covariance."""
    first = evaluations[0].images
    return first is not None and all(
        one.images is not None
        and np.array_equal(one.images.right, first.right)
        and np.allclose(one.images.losses, first.losses, atol=ROUNDING)
        for one in evaluations
    )


def take_defaults(
    asked: Search, task: Task, engine: Engine, epoch: int | None = None
) -> Chosen | None:
    """Fit the default setting, where nothing can choose. epoch: to stop after; None for the end."""
    setting = asked.method.default_setting(asked.values, asked.preset)
    arrays = fit(asked.method, setting, epoch, task, engine)
    return Chosen(setting, epoch, arrays) if is_finite(arrays) else None


def t_quantile(probability: float, freedom: int) -> float:
    """Of Student's t, by the expansion in 1/ν (Abramowitz and Stegun, 26.7.5); infinite for ν < 2,
    where nothing can be shown. Within 1 % of it from ν = 5 on at the 5 % level."""
    if freedom < 2:
        return math.inf
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def is_finite(arrays: Arrays) -> bool:
    return all(np.isfinite(array).all() for array in arrays.values())


def _ranks(evaluation: Evaluation) -> tuple[int, tuple[float, float]]:
    """Longer (under halving) first, then better; one that diverged is behind all that did not."""
    return (-1 if evaluation.failed else evaluation.epochs_run), evaluation.score


def _contenders(asked: Search, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those of the settings trained longest that may be chosen, the one to choose first.

    Usually it is the most accurate alone. Of a method that says which settings are near zero-shot
    it is all that validation cannot tell from the likeliest, nearest first: a few images choose
    badly among many settings, and what they choose wrongly costs most where zero-shot is good.
    """
    best = max(evaluations, key=_ranks)
    names = asked.method.near_zero_shot
    if not names or best.failed:
        return [best]
    sound = [e for e in evaluations if e.epochs_run == best.epochs_run and not e.failed]
    likeliest = min(sound, key=lambda evaluation: evaluation.nll)

    def distance(evaluation: Evaluation) -> tuple[float, ...]:
        values = [evaluation.setting.get(name, 0.0) for name in names]
        return (*(math.inf if isinstance(v, str) else float(v) for v in values), evaluation.nll)

    near = [e for e in sound if asked.excess(e, likeliest) <= 1]
    return sorted(near, key=distance)


def _indistinguishable(
    best: Evaluation, others: Sequence[Evaluation], distinct: npt.NDArray[np.int64]
) -> int:
    """How many settings differ from the best by no more than chance explains, itself included.

    McNemar's exact test on the validation images, which all settings share: of the n images on
    which two settings disagree, the worse one gets k right, and under equal accuracy k is binomial
    with n trials of 1/2.
    distinct: a row of the validation set for each image.
    """
    if best.images is None:
        return 1
    own = best.images.right[distinct]
    count = 0
    for other in others:
        if other.images is None or other.failed:
            continue
        right = other.images.right[distinct]
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
