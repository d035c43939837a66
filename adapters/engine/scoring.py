"""How well logits do: accuracy, and likelihood at their own best temperature.

A likelihood compares two classifiers only where both are calibrated: one whose logits are ten times
too large, or too small (ProKeR's are cosines), is no worse a classifier for it. So each is judged
at the temperature at which it does best on the rows it is judged on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.engine.process import own_jax
from clip_adapter.adapters.formulas import cross_entropy
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Arrays, Classify, Head, Method, Setting, Task

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

# So many validation rows are scored at once inside a compiled program, more in blocks of so many:
# 20 points of Tip-Adapter at 1,000 classes then fit side by side.
AT_ONCE = 2048
VALIDATION_ROWS = 512
# About so many rows tell the best temperature.
SHARPNESS_ROWS = 1024
# Logits are computed for this many rows at a time, always: how a matrix product is blocked depends
# on its shape, and with it the last bit of the result.
BLOCK = 512
# The largest sharpness of logits of spread 1; and how often the slope is evaluated: over tasks of
# 24 to 400 rows the likelihood was then within 0.02 % of the best.
SHARPEST = 16.0
SLOPES = 6


class Scored(NamedTuple):
    """How logits do on M rows.

    score: the means of the next two: accuracy in [0, 1], and negative log-likelihood. right: the
    rows whose largest logit is the label's. losses: each row's negative log-likelihood at the
    temperature that is best for all.
    """

    score: Float[Array, "score=2"]
    right: Bool[Array, " M"]
    losses: Float[Array, " M"]


def score(
    logits: Float[Array, "M C"],
    labels: Int[Array, " M"],
    weights: Float[Array, " M"] | None = None,
) -> Scored:
    """How these logits do. weights: how much each row counts; None for all alike."""
    losses = cross_entropy(jnp, best_sharpness(logits, labels, weights) * logits, labels)
    return _scored(is_right(logits, labels), losses, weights)


def _scored(
    right: Bool[Array, " M"], losses: Float[Array, " M"], weights: Float[Array, " M"] | None
) -> Scored:
    both = jnp.stack([right.astype(losses.dtype), losses])
    return Scored(jnp.average(both, axis=1, weights=weights), right, losses)


def best_sharpness(
    logits: Float[Array, "M C"],
    labels: Int[Array, " M"],
    weights: Float[Array, " M"] | None = None,
) -> Float[Array, ""]:
    """b = 1/T that minimises the mean negative log-likelihood of softmax(b · logits), over rows of
    these weights.

    That is convex in b. Its slope, mean(E[z] − z_label) under the softmax, is −mean(z_label) at 0
    for centred z, and has its zero found by false position over log b, where an end that stays
    counts with half its slope. b lies between 1/16 and 16 over the spread of the logits (the root
    mean square of their deviations from each row's mean), so that it is the same at any scale of
    the logits, and finite where every row is right.
    """
    # Rows lie class by class: every so many of them stand for all.
    every = -(-len(labels) // SHARPNESS_ROWS)
    logits, labels = logits[::every], labels[::every]
    mean = partial(jnp.average, weights=None if weights is None else weights[::every])
    z = logits - jnp.max(logits, axis=1, keepdims=True)
    squares = (z - jnp.mean(z, axis=1, keepdims=True)) ** 2
    spread = jnp.sqrt(jnp.mean(squares) if weights is None else mean(jnp.mean(squares, axis=1)))
    spread = jnp.where(spread == 0, 1, spread)
    z = z / spread
    own = mean(jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0])

    def closer(_: Any, found: tuple[Array, ...]) -> tuple[Array, ...]:
        low, slope_low, high, slope_high, b = found
        p = jnp.exp(b * z)
        slope = mean(jnp.sum(p * z, axis=1) / jnp.sum(p, axis=1)) - own
        flat = slope < 0
        low, high = jnp.where(flat, b, low), jnp.where(flat, high, b)
        slope_low = jnp.where(flat, slope, slope_low / 2)
        slope_high = jnp.where(flat, slope_high / 2, slope)
        between = jnp.log(low) * slope_high - jnp.log(high) * slope_low
        b = jnp.exp(between / (slope_high - slope_low))
        # As long as no slope is known above, three times as sharp.
        b = jnp.where(jnp.isfinite(slope_high), b, 3 * low)
        return low, slope_low, high, slope_high, jnp.clip(b, low, high)

    least, most = jnp.float32(1 / SHARPEST), jnp.float32(SHARPEST)
    at_0 = mean(jnp.mean(z, axis=1)) - own
    # The spread is 1: were the logits Gaussian around their classes, this would be the answer.
    first = jnp.clip(-at_0, least, most)
    start = (least, jnp.minimum(at_0, -1e-6), most, jnp.float32(jnp.inf), first)
    return jax.lax.fori_loop(0, SLOPES, closer, start)[-1] / spread


def is_right(logits: Float[Array, "N C"], labels: Int[Array, " N"]) -> Bool[Array, " N"]:
    """Whether the first of a row's largest logits is the label's; not where one is NaN."""
    # As argmax(logits) == labels, which XLA does not vectorise on a CPU: it took more than half of
    # a search of Tip-Adapter at C = 100.
    largest = jnp.max(logits, axis=1, keepdims=True)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    before = jnp.arange(logits.shape[1])[None] < labels[:, None]
    return (own >= largest)[:, 0] & ~jnp.any((logits >= largest) & before, axis=1)


def validation_score(classify: Classify, task: Task, at_once: int = AT_ONCE) -> Scored:
    """How a classifier does on the task's validation data, of which there has to be some.

    at_once: the most rows that are not scored block by block.
    """
    features, labels = task.validation_features, task.validation_labels
    count = len(labels)
    if count <= at_once:
        return score(classify(features), labels, task.validation_weights)
    blocks = -(-count // VALIDATION_ROWS)
    some = slice(None, None, -(-count // SHARPNESS_ROWS))
    weights = task.validation_weights
    sharpness = best_sharpness(
        classify(features[some]), labels[some], None if weights is None else weights[some]
    )

    def cut(array: Array) -> Array:
        missing = blocks * VALIDATION_ROWS - count
        padded = jnp.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1)))
        return padded.reshape(blocks, VALIDATION_ROWS, *array.shape[1:])

    def each(block: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = classify(block[0])
        return is_right(logits, block[1]), cross_entropy(jnp, sharpness * logits, block[1])

    judged = jax.lax.map(each, (cut(features), cut(labels)))
    right, losses = (rows.ravel()[:count] for rows in judged)
    return _scored(right, losses, task.validation_weights)


def balanced(folds: Sequence[Task]) -> list[Task]:
    """The same tasks with validation weights by which each class counts alike: accuracies are then
    means of the recalls of the classes that are there."""
    labels = [np.asarray(fold.validation_labels) for fold in folds]
    counts = np.bincount(np.concatenate(labels))
    each = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    pairs = zip(folds, labels, strict=True)
    return [f._replace(validation_weights=jnp.asarray(each[own], jnp.float32)) for f, own in pairs]


def pooled(judged: Sequence[npt.ArrayLike], folds: Sequence[Task]) -> npt.NDArray[np.float64]:
    """Accuracy and mean negative log-likelihood over the validation images of all folds.

    judged: (…, 2) per fold, accuracy in [0, 1] and mean negative log-likelihood. Returns (…, 2).
    Equal accuracies are equal numbers: images that are right are counted; weighted ones are rounded
    to a millionth of an image.
    """
    weights = [fold.validation_weights for fold in folds]
    counted = all(own is None for own in weights)
    masses = np.array(
        [
            len(fold.validation_labels) if own is None else np.asarray(own, np.float64).sum()
            for fold, own in zip(folds, weights, strict=True)
        ]
    )
    accuracy, nll = np.moveaxis(np.asarray(judged, np.float64), (0, -1), (-1, 0))
    right = np.round(accuracy * masses, 0 if counted else 6).sum(axis=-1)
    return np.stack([right, (nll * masses).sum(axis=-1)], axis=-1) / masses.sum()


def make_classify(
    method: Method, setting: Setting, arrays: Arrays, head: Head
) -> Callable[[npt.ArrayLike], npt.NDArray[np.float32]]:
    """(N, D) features → (N, C) float32 logits on the host, in blocks of always the same shape.

    In full float32, also where matrix products would be rounded to fewer bits by default (GPU).
    """
    static, numbers = method.split(setting)
    program = _logits_program(method, tuple(static.items()))
    with own_jax():
        values = {n: np.float32(v) for n, v in numbers.items()}
        placed = jax.device_put((dict(arrays), values, head))

    def classify(features: npt.ArrayLike) -> npt.NDArray[np.float32]:
        rows = np.asarray(features, np.float32)
        logits = np.empty((len(rows), len(head.weights)), np.float32)
        with own_jax(), jax.default_matmul_precision("float32"):
            for start in range(0, len(rows), BLOCK):
                block = rows[start : start + BLOCK]
                filled = jnp.asarray(np.pad(block, ((0, BLOCK - len(block)), (0, 0))))
                logits[start : start + BLOCK] = np.asarray(program(*placed, filled))[: len(block)]
        return logits

    return classify


@lru_cache(maxsize=1024)
def _logits_program(method: Method, static: tuple[tuple[str, Value], ...]) -> Callable[..., Array]:
    return jax.jit(
        lambda arrays, numbers, head, features: method.logits(
            jnp, arrays, {**dict(static), **numbers}, features, head
        )
    )
