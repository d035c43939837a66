"""StatA (Zanella et al., arXiv 2501.03729): any classifier, refined by images without labels.

    ℓ_ik = −½ Σ_d ((q_id − μ_kd)² / v_kd + log v_kd)
    z_i = softmax(log ŷ_i + ℓ_i / 50 + Σ_j (N + Nᵀ)_ij z_j / 6)

q_i are the images' unit features, ŷ_i the classifier's probabilities, N_ij the cosine of q_i and
q_j where j is one of the 3 nearest others of i, else 0. Each class is a Gaussian that is held to
its text: n_k images are likeliest of class k, and

    β_k = n_k / (α + n_k)        μ_k = unit(β_k · unit(Σ_i z_ik q_i) + (1 − β_k) t_k)
    v_k = β_k · Σ_i z_ik (q_i − μ_k)² / Σ_i z_ik + (1 − β_k)(v⁰ + (t_k − μ_k)²)

with v⁰ the variance of all images about the texts, by ŷ. z starts at ŷ, μ at t, v at v⁰; z is
computed 5 times, then μ and v, and so on 11 times over, of which the last one ends with z. With z
the images are classified together (transductive); with μ and v alone new ones are, one by one:

    logits = log softmax(logits of the classifier / T) + ℓ / 50                      (inductive)

A class that none of the images shows keeps its text, while the others move to where the images are,
which lie far from any text: it then draws no image, and where few classes are shown the classifier
may be much worse than before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from clip_adapter.adapters.formulas import log_softmax, unit
from clip_adapter.adapters.method import Array
from clip_adapter.adapters.neighbours import blocks, nearest

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Rows = Float[np.ndarray, "M D"]
    Shares = Float[np.ndarray, "M C"]

NEIGHBOURS = 3
OUTER, INNER = 11, 5
ALPHA = 1.0
SOFTENED = 50.0  # what ℓ is divided by
FEWEST = 2  # images: one has no neighbour
FLOOR = 1e-12  # of variances, and of what is divided by


class Refinement(NamedTuple):
    """What makes a classifier a refined one. temperature: T, by which its logits are divided."""

    means: Float[Array, "C D"]
    variances: Float[Array, "C D"]
    temperature: Float[Array, ""]


def log_density(xp: Any, rows: Rows, means: Any, variances: Any) -> Any:
    """ℓ (N, C) of unit rows (N, D), but for a constant; computed about the mean of the means, as
    variances are small beside the squares of what images have in common."""
    middle = xp.sum(means, axis=0, keepdims=True) / len(means)
    rows, means, sharp = rows - middle, means - middle, 1 / variances
    own = xp.sum(means * means * sharp + xp.log(variances), axis=1)
    return rows @ (means * sharp).T - ((rows * rows) @ sharp.T + own) / 2


def refined_logits(xp: Any, refinement: Refinement, logits: Any, features: Any) -> Any:
    """(N, C) of new images, one by one: logits (N, C) of the classifier that was refined, and
    un-normalised image features (N, D); what stands behind, of another encoder, does not count."""
    means, variances, temperature = refinement
    rows = unit(xp, features[:, : means.shape[1]])
    density = log_density(xp, rows, means, variances)
    return log_softmax(xp, logits / temperature) + density / SOFTENED


def temperature_of(logits: Shares, known: Shares) -> float:
    """By which logits are divided to be as far apart as those `known` to be of a calibrated scale:
    where no labels say what is the likeliest. Both are (M, C)."""
    spreads = [np.std(own - own.mean(axis=1, keepdims=True)) for own in (logits, known)]
    return float(spreads[0] / spreads[1]) if min(spreads) > 0 else 1.0


def refine(
    features: Rows,
    logits: Shares,
    texts: Float[np.ndarray, "C D"],
    temperature: float = 1.0,
    near: csr_array | None = None,
) -> tuple[Shares, Refinement]:
    """z (M, C), rows of shares, for M images together, and what refines the classifier for others.

    features: un-normalised, two or more. logits: by the classifier. texts: unit rows. near: their
    `neighbours`, where those are known. Computes in the floating-point type of the features. Time
    M² D + 11 M C D; memory is a few times what features and logits take.

    Examples:
        >>> import numpy as np
        >>> from clip_adapter.adapters.stata import refine
        >>> texts = np.eye(2)
        >>> images = np.repeat(np.array([[1.0, 0.4], [0.2, 1.0]]), 4, axis=0)
        >>> shares, _ = refine(images, 2 * images @ texts.T, texts)
        >>> shares.argmax(axis=1).tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
    """
    rows = unit(np, features)
    texts = unit(np, texts).astype(rows.dtype)
    known = log_softmax(np, logits.astype(rows.dtype) / rows.dtype.type(temperature))
    near = neighbours(features) if near is None else near
    shares = np.exp(known)
    spread = _scatter(rows, shares, texts).sum(axis=0) / len(rows)
    means = texts
    variances = np.broadcast_to(np.maximum(spread, FLOOR), texts.shape)
    for outer in range(OUTER):
        fixed = known.copy()
        for block in blocks(len(rows), max(rows.shape[1], len(texts))):
            fixed[block] += log_density(np, rows[block], means, variances) / SOFTENED
        for _ in range(INNER):
            shares = np.exp(log_softmax(np, fixed + near @ shares))
        if outer + 1 < OUTER:
            means, variances = _moments(rows, shares, texts, spread)
    return shares, Refinement(means, variances, rows.dtype.type(temperature))


def neighbours(features: Rows) -> csr_array:
    """(N + Nᵀ) / 6, (M, M)."""
    near, cosines = nearest(features, NEIGHBOURS)
    rows, count = near.shape
    starts = np.arange(0, near.size + 1, count)
    own = csr_array((cosines.ravel(), near.ravel(), starts), shape=(rows, rows))
    return csr_array((own + own.T) * cosines.dtype.type(0.5 / count))


def classes_found(shares: Shares) -> Int[np.ndarray, " K"]:
    """The classes that are the likeliest one of some image."""
    return np.unique(shares.argmax(axis=1))


def _moments(rows: Rows, shares: Shares, texts: Any, spread: Any) -> tuple[Any, Any]:
    """μ and v, both (C, D)."""
    counts = np.bincount(shares.argmax(axis=1), minlength=len(texts))[:, None]
    beta = (counts / (ALPHA + counts)).astype(rows.dtype)
    means = unit(np, beta * unit(np, shares.T @ rows) + (1 - beta) * texts)
    mass = np.maximum(shares.sum(axis=0)[:, None], FLOOR)
    own = _scatter(rows, shares, means) / mass
    variances = beta * own + (1 - beta) * (spread + (texts - means) ** 2)
    return means, np.maximum(variances, FLOOR)


def _scatter(rows: Rows, shares: Shares, means: Any) -> Any:
    """(C, D): Σ_i z_ik (q_id − μ_kd)², about the means' middle as in `log_density`."""
    middle = means.mean(axis=0)
    means = means - middle
    sums = shares.sum(axis=0)[:, None] * means**2
    for block in blocks(len(rows), rows.shape[1]):
        here, own = rows[block] - middle, shares[block].T
        sums += own @ here**2 - 2 * means * (own @ here)
    return sums
