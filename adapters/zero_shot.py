"""Zero-shot CLIP: the classifier weights as they are."""

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.classifier import accuracy, cosine_logits, cross_entropy
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

_cosine_logits = jax.jit(cosine_logits)


class ZeroShot:
    """Nothing is fitted and nothing is chosen."""

    unseen_classes = True

    def search(self, search: Search, engine: Engine) -> Iterator[Evaluation]:
        started = time.perf_counter()
        scores = []
        for fold in search.folds:
            features = fold.validation_features
            logits = _cosine_logits(features, fold.weights, fold.logit_scale, fold.logit_bias)
            losses = cross_entropy(logits, fold.validation_labels)
            right = accuracy(logits, fold.validation_labels)
            scores.append([float(right), float(losses.mean())])
        pooled_accuracy, nll = pooled(scores, search.folds).tolist()
        yield Evaluation({}, 0, 0, pooled_accuracy, nll, time.perf_counter() - started, dict)

    def evaluations(self, grid: Grid) -> int:
        return 1

    def single(self, grid: Grid) -> Setting:
        return {}

    def fit(self, setting: Setting, epoch: int | None, task: Task, engine: Engine) -> Arrays:
        return {}

    def logits(
        self,
        setting: Setting,
        arrays: Mapping[str, npt.NDArray[Any]],
        features: npt.ArrayLike,
        weights: npt.ArrayLike,
        logit_scale: float,
        logit_bias: float,
    ) -> npt.NDArray[np.float32]:
        classify = partial(
            _cosine_logits, weights=weights, logit_scale=logit_scale, logit_bias=logit_bias
        )
        return blockwise(classify, features)

    def describe(
        self,
        setting: Setting,
        arrays: Mapping[str, npt.NDArray[Any]],
        features: npt.ArrayLike,
        weights: npt.ArrayLike,
    ) -> dict[str, float]:
        return {}
