"""Multinomial logistic regression with an L2 penalty, along C, each solution with a certificate.

    minimise f(K, b) = C · Σ_i CE(x_i K + b, y_i) + ½‖K‖²

is the objective of scikit-learn's LogisticRegression; the bias is not penalised. How it is solved:

- The bias absorbs a shift of the features and C their scale, and the minimum lies in the span of
  the images. So features are centred, scaled to mean norm 1 and rotated into their principal axes
  once, at most min(N − 1, D) of them, which leaves the minimum where it is.
- Newton's method, each step by conjugate gradients preconditioned with the Hessian's diagonal.
  Products with the Hessian, which only propose a step, are in float32; what decides is in float64.
- Once the kernel is good enough the bias is refined alone, with its whole Hessian: the certificate
  depends on it much more than the objective does.
- A ladder of values of C is climbed, and every other value starts from the line, in log C, through
  the rungs next to it. So a solution depends on the data and on C, not on what was solved before.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from clip_adapter.adapters.engine.process import one_blas_thread
from clip_adapter.adapters.methods.logistic.objective import (
    Doubles,
    Floats,
    LogisticObjective,
    State,
)

TOLERANCE = 1e-6
"""How much of ½‖K‖², and so of the objective, the gap to its minimum may be. Where C is small the
objective alone would say nothing: there K = 0 is within 1e-6 of the minimum, too."""
ROUNDING = 1e-14
"""How much of the objective is not asked about, as float64 would not tell."""

MAX_NEWTON_STEPS = 50
MAX_PRODUCTS = 200  # with the Hessian, for one step
LADDER = tuple(10.0**exponent for exponent in (-6, -4, -2, 0, 2, 4, 6))
ROTATED_AT_ONCE = 1024  # rows
# Below all other logits, for a class without images: its bias would be −∞ at the minimum.
ABSENT = 40.0


@dataclass(frozen=True)
class Solution:
    """kernel: (D, classes) and bias: (classes,), float64, for features as they were given.

    objective: f. relative_gap: (f − min f) / f is at most this. solved: whether it is certified
    that relative_gap ≤ 1e-6 and, as f grows by ½‖ΔK‖² at least, that the kernel is within 0.1 % of
    the minimum's, ‖K − K*‖ ≤ 1e-3 ‖K‖ (or what is missing is rounding, 1e-14 f). newton_steps: how
    many it took.
    """

    kernel: Doubles
    bias: Doubles
    objective: float
    relative_gap: float
    solved: bool
    newton_steps: int


class Minimum(NamedTuple):
    """What Newton's method ends at: the parameters (R + 1, C) on rotated and scaled features, the
    objective, what it exceeds its minimum by at most, whether that is little enough, and steps."""

    point: Doubles
    objective: float
    gap: float
    solved: bool
    steps: int


class LogisticRegressionPath:
    """The minima for one data set, one value of C at a time.

    features: (N, D), finite. labels: (N,) integers in [0, classes). A class may have no images: it
    gets the kernel 0 and a bias with which it is not predicted.
    One BLAS thread is used: matrices of this size gain little from more, and lose much on busy
    cores.
    """

    def __init__(self, features: npt.ArrayLike, labels: npt.ArrayLike, classes: int) -> None:
        features = np.asarray(features)
        padded = np.ones((features.shape[0], features.shape[1] + 1))
        rows = padded[:, :-1]
        rows[:] = features
        self._classes = classes
        self._present, own = np.unique(np.asarray(labels), return_inverse=True)
        self._scale = float(np.linalg.norm(rows, axis=1).mean()) or 1.0
        self._mean = rows.mean(axis=0)
        rows -= self._mean
        rows /= self._scale
        self._libraries = ThreadpoolController()
        with one_blas_thread(self._libraries):
            rotated, self._axes = _principal_axes(padded)
        self._objective = LogisticObjective(rotated, own)
        self._rungs: list[Minimum] = []

    def solve(self, c: float) -> Solution:
        """The minimum for c > 0. Look at `solved` before using it."""
        with one_blas_thread(self._libraries):
            for rung in LADDER[len(self._rungs) : _rungs_up_to(c)]:
                self._rungs.append(self._newton(rung))
            found = self._rungs[LADDER.index(c)] if c in LADDER else self._newton(c)
            return self._solution(found)

    def _start(self, c: float) -> Doubles:
        """On the line, in log C, through the rungs around c; above all of them, the last two."""
        points = [rung.point for rung in self._rungs[: _rungs_up_to(c)]]
        if len(points) < 2:
            return points[0] if points else self._objective.origin()
        low, high = LADDER[len(points) - 2 : len(points)]
        share = np.log(c / low) / np.log(high / low)
        return (1 - share) * points[-2] + share * points[-1]

    def _newton(self, c: float) -> Minimum:
        c_scaled = c * self._scale**2
        state, steps = self._objective.evaluate(self._start(c), c_scaled), 0
        while state.gap > _allowed(state) and steps < MAX_NEWTON_STEPS:
            reached = self._line_search(state, self._step(state, c_scaled), c_scaled)
            if reached is None:
                break
            state, steps = reached, steps + 1
        solved = state.gap <= _allowed(state)
        return Minimum(state.point, state.objective, state.gap, solved, steps)

    def _step(self, state: State, c: float) -> Doubles:
        """Newton's, or the bias's alone when that is what is left."""
        allowed = _allowed(state)
        kernel_gap = 0.5 * float(np.sum(state.gradient[:-1] ** 2))
        if kernel_gap <= allowed / 2:
            return self._objective.bias_step(state.gradient, c)
        # Ever more exact on the way, so that Newton's method converges fast at the end, but not
        # more exact than the tolerance needs.
        precise = min(0.1, np.sqrt(TOLERANCE * kernel_gap / allowed))
        enough = min(0.3, np.sqrt(0.1 * allowed / kernel_gap))
        return self._conjugate_gradients(state.gradient, c, max(precise, enough))

    def _conjugate_gradients(self, gradient: Doubles, c: float, precision: float) -> Doubles:
        """−H⁻¹ gradient, until the residual's norm under the preconditioner is `precision` of the
        gradient's."""
        norm = np.linalg.norm(gradient)
        residual = (-gradient / norm).astype(np.float32)
        step = np.zeros_like(residual)
        diagonal = self._objective.hessian_diagonal(c)
        direction = residual / diagonal
        first = left = _dot(residual, direction)
        for _ in range(MAX_PRODUCTS):
            product = self._objective.times_hessian(direction, c)
            curvature = _dot(direction, product)
            if curvature <= 0:  # by rounding
                break
            length = np.float32(left / curvature)
            step += length * direction
            residual -= length * product
            scaled = residual / diagonal
            before, left = left, _dot(residual, scaled)
            if left <= precision**2 * first:
                break
            direction = scaled + np.float32(left / before) * direction
        return norm * step.astype(np.float64)

    def _line_search(self, state: State, step: Doubles, c: float) -> State | None:
        slope = float(np.vdot(state.gradient, step))
        length = 1.0
        while length > 1e-6:
            reached = self._objective.evaluate(state.point + length * step, c)
            # The last steps gain less than what f is rounded by.
            if reached.objective <= state.objective * (1 + 1e-13) + 1e-4 * length * slope:
                return reached
            length /= 2
        return None

    def _solution(self, found: Minimum) -> Solution:
        kernel = np.zeros((len(self._mean), self._classes))
        kernel[:, self._present] = self._axes @ found.point[:-1] / self._scale
        bias = np.zeros(self._classes)
        bias[self._present] = found.point[-1]
        if len(self._present) < self._classes:
            absent = np.setdiff1d(np.arange(self._classes), self._present)
            bias[absent] = self._objective.lowest_logit(found.point) - ABSENT
        bias -= self._mean @ kernel
        gap = max(0.0, found.gap) / found.objective if found.objective else 0.0
        objective = found.objective / self._scale**2
        return Solution(kernel, bias, objective, gap, found.solved, found.steps)


