"""From logits to decisions: probabilities that mean something, sets of classes that keep a promise,
and what says that an image shows none of the classes. All by n held-out images, which the fit that
gave their logits z did not see.

    T = argmin_T mean NLL(z / T) + (ln T − ln T₀)² / n                     p = softmax(z / T)
    set = {c : 1 − p_c ≤ q} ∪ {argmax p}
    known = p(Π_k p(v_k)),  p(v) = (1 + #{held-out images whose v is ≤ its own}) / (n + 1)

Temperature scaling (Guo et al., arXiv 1706.04599) has a prior: T₀ is the median of range(z) /
range(zero-shot logits), the range being the largest less the smallest over the classes, which takes
no labels (after SaLS, Murugesan et al., arXiv 2405.00468). q is the ⌈(n + 1)·coverage⌉-th smallest
1 − p_label (LAC: Sadinle et al., arXiv 1609.00451); the most probable class is always there, as an
empty set would only say that q is small. The values v_k are the largest probability and the cosines
to the nearest class mean and to the nearest text; the product of their p (Fisher) is one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import betaincinv

from clip_adapter.adapters.formulas import cross_entropy, log_softmax, sum_by_class, unit

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

COLDEST, HOTTEST = 1e-3, 1e3
STEPS = 40  # of the golden section: ln T to 6e-8
# (n + 1) · share is meant exactly: 0.95 · 20 is 19, also where 0.95 is a little more than that.
EXACT = 1e-9
# Logits that are computed on at a time: in float64 they stay in the processor's cache. Those of
# 20,000 images and 1,000 classes at once were five times 160 MB.
AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Decisions:
    """What n held-out images say of an adapter. Images are classified by logits (N, C) and unlike
    these are encoded as features (N, D), un-normalised.

    temperature: T. folds: into how many the support set was divided to leave images out, 0 where
    it was not. chose: how many of the n images have chosen the setting. scores: (n,) float32,
    1 − p_label. labels: (n,) int32. known: (n, 3) float32, each image's largest probability, and
    its cosines to the nearest class mean and text. prototypes: (C, D) float32, unit means.
    """

    temperature: float
    folds: int
    chose: int
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    known: Float[np.ndarray, "n 3"]
    prototypes: Float[np.ndarray, "C D"]

    @classmethod
    def of(
        cls,
        logits: Float[np.ndarray, "n C"],
        labels: Int[np.ndarray, " n"],
        cosines: Float[np.ndarray, "n 2"],
        prior: float,
        *,
        folds: int,
        chose: int,
        prototypes: Float[np.ndarray, "C D"],
    ) -> Decisions:
        """By the logits of n held-out images. cosines: to the nearest mean of a class, of other
        images than it, and to the nearest text. prior: T₀."""
        temperature = likeliest_temperature(logits, labels, prior)

        def two(logits: Any, labels: Any) -> Any:
            shares = probabilities(logits, temperature)
            label = np.take_along_axis(shares, labels[:, None].astype(np.int64), axis=1)[:, 0]
            return np.column_stack([1 - label, shares.max(axis=1, initial=0)])

        scores, largest = _by_rows(two, logits, labels).T
        known = np.column_stack([largest, cosines]).astype(np.float32)
        own = scores.astype(np.float32), labels.astype(np.int32), known
        return cls(temperature, folds, chose, *own, prototypes)

    @property
    def images(self) -> int:
        """n."""
        return len(self.scores)

    def threshold(self, coverage: float) -> float:
        """q; 1 where n is too small to promise so much."""
        rank = rank_of(self.images, coverage)
        return float(np.sort(self.scores)[rank - 1]) if rank <= self.images else 1.0

    def sets(self, shares: Float[np.ndarray, "N C"], coverage: float) -> Bool[np.ndarray, "N C"]:
        """Which classes are answered, of probabilities at T; the label is among them for `coverage`
        of images like those held out, on average over draws of these. All where n is too small."""
        answered = 1 - shares <= self.threshold(coverage)
        np.put_along_axis(answered, shares.argmax(axis=1)[:, None], True, axis=1)
        return answered

    def known_of(
        self,
        shares: Float[np.ndarray, "N C"],
        features: Float[np.ndarray, "N D"],
        weights: Float[np.ndarray, "C D"],
    ) -> Float[np.ndarray, " N"]:
        """`known`, from 1 / (n + 1) to 1: which share of images like those held out are as strange.

        Below `--reject` an image is taken for one of none of the classes.
        """
        cosines = nearest_cosines(features, self.prototypes, weights)
        values = np.column_stack([shares.max(axis=1), cosines]).astype(np.float32)
        new = _products((1 + _ranks(self.known, values)) / (self.images + 1))
        return (1 + _ranks(self._own_products, new)[:, 0]) / (self.images + 1)

    @cached_property
    def _own_products(self) -> Float[np.ndarray, "n 1"]:
        return _products(_ranks(self.known, self.known) / self.images)


def nearest_cosines(
    features: Float[np.ndarray, "N D"], *directions: Float[np.ndarray, "C D"]
) -> Float[np.ndarray, "N K"]:
    """Cosines of un-normalised features to the nearest row of each of K matrices of unit rows."""
    rows = unit(np, features)
    return np.column_stack([(rows @ unit(np, own).T).max(axis=1) for own in directions])


def _ranks(held_out: Float[np.ndarray, "n K"], values: Float[np.ndarray, "N K"]) -> Any:
    """(N, K): how many of the held-out values of each column are ≤ it."""
    pairs = zip(held_out.T, values.T, strict=True)
    return np.column_stack([np.searchsorted(np.sort(a), b, side="right") for a, b in pairs])


def _products(p: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N 1"]:
    return np.prod(p, axis=1, keepdims=True)


def probabilities(
    logits: Float[np.ndarray, "N C"], temperature: float = 1.0
) -> Float[np.ndarray, "N C"]:
    """softmax(logits / T), float64."""
    return np.exp(log_softmax(np, np.asarray(logits, np.float64) / temperature))


def rank_of(images: int, coverage: float) -> int:
    """⌈(n + 1)·coverage⌉, which of the sorted scores is q; more than n where they are too few."""
    return math.ceil((images + 1) * coverage - EXACT)


def images_for(coverage: float) -> int:
    """How few images can promise a coverage: n of them at most n / (n + 1)."""
    least = max(0, int(coverage / (1 - coverage)) - 2)  # rounding moves the quotient by less
    return next(images for images in count(least) if rank_of(images, coverage) <= images)


def unlucky_coverage(images: int, coverage: float, chance: float = 0.1) -> float:
    """Below it is the coverage one time in ten (`chance`), by the draw of the images: its law is
    Beta(k, n + 1 − k) where none of them chose, k = ⌈(n + 1)·coverage⌉ (Vovk, arXiv 1209.2673).

    Examples:
        >>> from clip_adapter.adapters.decisions import unlucky_coverage
        >>> round(unlucky_coverage(80, 0.95), 3)
        0.918
    """
    rank = rank_of(images, coverage)
    return float(betaincinv(rank, images + 1 - rank, chance))


def spreads(logits: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " N"]:
    """range(z), float64: how far each image's largest logit is above the smallest."""
    return _by_rows(lambda rows: np.ptp(np.asarray(rows, np.float64), axis=1), logits)


