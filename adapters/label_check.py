"""What all other images say of each image's label: Gaussian discriminant analysis (gda.py) without
that image.

    z_c = zero-shot logit + α g_c,   g_c = x·P μ_c − ½ μ_c·P μ_c,   P = D (S + t I)⁻¹

S (D, D) is the scatter of the N unit rows about their classes' means μ, t = tr S / (N − 1). Without
image x of a class of n images, with d = x − μ_y and c = n / (n − 1),

    μ_y ← μ_y − d / (n − 1),   S ← S − c d dᵀ,   t ← (tr S − c ‖d‖²) / (N − 2)

so that the eigenvectors of S serve every image, and the inverse of each is had from them in D C
multiplications (Sherman and Morrison). By these exact ones α and the temperature T are the
likeliest, without folds. Labels are then judged with the image left out of its class's mean alone:
P of all images, with its own among them, says less of one that is unlike all others, and of planted
wrong labels more are found among the first (docs/decisions.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_adapter.adapters.decisions import (
    likeliest_temperature,
    prior_temperature,
    probabilities,
    spreads,
)
from clip_adapter.adapters.formulas import cosine_logits, cross_entropy, sum_by_class, unit
from clip_adapter.adapters.method import Head, Task
from clip_adapter.adapters.methods.gda import GDA, NO_SPREAD
from clip_adapter.adapters.neighbours import blocks

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FEWEST = 3  # images: of two nothing is left to know a spread by
JUDGES = 8192  # images that α and T are the likeliest of


@dataclass(frozen=True)
class Gaussians:
    """Classes as Gaussians of one covariance, from N images; float64.

    counts: (C,) images. values (D,), vectors (D, D): of S. means: (C, D), μ in the basis of the
    vectors.
    """

    counts: Int[np.ndarray, " C"]
    means: Float[np.ndarray, "C D"]
    values: Float[np.ndarray, " D"]
    vectors: Float[np.ndarray, "D D"]

    @classmethod
    def of(
        cls, features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"], classes: int
    ) -> Gaussians:
        """Of un-normalised features, in N D² + D³ operations. Raises ValueError for fewer than
        three images."""
        if len(labels) < FEWEST:
            raise ValueError(f"{len(labels)} images are too few to leave one out")
        counts, dim = np.bincount(labels, minlength=classes), features.shape[1]
        means, scatter = np.zeros((classes, dim)), np.zeros((dim, dim))
        every = list(blocks(len(features), dim))
        for block in every:
            means += sum_by_class(np, _rows(features[block]), labels[block], classes)
        means /= np.maximum(counts, 1)[:, None]
        for block in every:
            away = _rows(features[block]) - means[labels[block]]
            scatter += away.T @ away
        values, vectors = np.linalg.eigh(scatter)
        return cls(counts, means @ vectors, np.maximum(values, 0), vectors)

    def left_out(
        self,
        features: Float[np.ndarray, "M D"],
        labels: Int[np.ndarray, " M"],
        *,
        spread_of_all: bool = False,
    ) -> Float[np.ndarray, "M C"]:
        """g of M of the N images, each without itself; −∞ for classes without images.

        Of the only image of a class it says nothing that can be used. spread_of_all: S of all
        images, so that each is left out of its class's mean alone.
        """
        rows, total = _rows(features) @ self.vectors, self.counts.sum()
        left = np.maximum(self.counts[labels] - 1, 1)[:, None]
        away = rows - self.means[labels]
        change: Any = np.where(self.counts[labels] > 1, self.counts[labels], 0)[:, None] / left
        if spread_of_all:
            change = np.zeros_like(change)
        kept = total - 1 - (not spread_of_all)
        ridge = (self.values.sum() - change * _dots(away, away)) / kept
        flat = ridge <= NO_SPREAD
        inverse = 1 / (self.values + np.where(flat, 1, ridge))
        turned = inverse * away
        rise = change / (1 - change * _dots(away, turned))
        along, of_means = _dots(rows, turned), turned @ self.means.T
        found = (inverse * rows) @ self.means.T + rise * along * of_means
        found -= (inverse @ (self.means**2).T + rise * of_means**2) / 2
        mean = self.means[labels] - away / left
        of_mean = _dots(mean, turned)
        own = _dots(inverse * mean, rows - mean / 2) + rise * of_mean * (along - of_mean / 2)
        np.put_along_axis(found, labels[:, None].astype(np.int64), own, axis=1)
        found = np.where(flat, 0, rows.shape[1] * found)
        found[:, self.counts == 0] = -np.inf
        return found


def judged(
    features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"], head: Head
) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """By all other images: p of each image's label, which other class is the likeliest, and its p.

    The images whose max_{c≠y} p_c − p_y is largest are those to look at first.
    """
    classes = len(head.weights)
    gaussians = Gaussians.of(features, labels, classes)
    some = slice(None, None, -(-len(labels) // JUDGES))
    alpha, temperature = likeliest(gaussians, features[some], labels[some], head)
    own, likelier, share = (np.empty(len(labels), kind) for kind in (float, np.int64, float))
    for block in blocks(len(labels), features.shape[1] + classes):
        found = gaussians.left_out(features[block], labels[block], spread_of_all=True)
        logits = cosine_logits(np, features[block], head) + alpha * found
        shares = probabilities(logits, temperature)
        column = labels[block][:, None].astype(np.int64)
        own[block] = np.take_along_axis(shares, column, axis=1)[:, 0]
        np.put_along_axis(shares, column, -1, axis=1)
        likelier[block] = shares.argmax(axis=1)
        share[block] = shares.max(axis=1)
    return own, likelier, share


def likeliest(
    gaussians: Gaussians,
    features: Float[np.ndarray, "M D"],
    labels: Int[np.ndarray, " M"],
    head: Head,
) -> tuple[float, float]:
    """α, of those that gda tries, and T, by M of the images, each left out exactly."""
    shown = gaussians.counts > 0
    places = (np.cumsum(shown) - 1)[labels]
    zero_shot = cosine_logits(np, features, head)[:, shown].astype(np.float64)
    found = np.concatenate(
        [
            gaussians.left_out(features[block], labels[block])[:, shown]
            for block in blocks(len(labels), sum(head.weights.shape))
        ]
    )
    losses = []
    for alpha in GDA.hyper["alpha"].tried:
        logits = zero_shot + float(alpha) * found
        prior = prior_temperature(spreads(logits), spreads(zero_shot))
        temperature = likeliest_temperature(logits, places, prior)
        loss = float(cross_entropy(np, logits / temperature, places).mean())
        losses.append((loss, float(alpha), temperature))
    return min(losses)[1:]


def accuracy_of(
    train: tuple[Float[np.ndarray, "N D"], Int[np.ndarray, " N"]],
    test: tuple[Float[np.ndarray, "M D"], Int[np.ndarray, " M"]],
    head: Head,
) -> Float[np.ndarray, " M"]:
    """Which of the test images gda, fitted on the training images by its default, gets right."""
    task, setting = _task(*train, head), GDA.defaults()
    arrays = GDA.fit(np, task, setting)
    return np.asarray(GDA.logits(np, arrays, setting, test[0], head)).argmax(axis=1) == test[1]


def _rows(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    return unit(np, features.astype(np.float64))


def _dots(one: Float[np.ndarray, "N D"], other: Float[np.ndarray, "N D"]) -> Any:
    return np.sum(one * other, axis=1, keepdims=True)


def _task(features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"], head: Head) -> Task:
    none = np.zeros(0, np.int32)
    return Task(features[None], labels, features[:0], none, head, np.int32(0))
