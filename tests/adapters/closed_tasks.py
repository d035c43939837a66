"""Tasks for closed forms, in float64 NumPy, and the same in float32 JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from clip_adapter.adapters.method import Head, Task
from tests.adapters.tasks import tempered_nll

SCALE, BIAS = 20.0, 0.25


def numpy_task(
    *,
    classes: int = 5,
    shots: int = 4,
    dim: int = 12,
    views: int = 1,
    validation: int = 8,
    noise: float = 1.0,
    seed: int = 0,
    empty: tuple[int, ...] = (),
) -> Task:
    """Classes around random centres, for which the classifier weights are disturbed centres.

    Rounded to float32. empty: classes that have no support images.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    support = np.repeat([c for c in range(classes) if c not in empty], shots)
    judged = np.repeat(np.arange(classes), validation)
    features = centres[support] + noise * rng.normal(size=(views, len(support), dim))
    validation_features = centres[judged] + noise * rng.normal(size=(len(judged), dim))
    weights = centres + 1.5 * noise * rng.normal(size=centres.shape)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32).astype(np.float64)

    return Task(
        features=rounded(2 * features),
        labels=support,
        validation_features=rounded(3 * validation_features),
        validation_labels=judged,
        head=Head(rounded(weights), SCALE, BIAS),
        seed=seed,
    )


def on_device(task: Task) -> Task:
    """In float32 and int32, as `fit` makes it from a cache."""

    def placed(leaf: object) -> jax.Array:
        array = np.asarray(leaf)
        return jnp.asarray(array, jnp.float32 if array.dtype.kind == "f" else jnp.int32)

    return jax.tree.map(placed, task)


def rows(x: np.ndarray) -> np.ndarray:
    """Each row divided by its length."""
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(lengths == 0, 1, lengths)


def score(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(accuracy, mean negative log-likelihood at the best temperature)."""
    return float(np.mean(logits.argmax(axis=1) == labels)), tempered_nll(logits, labels)


class NoJournal:
    """Nothing is known; states are kept in memory."""

    def __init__(self) -> None:
        self.states: dict = {}

    def known(self, setting: object, epochs_run: int) -> None:
        return None
