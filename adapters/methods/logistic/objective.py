"""The objective of multinomial logistic regression: value, gradient, Hessian and a lower bound.

    f(K, b) = C · Σ_i CE(z_i K + b, y_i) + ½‖K‖²

K and b are kept in one array, the bias as the last row, to which a column of ones belongs.

The bound. Let P hold the probabilities and Y the one-hot labels. For every P whose rows sum to 1
and whose columns sum to the classes' image counts, the dual objective

    C · Σ_i entropy(P_i) − ½‖C · Zᵀ(Y − P)‖²

is at most the minimum of f. The softmax of the logits has such columns, but for rounding, once the
bias is right for the kernel; and (1 − t) P + t Q has them exactly, with a small t and a matrix Q
of constant columns. Zᵀ Q is zero where features are centred, and the entropy of the mixture at
least 1 − t times that of P. What f exceeds this bound by, it exceeds its minimum by at most. With
t = 0 it is ½‖∂f/∂K‖², as for every function that is strongly convex like ½‖K‖².
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

BLOCK = 2**17  # logits held at a time, so that they stay in the processor's cache


class State(NamedTuple):
    """Parameters with f and its gradient there, both (R + 1, C); f − min f is at most `gap`."""

    point: Doubles
    objective: float
    gradient: Doubles
    gap: float


class LogisticObjective:
    """f on one data set, and its Hessian at the point evaluated last.

    rows: (N, R + 1) float64, centred, but for the last column, which holds ones.
    labels: (N,) integers; each of 0 … C − 1 occurs.
    Value, gradient and bound are in float64, the Hessian in float32. The rows are kept as two
    float32 parts whose sum is exact to 2⁻⁴⁸ of a value: the first is what the Hessian needs, and
    both together take no more memory than float64.
    """

    def __init__(self, rows: Doubles, labels: npt.NDArray[np.intp]) -> None:
        self._counts = np.bincount(labels).astype(np.float64)
        classes = len(self._counts)
        self._high = rows.astype(np.float32)
        self._low = np.empty_like(self._high)
        sums = [rows[labels == k, :-1].sum(axis=0) for k in range(classes)]
        self._class_sums = np.stack(sums, axis=1)
        self._probabilities = np.empty((len(labels), classes), np.float32)
        step = max(1, BLOCK // classes)
        blocks = [slice(at, at + step) for at in range(0, len(labels), step)]
        # Rows of a block, and the places of the images' own classes within it.
        self._blocks = [(block, (np.arange(len(labels[block])), labels[block])) for block in blocks]
        for block in blocks:
            self._low[block] = rows[block] - self._high[block]

    def origin(self) -> Doubles:
        """The minimum for C → 0: every image has the classes' frequencies as probabilities."""
        point = np.zeros((self._high.shape[1], len(self._counts)))
        point[-1] = np.log(self._counts / self._counts.sum())
        return point

    def evaluate(self, point: Doubles, c: float) -> State:
        loss, gradient = 0.0, np.zeros_like(point)
        for rows, own in self._blocks:
            exact = self._exact(rows)
            odds = exact @ point
            odds -= odds.max(axis=1, keepdims=True)
            own_logits = odds[own]
            # Less changes nothing, and would be denormal in float32, which is slow.
            np.exp(np.maximum(odds, -60.0, out=odds), out=odds)
            # The others' sum and not 1 − p, which has no digits left where p is nearly 1.
            odds[own] = 0.0
            others, own_odds = odds.sum(axis=1), np.exp(own_logits)
            loss += float((np.log1p(others + np.expm1(own_logits)) - own_logits).sum())
            total = others + own_odds
            odds /= total[:, None]
            self._probabilities[rows] = odds
            self._probabilities[rows][own] = own_odds / total
            odds[own] = -others / total
            gradient += exact.T @ odds
        kernel = point[:-1]
        gradient *= c
        gradient[:-1] += kernel
        objective = c * loss + 0.5 * float(np.vdot(kernel, kernel))
        return State(point, objective, gradient, self._gap(point, objective, gradient, c))

    def _gap(self, point: Doubles, objective: float, gradient: Doubles, c: float) -> float:
        kernel, bias = point[:-1], point[-1]
        dual_kernel = kernel - gradient[:-1]  # C · Zᵀ(Y − P)
        # C · Σ entropy(P_i) = C · Σ CE + C · ⟨Z K + b, Y − P⟩
        entropy = objective + float(
            np.vdot(kernel, dual_kernel - 0.5 * kernel) - bias @ gradient[-1]
        )
        # What the mixture changes in the dual kernel is t times this.
        change = c * self._class_sums - dual_kernel
        t = max(0.0, float((gradient[-1] / self._counts).max()) / c)
        return (
            0.5 * float(np.sum(gradient[:-1] ** 2))
            + float(bias @ gradient[-1])
            + t * (entropy + float(np.vdot(dual_kernel, change)))
            + 0.5 * t**2 * float(np.sum(change**2))
        )

    def times_hessian(self, step: Floats, c: float) -> Floats:
        """H · step, (R + 1, C) both."""
        product = np.zeros_like(step)
        for rows, own in self._blocks:
            probabilities = self._probabilities[rows]
            change = self._high[rows] @ step
            # Relative to the own class, whose probability may be 1 to the last digit.
            change -= change[own][:, None]
            change -= np.einsum("nc,nc->n", probabilities, change)[:, None]
            change *= probabilities
            product += self._high[rows].T @ change
        product *= np.float32(c)
        product[:-1] += step[:-1]
        return product

    def hessian_diagonal(self, c: float) -> Floats:
        """(R + 1, C), positive."""
        diagonal = np.zeros((self._high.shape[1], len(self._counts)), np.float32)
        for rows, own in self._blocks:
            weights = self._probabilities[rows].copy()
            own_probabilities = weights[own]
            weights[own] = 0.0
            others = weights.sum(axis=1)
            weights *= 1 - weights
            weights[own] = own_probabilities * others
            diagonal += (self._high[rows] ** 2).T @ weights
        diagonal *= np.float32(c)
        diagonal[:-1] += 1
        diagonal[-1] += np.float32(1e-30)
        return diagonal

    def bias_step(self, gradient: Doubles, c: float) -> Doubles:
        """Newton's step (R + 1, C) for the bias alone, the kernel being held."""
        hessian = -c * (self._probabilities.T @ self._probabilities).astype(np.float64)
        np.fill_diagonal(hessian, 0.0)
        np.fill_diagonal(hessian, -hessian.sum(axis=1))
        root = np.sqrt(np.maximum(hessian.diagonal(), 1e-30))
        # Singular: the same shift of all classes changes nothing.
        inverse = np.linalg.pinv(hessian / np.outer(root, root), rcond=1e-7, hermitian=True)
        step = np.zeros_like(gradient)
        step[-1] = -(inverse @ (gradient[-1] / root)) / root
        return step

    def lowest_logit(self, point: Doubles) -> float:
        """Over all images and classes."""
        return float(min((self._exact(rows) @ point).min() for rows, _ in self._blocks))

    def _exact(self, rows: slice) -> Doubles:
        exact = self._high[rows].astype(np.float64)
        exact += self._low[rows]
        return exact
