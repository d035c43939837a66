"""How well logits do: accuracy and negative log-likelihood, over any number of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.classifier import cross_entropy
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.jax_process import own_jax
from clip_adapter.adapters.method import Arrays, Classify, Head, Method, Setting, Task

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

# Validation rows that are scored at a time inside a compiled program.
VALIDATION_ROWS = 2048
# Logits are computed for this many rows at a time, always: how a matrix product is blocked depends
# on its shape, and with it the last bit of the result.
BLOCK = 512


class Scored(NamedTuple):
    """How logits do on M rows.

    score: accuracy in [0, 1] and mean negative log-likelihood. right: the rows whose largest logit
    is the label's.
    """

    score: Float[Array, "score=2"]
    right: Bool[Array, " M"]


def score(logits: Float[Array, "M C"], labels: Int[Array, " M"]) -> Scored:
    """How these logits do."""
    right = is_right(logits, labels)
    losses = cross_entropy(jnp, logits, labels)
    return Scored(jnp.stack([jnp.mean(right.astype(losses.dtype)), jnp.mean(losses)]), right)


def is_right(logits: Float[Array, "N C"], labels: Int[Array, " N"]) -> Bool[Array, " N"]:
    """Whether the first of a row's largest logits is the label's; not where one is NaN."""
    # As argmax(logits) == labels, which XLA does not vectorise on a CPU: it took more than half of
    # a search of Tip-Adapter at C = 100.
    largest = jnp.max(logits, axis=1, keepdims=True)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    before = jnp.arange(logits.shape[1])[None] < labels[:, None]
    return (own >= largest)[:, 0] & ~jnp.any((logits >= largest) & before, axis=1)


def validation_score(classify: Classify, task: Task) -> Scored:
    """How a classifier does on the task's validation data, of which there has to be some."""
    features, labels = task.validation_features, task.validation_labels
    count = len(labels)
    if count <= VALIDATION_ROWS:
        return score(classify(features), labels)
    blocks = -(-count // VALIDATION_ROWS)

    def cut(array: Array) -> Array:
        missing = blocks * VALIDATION_ROWS - count
        padded = jnp.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1)))
        return padded.reshape(blocks, VALIDATION_ROWS, *array.shape[1:])

    def rows(block: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = classify(block[0])
        return cross_entropy(jnp, logits, block[1]), is_right(logits, block[1])

    losses, right = (a.ravel()[:count] for a in jax.lax.map(rows, (cut(features), cut(labels))))
    return Scored(jnp.stack([jnp.mean(right.astype(losses.dtype)), jnp.mean(losses)]), right)


def pooled(judged: Sequence[npt.ArrayLike], folds: Sequence[Task]) -> npt.NDArray[np.float64]:
    """Accuracy and mean negative log-likelihood over the validation images of all folds.

    judged: (…, 2) per fold, accuracy in [0, 1] and mean negative log-likelihood. Returns (…, 2);
    the images that are right are counted, so that equal accuracies are equal numbers.
    """
    sizes = np.array([len(fold.validation_labels) for fold in folds])
    accuracy, nll = np.moveaxis(np.asarray(judged, np.float64), (0, -1), (-1, 0))
    right = np.rint(accuracy * sizes).sum(axis=-1)
    return np.stack([right, (nll * sizes).sum(axis=-1)], axis=-1) / sizes.sum()


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
