"""How sure a difference is, and whether probabilities mean what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DRAWS = 10_000
LEVEL = 0.95
BINS = 15  # as is usual for the ECE of image classifiers (Guo et al., arXiv 1706.04599)


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or −1 where the interval lies on one side of zero, else 0."""
        return (self.low > 0) - (self.high < 0)


def bootstrap(differences: npt.ArrayLike, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean over images (Efron and Tibshirani 1993, chapter 13).

    differences: (N,), for each image how much better the one classifier did than the other: paired,
        so that how hard an image is does not count as noise.

    Drawing N images with replacement draws how often each distinct difference comes from a
    multinomial distribution, which takes no more time for 50,000 images than for 500.
    """
    values, counts = np.unique(np.asarray(differences, np.float64), return_counts=True)
    total = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=DRAWS)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn @ values / total, [tail, 100 - tail])
    return Interval(float(counts @ values / total), float(low), float(high))


def over_seeds(differences: list[float]) -> Interval | None:
    """Student's interval of a mean over seeds, mean ± t · s / √n; None for fewer than two."""
    if len(differences) < 2:
        return None
    from scipy.stats import t

    mean = fmean(differences)
    half = float(t.ppf((1 + LEVEL) / 2, len(differences) - 1))
    half *= stdev(differences) / len(differences) ** 0.5
    return Interval(mean, mean - half, mean + half)


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p-value that two classifiers are equally good (McNemar 1947).

    better, worse: on how many images the one is right and the other wrong, and the reverse.
    """
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values that hold for all of these tests together (Holm 1979): of m, the k-th smallest times
    m − k + 1, at least the one before it and at most 1."""
    order = np.argsort(values, kind="stable")
    steps = np.asarray(values, np.float64)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


@dataclass(frozen=True)
class Reliability:
    """Of the B bins of confidence that hold images: (B,) mean confidence, accuracy, images; and the
    expected calibration error, Σ |accuracy − confidence| · images / N."""

    confidence: Floats
    accuracy: Floats
    images: npt.NDArray[np.int64]
    error: float


def reliability(confidence: npt.ArrayLike, right: npt.ArrayLike) -> Reliability:
    """Bins of equal width (i/15, (i+1)/15] over the probability of the predicted class.

    confidence: (N,) in [0, 1]. right: (N,) whether that class is the true one.
    """
    probability = np.asarray(confidence, np.float64)
    correct = np.asarray(right, np.float64)
    bins = np.clip(np.ceil(probability * BINS).astype(np.int64) - 1, 0, BINS - 1)
    images = np.bincount(bins, minlength=BINS)
    used = images > 0
    counts = images[used]
    means = [np.bincount(bins, x, BINS)[used] / counts for x in (probability, correct)]
    error = float(np.abs(means[1] - means[0]) @ counts / counts.sum())
    return Reliability(means[0], means[1], counts, error)


def confusion(labels: npt.ArrayLike, predicted: npt.ArrayLike, classes: int) -> Floats:
    """(C, C): how many images of the class in the row were taken for that in the column."""
    codes = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(codes, minlength=classes**2).reshape(classes, classes).astype(np.float64)
