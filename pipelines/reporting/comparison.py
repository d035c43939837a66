"""Methods over several data sets: averages, ranks and pairwise differences.

Each data set counts alike, as in the averages of the literature. A method that has no number on one
of them has no average and no rank; two methods are compared where both have one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.fitting.results import MethodSummary
from clip_adapter.pipelines.fitting.tables import KINDS, kinds
from clip_adapter.pipelines.reporting.entries import in_order, pool
from clip_adapter.pipelines.reporting.runs import load_runs


@dataclass(frozen=True)
class Comparison:
    """measure: which accuracy, as a row of results names it. accuracy: (data sets, methods, shots),
    mean over seeds in [0, 1], NaN where there is none; std: its standard deviation over seeds.
    beside: what else there is to say of the same, by the words behind a method's name."""

    measure: str
    datasets: Sequence[str]
    methods: Sequence[str]
    shots: Sequence[Shots]
    accuracy: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    beside: Mapping[str, Comparison] = field(default_factory=dict)

    @property
    def average(self) -> npt.NDArray[np.float64]:
        """(methods, shots), over data sets; NaN where one of them has no number."""
        return self.accuracy.mean(axis=0)

    @property
    def ranks(self) -> npt.NDArray[np.float64]:
        """(methods, shots), mean over data sets of the rank among methods, 1 being the best."""
        return rankdata(-self.accuracy, axis=1, nan_policy="omit").mean(axis=0)

    def difference(self, one: int, other: int) -> tuple[float, float, int, int]:
        """Of two methods over the data sets and shots of which both have a number: mean difference
        in accuracy (NaN where there are none), its standard error over data sets (NaN of a single
        one), wins and losses of the first."""
        differences = self.accuracy[:, one] - self.accuracy[:, other]
        differences = differences[~np.isnan(differences).all(axis=1)]
        wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
        count = len(differences)
        if not count:
            return np.nan, np.nan, 0, 0
        by_dataset = np.nanmean(differences, axis=1)
        error = by_dataset.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
        return float(by_dataset.mean()), float(error), wins, losses


def read_comparisons(runs: Mapping[str, Sequence[Path]]) -> list[Comparison]:
    """Of the finished runs on each data set, by its name: the test accuracy; of runs that were
    fitted on the first half of the classes that of both halves, and their harmonic mean.

    Runs on one data set are pooled. A method that runs had with other arguments counts as another,
    named by what differs, also between data sets.
    Raises UserError for a run that is not finished, for several caches of one data set, and for
    runs on all classes beside such on half of them.
    """
    loaded = {name: load_runs(paths) for name, paths in runs.items()}
    every = [run for own in loaded.values() for run in own]
    pooled = {name: pool(own, every) for name, own in loaded.items()}
    entries = [entry for own in pooled.values() for entry in own]
    classes = {entry.train_classes for entry in entries}
    if len(classes) > 1:
        raise UserError("Runs fitted on all classes and on half of them are not comparable.")
    fitted = classes.pop()
    rows = [
        (index, entry.label, row)
        for index, own in enumerate(pooled.values())
        for entry in own
        for row in entry.summary.values()
    ]
    words = kinds(fitted, (row for *_, row in rows))
    found = {measure: _comparison(list(pooled), rows, measure) for measure in words}
    beside = {words[name]: one for name, one in found.items() if name not in KINDS[fitted]}
    return [replace(found[name], beside=beside) for name in KINDS[fitted]]


def _comparison(
    datasets: Sequence[str], rows: Sequence[tuple[int, str, MethodSummary]], measure: str
) -> Comparison:
    """rows: (data set, method, its row)."""
    methods = list(dict.fromkeys(label for _, label, _ in rows))
    shots = in_order({row.shots for *_, row in rows})
    shape = (len(datasets), len(methods), len(shots))
    accuracy, std = np.full(shape, np.nan), np.full(shape, np.nan)
    for index, label, row in rows:
        spread = getattr(row, measure)
        if spread is not None:
            place = index, methods.index(label), shots.index(row.shots)
            accuracy[place] = spread.mean
            std[place] = np.nan if spread.std is None else spread.std
    return Comparison(measure, datasets, methods, shots, accuracy, std)