def _allowed(state: State) -> float:
    half_square = 0.5 * float(np.sum(state.point[:-1] ** 2))
    return max(TOLERANCE * half_square, ROUNDING * state.objective)


def _dot(one: Floats, other: Floats) -> float:
    return float(np.vdot(one, other))


def _rungs_up_to(c: float) -> int:
    """How many values of the ladder there are up to the first that is not below c."""
    return min(bisect_left(LADDER, c) + 1, len(LADDER))


def _principal_axes(padded: Doubles) -> tuple[Doubles, Doubles]:
    """rows (N, R + 1) and orthonormal axes (D, R) such that centred = rows[:, :R] · axesᵀ, R the
    rank; the last column holds ones, for the bias.

    padded: (N, D + 1), the centred rows and one column more; where N > D, `rows` takes its place
    (16 images of 1,000 classes are 131 MB).
    """
    centred = padded[:, :-1]
    count, dim = centred.shape
    wide = count <= dim
    squares, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    kept = squares > squares[-1] * max(count, dim) * np.finfo(np.float64).eps
    vectors, rank = vectors[:, kept], int(kept.sum())
    if wide:
        lengths = np.sqrt(squares[kept])
        rows = np.ones((count, rank + 1))
        np.multiply(vectors, lengths, out=rows[:, :-1])
        return rows, centred.T @ (vectors / lengths)
    for first in range(0, count, ROTATED_AT_ONCE):
        block = slice(first, first + ROTATED_AT_ONCE)
        padded[block, :rank] = centred[block] @ vectors
    padded[:, rank] = 1
    return padded[:, : rank + 1], vectors
