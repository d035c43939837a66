"""Searches of the closed forms in PyTorch, NumPy and SciPy: as the official code loops, and better.

Each returns the highest validation accuracy of the grid. Where a loop's outer axis would take
minutes it may be cut: what one value takes does not depend on the others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch.nn.functional import normalize, one_hot

Grid = dict[str, Sequence[float]]


@dataclass(frozen=True)
class Rows:
    """Unit features of support and validation images, their labels (support one-hot), and unit
    classifier weights."""

    support: torch.Tensor
    own: torch.Tensor
    validation: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    scale: float

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        labels: np.ndarray,
        validation: np.ndarray,
        validation_labels: np.ndarray,
        weights: np.ndarray,
        scale: float,
    ) -> "Rows":
        own = one_hot(torch.from_numpy(labels).long(), len(weights)).float()
        return cls(
            normalize(torch.from_numpy(features)),
            own,
            normalize(torch.from_numpy(validation)),
            torch.from_numpy(validation_labels).long(),
            torch.from_numpy(weights),
            scale,
        )


def accuracy(logits: torch.Tensor, rows: Rows) -> float:
    return (logits.argmax(1) == rows.labels).float().mean().item()


def tip_in_loops(rows: Rows, grid: Grid) -> float:
    """The affinities anew for each point, as in the official code."""

    def points() -> Iterable[float]:
        for beta in grid["beta"]:
            for alpha in grid["alpha"]:
                affinity = rows.validation @ rows.support.T
                cache = (-beta * (1 - affinity)).exp() @ rows.own
                clip = rows.scale * rows.validation @ rows.weights.T
                yield accuracy(clip + alpha * cache, rows)

    return max(points())


def tip_hoisted(rows: Rows, grid: Grid) -> float:
    """What does not depend on a number is taken out of its loop."""
    affinity = rows.validation @ rows.support.T
    clip = rows.scale * rows.validation @ rows.weights.T
    best = 0.0
    for beta in grid["beta"]:
        cache = (-beta * (1 - affinity)).exp() @ rows.own
        best = max(best, *(accuracy(clip + alpha * cache, rows) for alpha in grid["alpha"]))
    return best


def gda_with(rows: Rows, grid: Grid, inverse: str) -> float:
    """The D × D precision by the pseudo-inverse that the official code takes, or by another."""
    count, dim = rows.support.shape
    means = (rows.own.T @ rows.support) / rows.own.sum(0)[:, None]
    centred = rows.support - rows.own @ means
    covariance = centred.T @ centred / (count - 1)
    shrunk = (count - 1) * covariance + covariance.trace() * torch.eye(dim)
    if inverse == "torch pinv":
        precision = torch.linalg.pinv(shrunk)
    elif inverse == "torch pinv, Hermitian":
        precision = torch.linalg.pinv(shrunk, hermitian=True)
    else:
        precision = torch.from_numpy(scipy.linalg.pinvh(shrunk.numpy()))
    kernel = dim * precision @ means.T
    bias = -(means.T * kernel).sum(0) / 2
    clip = rows.scale * rows.validation @ rows.weights.T
    gaussian = rows.validation @ kernel + bias
    return max(accuracy(clip + alpha * gaussian, rows) for alpha in grid["alpha"])


def proker_with(rows: Rows, grid: Grid, solve: str) -> float:
    """A linear system for each point, as in the official code, or one eigendecomposition a β."""
    residual = rows.own - rows.support @ rows.weights.T
    clip = rows.validation @ rows.weights.T
    best = 0.0
    for beta in grid["beta"]:
        support = (-beta * (1 - rows.support @ rows.support.T)).exp()
        kernel = (-beta * (1 - rows.validation @ rows.support.T)).exp()
        if solve == "torch eigh":
            values, vectors = torch.linalg.eigh(support)
            seen, right = kernel @ vectors, vectors.T @ residual
        for ridge in grid["ridge"]:
            if solve == "torch eigh":
                found = clip + seen @ (right / (values / ridge + 1)[:, None])
            elif solve == "torch solve":
                system = support / ridge + torch.eye(len(support))
                found = clip + kernel @ torch.linalg.solve(system, residual)
            else:
                system = support.numpy() / ridge + np.eye(len(support), dtype=np.float32)
                found = clip + kernel @ torch.from_numpy(np.linalg.solve(system, residual.numpy()))
            best = max(best, accuracy(found, rows))
    return best
