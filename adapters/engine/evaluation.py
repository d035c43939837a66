"""How a setting did on validation data, or on rounds of the support set that stand for it; what of
two is better, and where that is kept."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.method import Arrays, Rounds, Setting

Leaves = list[npt.NDArray[Any]]
"""A training.RunState on the host, as its leaves in tree order."""


class Score(NamedTuple):
    """What validation says of a setting; the better one compares as larger.

    accuracy: in [0, 1]. likelihood: minus the mean negative log-likelihood at the best temperature;
    it decides between equal accuracies. Of equal scores the earlier setting's is taken, as by
    `max`.
    """

    accuracy: Any
    likelihood: Any

    def beats(self, other: Score) -> Any:
        """self > other within a compiled program."""
        likelier = self.likelihood > other.likelihood
        return (self.accuracy > other.accuracy) | (self.accuracy == other.accuracy) & likelier


DIVERGED = Score(-np.inf, -np.inf)


class Images(NamedTuple):
    """How the validation images of all folds are classified, one fold after the other.

    right: which of them correctly. losses: float32, their negative log-likelihoods at the
    temperature that is best for the fold.
    """

    right: npt.NDArray[np.bool_]
    losses: npt.NDArray[np.float32]

    @classmethod
    def joined(cls, folds: Sequence[Any]) -> Images:
        """Of several folds that have both, one after the other along their last axis."""
        of_each = ([np.asarray(getattr(fold, name)) for fold in folds] for name in cls._fields)
        return cls(*(np.concatenate(rows, axis=-1) for rows in of_each))


def rounds_of(
    labels: npt.NDArray[np.integer], images: npt.NDArray[np.integer] | None = None
) -> Rounds | None:
    """Round r has the r-th image of every class that has at least two; None where none has.

    images: which image a row of the support set is, where some were drawn repeatedly: all rows of
    one are in one round.
    """
    of_image = np.full(len(labels), -1, np.int32)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        position: dict[int, int] = {}
        for row in own:
            image = int(row if images is None else images[row])
            of_image[row] = position.setdefault(image, len(position))
        if len(position) < 2:
            of_image[own] = -1
    rounds = [np.flatnonzero(of_image == number) for number in range(of_image.max(initial=-1) + 1)]
    if not rounds:
        return None
    place = np.zeros(len(labels), np.int32)
    members = np.full((len(rounds), max(map(len, rounds))), -1, np.int32)
    for number, own in enumerate(rounds):
        members[number, : len(own)] = own
        place[own] = np.arange(len(own))
    return Rounds(of_image, place, members)


Judged = tuple[float, float, Images]
"""(accuracy, mean negative log-likelihood, image by image)."""


@dataclass(frozen=True)
class Evaluation:
    """How a setting did on the validation data.

    epochs_run: how long it was trained, 0 where nothing is trained. epoch: the one that counts:
    the last, or the best of those evaluated. accuracy in [0, 1] and nll: at that epoch, over the
    images of all folds; an nll that is not finite marks a setting that diverged.
    images: None where they are not known. seconds: what it took. arrays: fetches what was fitted;
    None where that was not kept.
    """

    setting: Setting
    epochs_run: int
    epoch: int
    accuracy: float
    nll: float
    seconds: float
    images: Images | None = None
    arrays: Callable[[], Arrays] | None = None

    @property
    def failed(self) -> bool:
        """Whether it diverged."""
        return not np.isfinite(self.nll)

    @property
    def score(self) -> Score:
        """DIVERGED where it did."""
        return DIVERGED if self.failed else Score(self.accuracy, -self.nll)


class Journal(Protocol):
    """What a search has found so far, kept where an interruption does not reach it."""

    @property
    def states(self) -> MutableMapping[str, Leaves]:
        """Places for the states of runs that may go on, by name."""

    def known(self, setting: Setting, epochs_run: int) -> Evaluation | None:
        """What was found already of a setting after so many epochs."""