def prior_temperature(own: Float[np.ndarray, " N"], zero_shot: Float[np.ndarray, " N"]) -> float:
    """T₀, by which logits spread as far as the zero-shot logits of the same images, by the spreads
    of either; 1 where either spreads not at all."""
    if not len(own) or min(own.min(), zero_shot.min()) <= 0:
        return 1.0
    return float(np.clip(np.median(own / zero_shot), COLDEST, HOTTEST))


def likeliest_temperature(
    logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], prior: float
) -> float:
    """T, between 1e-3 and 1e3, by golden section on ln T; `prior` where there are no images.

    Examples:
        >>> import numpy as np
        >>> from clip_adapter.adapters.decisions import likeliest_temperature
        >>> logits = np.tile([6.0, 0.0], (100, 1))  # sure, and wrong one time in five
        >>> labels = np.repeat([0, 1], [80, 20])
        >>> round(likeliest_temperature(logits, labels, prior=4.0), 2)
        4.32
    """
    if not len(labels):
        return prior

    def loss(x: float) -> float:
        def own(logits: Any, labels: Any) -> Any:
            return cross_entropy(np, np.asarray(logits, np.float64) / math.exp(x), labels)

        losses = _by_rows(own, logits, labels)
        return float(losses.mean()) + (x - math.log(prior)) ** 2 / len(labels)

    return math.exp(_smallest(loss, math.log(COLDEST), math.log(HOTTEST)))


def _by_rows(function: Callable[..., Any], logits: Any, *beside: Any) -> Any:
    """`function` of some rows of the logits (N, C), and of what lies beside them, at a time."""
    step = max(1, AT_ONCE // logits.shape[1])
    starts = range(0, max(1, len(logits)), step)
    rows = (slice(start, start + step) for start in starts)
    return np.concatenate([function(*(own[some] for own in (logits, *beside))) for some in rows])


def _smallest(function: Callable[[float], float], low: float, high: float) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2


def class_means(
    features: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    weights: Float[np.ndarray, "C D"],
) -> Float[np.ndarray, "C D"]:
    """Unit rows: the directions of the classes' mean unit features; of a class without images its
    classifier weights."""
    sums = sum_by_class(np, unit(np, features), labels, len(weights))
    empty = np.bincount(labels, minlength=len(weights)) == 0
    means = np.where(empty[:, None], unit(np, weights), unit(np, sums))
    return np.asarray(means, np.float32)
