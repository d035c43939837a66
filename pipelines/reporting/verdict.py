"""Did adapting help, by how much, and how sure is that?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.registry import REFERENCE
from clip_adapter.pipelines.fitting.config import Shots
from clip_adapter.pipelines.reporting.entries import Entry, in_order
from clip_adapter.pipelines.reporting.significance import Interval, bootstrap, mcnemar, over_seeds


@dataclass(frozen=True, eq=False)
class Difference:
    """An entry against another on the tasks that both have, in accuracy; positive where it is
    better.

    seeds: those tasks'. right, theirs_right: (S, N), whether each is right on an image.
    """

    one: Entry
    other: Entry
    seeds: Sequence[int]
    right: npt.NDArray[np.bool_]
    theirs_right: npt.NDArray[np.bool_]

    @property
    def theirs(self) -> float:
        """The other's accuracy, mean over the seeds."""
        return float(self.theirs_right.mean())

    @property
    def gained(self) -> npt.NDArray[np.int64]:
        """(S, N): 1 where only the first is right, −1 where only the other is."""
        return self.right.astype(np.int64) - self.theirs_right

    @cached_property
    def images(self) -> Interval:
        """Over test images, paired."""
        return bootstrap(self.gained.mean(axis=0))

    @cached_property
    def spread(self) -> Interval | None:
        """Over seeds; None of a single one."""
        return over_seeds(self.gained.mean(axis=1).tolist())

    @cached_property
    def p(self) -> float:
        """McNemar's; of several seeds an image counts for the one that is right in more of them."""
        gained = self.gained.sum(axis=0)
        return mcnemar(int(np.sum(gained > 0)), int(np.sum(gained < 0)))

    @property
    def sign(self) -> int:
        """1 or −1 where the difference is beyond the noise of images and of seeds, else 0."""
        signs = {interval.sign for interval in (self.images, self.spread) if interval}
        return signs.pop() if len(signs) == 1 else 0

    @property
    def noise(self) -> str:
        """Whose noise the difference lies within, "" where it is beyond it."""
        of_images = ["test images"] if not self.images.sign else []
        of_seeds = ["seeds"] if self.spread and not self.spread.sign else []
        return " and of the ".join(of_images + of_seeds)


@dataclass(frozen=True)
class Verdict:
    """What the first screen says.

    entry, shots: the method that validation prefers, at the most shots. zero_shot, next_best: what
    it is compared with; None where that was not run on the same tasks.
    """

    entry: Entry
    shots: Shots
    zero_shot: Difference | None
    next_best: Difference | None


def judge(entries: Sequence[Entry]) -> Verdict | None:
    """None where nothing that was asked for has a test accuracy.

    The entry is chosen by validation alone (mean accuracy over seeds, then likelihood; without
    validation the first one); the next best is the best on the test images among the others, which
    makes that comparison a hard one.
    """
    asked = [entry for entry in entries if entry.asked and entry.tested]
    if not asked:
        return None
    shots = in_order({number for entry in asked for number in entry.tested})[-1]
    candidates = [entry for entry in asked if shots in entry.tested]
    entry = max(candidates, key=lambda one: _validation(one, shots))
    rivals = [e for e in entries if e is not entry and e.train_classes == entry.train_classes]
    compared = [own for rival in rivals if (own := compare(entry, rival, shots))]
    zero_shot = next((c for c in compared if c.other.method is REFERENCE), None)
    others = [c for c in compared if c.other.method is not REFERENCE]
    next_best = max(others, key=lambda c: c.theirs, default=None)
    return Verdict(entry, shots, zero_shot, next_best)


def _validation(entry: Entry, shots: Shots) -> tuple[float, float]:
    rows = [r for r in entry.results(shots) if r.val_accuracy is not None and r.val_nll is not None]
    if not rows:
        return (-np.inf, -np.inf)
    accuracy = fmean(row.val_accuracy or 0.0 for row in rows)
    return accuracy, -fmean(row.val_nll or 0.0 for row in rows)


def compare(entry: Entry, other: Entry, shots: Shots) -> Difference | None:
    """None where they have no task in common."""
    own, others = entry.right(shots), other.right(shots)
    seeds = sorted(own.keys() & others.keys())
    if not seeds or any(len(own[seed]) != len(others[seed]) for seed in seeds):
        return None
    right, theirs = (np.array([some[seed] for seed in seeds]) for some in (own, others))
    return Difference(entry, other, seeds, right, theirs)
