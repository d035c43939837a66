"""How much the probabilities, sets and refusals of an adapter are worth, on labelled images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.decisions import Decisions
from clip_adapter.pipelines.deciding.answers import NONE, Answers, calibrated_by, percent
from clip_adapter.words import counted, printable

if TYPE_CHECKING:
    from clip_adapter.pipelines.scoring.scores import Scores

BINS = 15
SMALLEST = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Trust:
    """Of N images: own, top: (N,) probabilities of what they show and of what was predicted.
    right: (N,), whether that is the same. covered: (N,), whether what they show is in the set that
    was answered, and sizes: (N,) how many classes that has; None where no coverage was asked for.
    rejected: (N,), whether "none of these" was answered; None where nothing was to be."""

    own: npt.NDArray[np.float64]
    top: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]
    covered: npt.NDArray[np.bool_] | None = None
    sizes: npt.NDArray[np.int64] | None = None
    rejected: npt.NDArray[np.bool_] | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, in nats."""
        return float(-np.log(np.maximum(self.own, SMALLEST)).mean())

    @property
    def calibration_error(self) -> float:
        """In [0, 1]: how far accuracy and mean probability are apart in 15 bins of equal width,
        weighted by their images (ECE: Guo et al., arXiv 1706.04599)."""
        bins = np.minimum((self.top * BINS).astype(np.int64), BINS - 1)
        return float(np.abs(np.bincount(bins, self.right - self.top)).sum() / len(bins))

    def of(self, kept: npt.NDArray[np.bool_]) -> Trust:
        """The same of some of the images."""
        parts: dict[str, Any] = {n: own[kept] for n, own in vars(self).items() if own is not None}
        return Trust(**parts)


def trust_of(
    shares: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    encoded: npt.NDArray[np.float32],
    answers: Answers | None,
) -> Trust:
    """shares: (N, K) probabilities of the classes to choose from. labels: (N,), columns of them.
    encoded: (N, D) image features. answers: None where nothing is promised."""
    every, best = np.arange(len(shares)), shares.argmax(axis=1)
    trust = Trust(shares[every, labels], shares[every, best], best == labels)
    if answers and answers.coverage is not None:
        sets = answers.sets(shares)
        trust = replace(trust, covered=sets[every, labels], sizes=sets.sum(axis=1))
    if answers and answers.reject is not None:
        trust = replace(trust, rejected=answers.is_none(answers.known(shares, encoded)))
    return trust


def joined(parts: Sequence[Trust]) -> Trust:
    """Of all blocks of images."""
    names = [name for name, own in vars(parts[0]).items() if own is not None]
    return Trust(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def trust_lines(
    scores: Scores, decisions: Decisions | None, coverage: float | None
) -> Iterator[str]:
    """What `evaluate` prints of it."""
    trust, labels, class_names = scores.trust, scores.labels, scores.class_names
    if trust is None:
        return
    at = f"temperature {decisions.temperature:.3g}" if decisions else "not calibrated"
    error = f"calibration error {100 * trust.calibration_error:.1f} % ({BINS} bins)"
    yield f"probabilities ({at}): negative log-likelihood {trust.nll:.3f}, {error}"
    if sentence := calibrated_by(decisions):
        yield sentence
    if trust.covered is not None and trust.sizes is not None and coverage is not None:
        counts = np.bincount(labels, minlength=len(class_names))
        shares = np.bincount(labels, trust.covered, len(class_names)) / np.maximum(counts, 1)
        worst = int(np.where(counts > 0, shares, 2).argmin())
        found = 100 * trust.covered.mean()
        yield (
            f"coverage   {found:6.2f} % where {percent(coverage)} is promised on average over all "
            f"classes; {trust.sizes.mean():.2f} classes an image, one class for "
            f"{100 * (trust.sizes == 1).mean():.1f} % of them"
        )
        yield (
            f"the worst class: {printable(class_names[worst])}, {100 * shares[worst]:.1f} % of "
            f"{counted(int(counts[worst]), 'image')}"
        )
    if trust.rejected is not None:
        share = 100 * trust.rejected.mean()
        yield f"{NONE:10s} {share:6.2f} % of these images, which do show the adapter's classes"
