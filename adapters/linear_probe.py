"""CLIP's linear probe: multinomial logistic regression on image features.

Radford et al. (arXiv 2103.00020, appendix A.3): L-BFGS with at most 1,000 iterations, the inverse
regularisation strength C chosen on validation among 97 values from 1e-6 to 1e6, eight per decade,
by a coarse grid that is refined around its peak.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from clip_adapter.adapters import classifier
from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.method import (
    Arrays,
    Evaluation,
    Grid,
    Search,
    Setting,
    blockwise,
    pooled,
)
from clip_adapter.adapters.training import Task

MAX_ITERATIONS = 1000
# Of the objective below. Few-shot features are separable, and there the mean loss at the minimum
# shrinks as C grows: 1e-6 ended 37 % above the minimum at C = 1e4, this ends within 0.01 %.
GRADIENT_TOLERANCE = 1e-8
STEPS_PER_DECADE = 8
COARSE_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)

# CLIP's published default where nothing chooses C.
DEFAULT_C = 0.316


class LinearProbe:
    """Logistic regression on view 0 of the image features; the text features take no part."""

    unseen_classes = False

    def search(self, search: Search, engine: Engine) -> Iterator[Evaluation]:
        sweep = Sweep()
        while (exponent := sweep.next()) is not None:
            setting = {"C": 10.0**exponent}
            evaluation = search.known(setting, 0) or self._evaluate(setting, search.folds, engine)
            sweep.scores[exponent] = evaluation.score
            yield evaluation

    def _evaluate(self, setting: Setting, folds: Sequence[Task], engine: Engine) -> Evaluation:
        started = time.perf_counter()
        fits = [self.fit(setting, None, fold, engine) for fold in folds]
        judged = [_judge(*pair) for pair in zip(fits, folds, strict=True)]
        accuracy, nll = pooled(judged, folds).tolist()
        seconds = time.perf_counter() - started
        kept = partial(Arrays, fits[0]) if len(folds) == 1 else None
        return Evaluation(setting, 0, 0, accuracy, nll, seconds, kept)

    def evaluations(self, grid: Grid) -> int:
        return Sweep.LONGEST

    def single(self, grid: Grid) -> Setting:
        return {"C": DEFAULT_C}

    def fit(self, setting: Setting, epoch: int | None, task: Task, engine: Engine) -> Arrays:
        return fit_linear_probe(task.features[0], task.labels, len(task.weights), setting["C"])

    def logits(
        self,
        setting: Setting,
        arrays: Mapping[str, npt.NDArray[Any]],
        features: npt.ArrayLike,
        weights: npt.ArrayLike,
        logit_scale: float,
        logit_bias: float,
    ) -> npt.NDArray[np.float32]:
        return blockwise(partial(_probe_logits, arrays["kernel"], arrays["bias"]), features)

    def describe(
        self,
        setting: Setting,
        arrays: Mapping[str, npt.NDArray[Any]],
        features: npt.ArrayLike,
        weights: npt.ArrayLike,
    ) -> dict[str, float]:
        return {}


class Sweep:
    """CLIP's search for C on a logarithmic scale.

    A grid of seven exponents two decades apart, then around the best so far both neighbours at half
    the distance, down to eight steps per decade. `scores` maps the exponents tried to their scores
    (larger is better); ties go to the smaller exponent, the stronger regularisation.
    """

    # Every halving of the distance tries both neighbours, unless the best lies at an end.
    LONGEST = len(COARSE_EXPONENTS) + 2 * int(np.log2(2 * STEPS_PER_DECADE))

    def __init__(self) -> None:
        self.scores: dict[float, tuple[float, float]] = {}
        self._waiting = list(COARSE_EXPONENTS)
        self._distance = COARSE_EXPONENTS[1] - COARSE_EXPONENTS[0]

    def next(self) -> float | None:
        """The exponent to try next, None at the end."""
        while not self._waiting:
            self._distance /= 2
            if self._distance < 1 / STEPS_PER_DECADE:
                return None
            centre = max(self.scores, key=lambda exponent: (self.scores[exponent], -exponent))
            for exponent in (centre - self._distance, centre + self._distance):
                if COARSE_EXPONENTS[0] <= exponent <= COARSE_EXPONENTS[-1]:
                    self._waiting.append(exponent)
        return self._waiting.pop(0)


def _judge(arrays: Arrays, fold: Task) -> list[float]:
    classify = partial(_probe_logits, arrays["kernel"], arrays["bias"])
    logits = jnp.asarray(blockwise(classify, fold.validation_features))
    nll = classifier.cross_entropy(logits, fold.validation_labels).mean()
    return [float(classifier.accuracy(logits, fold.validation_labels)), float(nll)]


@jax.jit
def _probe_logits(kernel: jax.Array, bias: jax.Array, features: jax.Array) -> jax.Array:
    """f K + b: (N, D) → (N, C)."""
    return features @ kernel + bias


def fit_linear_probe(
    features: npt.ArrayLike, labels: npt.ArrayLike, classes: int, c: float
) -> Arrays:
    """Minimise C · Σ_i CE(f_i K + b, y_i) + ½‖K‖², the objective of scikit-learn's
    LogisticRegression, in float64.

    Features are scaled to mean norm 1 (and C with them, which leaves the minimum where it is), so
    that one gradient tolerance fits encoders of any output scale.

    features: (N, D). labels: (N,) integers. c: C > 0.
    Returns kernel (D, classes) and bias (classes,), float32, for un-scaled features.
    """
    rows = np.asarray(features, np.float64)
    scale = np.mean(np.linalg.norm(rows, axis=1))
    dim = rows.shape[1]
    with jax.enable_x64(True):
        data = (jnp.asarray(rows / scale), jnp.asarray(labels), jnp.float64(c * scale**2))

        def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
            value, gradient = _value_and_gradient(jnp.asarray(flat), *data, classes=classes)
            return float(value), np.asarray(gradient)

        solution = minimize(
            objective,
            np.zeros((dim + 1) * classes),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS, "gtol": GRADIENT_TOLERANCE, "ftol": 1e-15},
        )
    solved = solution.x.reshape(dim + 1, classes)
    return {
        "kernel": (solved[:-1] / scale).astype(np.float32),
        "bias": solved[-1].astype(np.float32),
    }


@partial(jax.jit, static_argnames="classes")
@jax.value_and_grad
def _value_and_gradient(
    flat: jax.Array, features: jax.Array, labels: jax.Array, c: jax.Array, *, classes: int
) -> jax.Array:
    """The objective divided by C·N, so that its gradient is of order one whatever C and N are."""
    kernel, bias = jnp.split(flat.reshape(-1, classes), [features.shape[1]])
    losses = classifier.cross_entropy(features @ kernel + bias, labels)
    return jnp.mean(losses) + jnp.sum(kernel * kernel) / (2 * c * len(labels))
