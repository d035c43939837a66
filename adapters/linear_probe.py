"""CLIP's linear probe: multinomial logistic regression on image features.

Radford et al. (arXiv 2103.00020, appendix A.3): the inverse regularisation strength C is chosen on
validation among 97 values from 1e-6 to 1e6, eight per decade, by a coarse grid that is refined
around its peak. They end L-BFGS after 1,000 iterations; here the minimum is certified.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters import classifier
from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.logistic_regression import LogisticRegressionPath, Solution
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

STEPS_PER_DECADE = 8
COARSE_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)

# CLIP's published default where nothing chooses C.
DEFAULT_C = 0.316


class LinearProbe:
    """Logistic regression on view 0 of the image features; the text features take no part."""

    unseen_classes = False

    def search(self, search: Search, engine: Engine) -> Iterator[Evaluation]:
        sweep = Sweep()
        paths = [_path(fold) for fold in search.folds]
        while (exponent := sweep.next()) is not None:
            setting = {"C": 10.0**exponent}
            evaluation = search.known(setting, 0) or self._evaluate(setting, search.folds, paths)
            sweep.scores[exponent] = evaluation.score
            yield evaluation

    def _evaluate(
        self, setting: Setting, folds: Sequence[Task], paths: Sequence[LogisticRegressionPath]
    ) -> Evaluation:
        started = time.perf_counter()
        solutions = [path.solve(setting["C"]) for path in paths]
        fits = [_arrays(solution) for solution in solutions]
        judged = [_judge(*pair) for pair in zip(fits, folds, strict=True)]
        accuracy, nll = pooled(judged, folds).tolist()
        if not all(solution.solved for solution in solutions):
            nll = np.inf  # not to be chosen
        seconds = time.perf_counter() - started
        kept = partial(Arrays, fits[0]) if len(folds) == 1 else None
        return Evaluation(setting, 0, 0, accuracy, nll, seconds, kept)

    def evaluations(self, grid: Grid) -> int:
        return Sweep.LONGEST

    def single(self, grid: Grid) -> Setting:
        return {"C": DEFAULT_C}

    def fit(self, setting: Setting, epoch: int | None, task: Task, engine: Engine) -> Arrays:
        return _arrays(_path(task).solve(setting["C"]))

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


def _path(task: Task) -> LogisticRegressionPath:
    return LogisticRegressionPath(task.features[0], task.labels, len(task.weights))


def _arrays(solution: Solution) -> Arrays:
    return {
        "kernel": solution.kernel.astype(np.float32),
        "bias": solution.bias.astype(np.float32),
    }
