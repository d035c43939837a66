"""What all other images say of each image's label: Gaussian discriminant analysis (gda.py) without
that image, exactly.

    z_c = zero-shot logit + α (x·P μ_c − ½ μ_c·P μ_c − log C),   P = D (S + t I)⁻¹

S (D, D) is the scatter of the N unit rows about their classes' means μ, t = tr S / (N − 1). Without
image x of a class of n images, with d = x − μ_y and c = n / (n − 1),

    μ_y ← μ_y − d / (n − 1),   S ← S − c d dᵀ,   t ← (tr S − c ‖d‖²) / (N − 2)

so that the eigenvectors of S serve every image, and the inverse of each is had from them in D C
multiplications (Sherman and Morrison). α is the method's default, T the likeliest one over all
images: each was left out by what speaks of it, so that nothing needs folds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clip_adapter.adapters.decisions import (
    likeliest_temperature,
    prior_temperature,
    probabilities,
)
from clip_adapter.adapters.formulas import cosine_logits, sum_by_class, unit
from clip_adapter.adapters.method import Head, Task
from clip_adapter.adapters.methods.gda import GDA, NO_SPREAD, by_shots
from clip_adapter.adapters.neighbours import blocks

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FEWEST = 3  # images: of two nothing is left to know a spread by
JUDGES = 8192  # images that T is the likeliest of


def left_out_logits(
    features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"], head: Head
) -> Float[np.ndarray, "N C"]:
    """z, float32, of un-normalised features; −∞ for classes without images.

    Of the only image of a class it says nothing that can be used. Raises ValueError for fewer than
    three images. Time is 3 N D C + N D² + D³; float64 takes memory for a block of rows at a time.
    """
    if len(labels) < FEWEST:
        raise ValueError(f"{len(labels)} images are too few to leave one out")
    classes, (count, dim) = len(head.weights), features.shape
    counts = np.bincount(labels, minlength=classes)
    means, scatter = _moments(features, labels, counts)
    values, vectors = np.linalg.eigh(scatter)
    values, trace = np.maximum(values, 0), np.trace(scatter)
    means = means @ vectors
    squares = means * means
    weight = by_shots(_task(features, labels, head))
    logits = np.empty((count, classes), np.float32)
    for block in blocks(count, dim + classes):
        own = labels[block]
        rows = unit(np, features[block].astype(np.float64)) @ vectors
        left = counts[own] - 1
        change = np.where(left > 0, counts[own] / np.maximum(left, 1), 0)[:, None]
        away = rows - means[own]
        ridge = (trace - change * np.sum(away * away, axis=1, keepdims=True)) / (count - 2)
        flat = ridge <= NO_SPREAD
        inverse = 1 / (values + np.where(flat, 1, ridge))
        turned = inverse * away
        rise = change / (1 - change * np.sum(away * turned, axis=1, keepdims=True))
        along, of_means = np.sum(rows * turned, axis=1, keepdims=True), turned @ means.T
        gaussian = (inverse * rows) @ means.T + rise * along * of_means
        gaussian -= (inverse @ squares.T + rise * of_means**2) / 2
        mean = means[own] - away / np.maximum(left, 1)[:, None]
        of_mean = np.sum(mean * turned, axis=1, keepdims=True)
        product = np.sum(inverse * mean * (rows - mean / 2), axis=1, keepdims=True)
        product += rise * of_mean * (along - of_mean / 2)
        np.put_along_axis(gaussian, own[:, None].astype(np.int64), product, axis=1)
        zero_shot = cosine_logits(np, features[block], head)
        gaussian = np.where(flat, 0, dim * gaussian) - np.log(classes)
        logits[block] = zero_shot + weight * gaussian
    logits[:, counts == 0] = -np.inf
    return logits


def judged(
    features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"], head: Head
) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """By all other images: p of each image's label, which other class is the likeliest, and its p.

    The images whose max_{c≠y} p_c − p_y is largest are those to look at first.
    """
    logits = left_out_logits(features, labels, head)
    some = slice(None, None, -(-len(labels) // JUDGES))
    shown = logits[some][:, np.isfinite(logits[0])]
    prior = prior_temperature(shown, cosine_logits(np, features[some], head))
    places = np.searchsorted(np.unique(labels), labels[some])
    temperature = likeliest_temperature(shown, places, prior)
    own, likelier, share = (np.empty(len(labels), kind) for kind in (float, np.int64, float))
    for block in blocks(*logits.shape):
        shares = probabilities(logits[block], temperature)
        column = labels[block][:, None].astype(np.int64)
        own[block] = np.take_along_axis(shares, column, axis=1)[:, 0]
        np.put_along_axis(shares, column, -1, axis=1)
        likelier[block] = shares.argmax(axis=1)
        share[block] = shares.max(axis=1)
    return own, likelier, share


def accuracy_of(
    train: tuple[Float[np.ndarray, "N D"], Int[np.ndarray, " N"]],
    test: tuple[Float[np.ndarray, "M D"], Int[np.ndarray, " M"]],
    head: Head,
) -> Float[np.ndarray, " M"]:
    """Which of the test images gda, fitted on the training images by its default, gets right."""
    task, setting = _task(*train, head), GDA.defaults()
    arrays = GDA.fit(np, task, setting)
    return np.asarray(GDA.logits(np, arrays, setting, test[0], head)).argmax(axis=1) == test[1]


def _moments(
    features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"], counts: Int[np.ndarray, " C"]
) -> tuple[Float[np.ndarray, "C D"], Float[np.ndarray, "D D"]]:
    """Class means of the unit rows, and the scatter about them, in float64."""
    dim = features.shape[1]
    means, scatter = np.zeros((len(counts), dim)), np.zeros((dim, dim))
    every = list(blocks(len(features), dim))
    for block in every:
        rows = unit(np, features[block].astype(np.float64))
        means += sum_by_class(np, rows, labels[block], len(counts))
    means /= np.maximum(counts, 1)[:, None]
    for block in every:
        away = unit(np, features[block].astype(np.float64)) - means[labels[block]]
        scatter += away.T @ away
    return means, scatter


def _task(features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"], head: Head) -> Task:
    none = np.zeros(0, np.int32)
    return Task(features[None], labels, features[:0], none, head, np.int32(0))
