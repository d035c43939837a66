"""Small tasks of synthetic features, one shape for all, so that programs are shared."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from clip_adapter.adapters.engine.evaluation import Evaluation, Leaves
from clip_adapter.adapters.engine.training import Run
from clip_adapter.adapters.method import Head, Method, Setting, Task
from clip_adapter.adapters.methods.networks.coop_context import Tower, prepare
from clip_adapter.adapters.registry import METHODS
from clip_adapter.cache.text_tower import TextTowerConfig, array_shapes

CLASSES, DIM, PROMPTS = 4, 16, 3
CLIP_ADAPTER = METHODS["clip-adapter"]

SHORT = {"epochs": 10, "batch_size": 8}
"""Of a run that is judged at its end."""
EACH_EPOCH = SHORT | {"epoch": "best", "evaluate_every": 1}
"""Of a run that is judged after each epoch, and keeps the best."""


def separable_task(
    *,
    shots: int = 5,
    validation: int = 6,
    views: int = 1,
    seed: int = 0,
    noise: float = 1.0,
    data_seed: int = 0,
    empty: tuple[int, ...] = (),
) -> Task:
    """Classes around random centres; the text features are the centres, disturbed.

    empty: classes that have no support images.
    """
    rng = np.random.default_rng(data_seed)
    centres = rng.normal(size=(CLASSES, DIM))

    def images(count: int, views: int, without: tuple[int, ...] = ()) -> tuple[Any, Any]:
        labels = np.repeat([c for c in range(CLASSES) if c not in without], count)
        drawn = centres[labels] + noise * rng.normal(size=(views, len(labels), DIM))
        return 2 * drawn, labels

    features, labels = images(shots, views, empty)
    validation_features, validation_labels = images(validation, 1)
    weights = centres + noise * rng.normal(size=centres.shape)
    text = weights[:, None] + 0.3 * rng.normal(size=(CLASSES, PROMPTS, DIM))
    return Task(
        features=jnp.asarray(features, jnp.float32),
        labels=jnp.asarray(labels, jnp.int32),
        validation_features=jnp.asarray(validation_features[0], jnp.float32),
        validation_labels=jnp.asarray(validation_labels, jnp.int32),
        head=Head(
            weights=jnp.asarray(weights, jnp.float32),
            logit_scale=jnp.float32(20),
            logit_bias=jnp.float32(0.25),
            text=jnp.asarray(text, jnp.float32),
        ),
        seed=jnp.int32(seed),
    )


SECOND_DIM = 5


def with_second(task: Task) -> Task:
    """The task as a cache of two encoders gives it: other features of each image behind its own,
    around other centres and far from 0."""
    rng = np.random.default_rng(11)
    centres = 3 + rng.normal(size=(CLASSES, SECOND_DIM))

    def beside(features: Any, labels: Any) -> jax.Array:
        drawn = centres[np.asarray(labels)] + rng.normal(size=(*features.shape[:-1], SECOND_DIM))
        return jnp.concatenate([features, jnp.asarray(drawn, jnp.float32)], axis=-1)

    return task._replace(
        features=beside(task.features, task.labels),
        validation_features=beside(task.validation_features, task.validation_labels),
        extra={"centre": jnp.full(SECOND_DIM, 3.25, jnp.float32)},
    )


def exact(task: Task) -> Task:
    """The same in NumPy, its numbers in float64."""

    def widened(leaf: object) -> np.ndarray:
        array = np.asarray(leaf)
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    return jax.tree.map(widened, task)


def unit(x: Any) -> np.ndarray:
    """Each row divided by its length, in float64; the zero vector stays what it is."""
    x = np.asarray(x, np.float64)
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(lengths == 0, 1, lengths)


def zero_shot(task: Task, images: Any) -> np.ndarray:
    """The logits of zero-shot CLIP, in float64."""
    head = task.head
    cosines = unit(images) @ unit(head.weights).T
    return float(head.logit_scale) * cosines + float(head.logit_bias)


def needed(method: Method, task: Task) -> Task:
    """The task with what the method needs beyond features, and without what it does not."""
    extra = {}
    for need in method.needs:
        extra |= EXTRAS.get(need, {})
    head = task.head if "text" in method.needs else task.head._replace(text=None)
    return task._replace(head=head, extra=extra)


def small_tower() -> Tower:
    """A random text tower that knows the classes."""
    config = TextTowerConfig(
        width=8,
        heads=2,
        layers=1,
        mlp_width=16,
        context_length=24,
        vocab_size=12,
        embed_dim=DIM,
        activation="gelu",
        epsilon=1e-5,
        pooling="argmax",
        projection="linear",
        start_id=10,
        end_id=11,
        pad_id=0,
        sentences=((1, 9), (2, 9), (3, 4, 9), (5, 9)),
        name_lengths=(1, 1, 2, 1),
        phrases={"a photo of a": (6, 7, 8, 6)},
        weights_sha256="0" * 64,
    )
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in array_shapes(config).items()
    }
    return jax.tree.map(jnp.asarray, prepare(config, arrays))


EXTRAS: dict[str, dict[str, Any]] = {
    "tower": {"tower": small_tower()},
    # As wide as the features, which stand for those before the projection.
    "projection": {
        "projection": jnp.eye(DIM) + 0.1 * jnp.ones((DIM, DIM)),
        "bias": 0.1 * jnp.ones(DIM),
    },
}
"""What methods may need, by the need's name, as entries of a task's `extra`."""


@dataclass
class Notes:
    """A journal in memory; `found` is what a search that was interrupted had found."""

    states: MutableMapping[str, Leaves] = field(default_factory=dict)
    found: list[Evaluation] = field(default_factory=list)

    def known(self, setting: Setting, epochs_run: int) -> Evaluation | None:
        same = (e for e in self.found if (e.setting, e.epochs_run) == (setting, epochs_run))
        return next(same, None)


def setting_of(method: Method = CLIP_ADAPTER, **given: Any) -> dict[str, Any]:
    """The method's one setting with these values and its defaults."""
    values = method.values({name: (value,) for name, value in given.items()}, one=True)
    (setting,) = method.settings(values)
    return setting


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Every program that XLA compiles inside the block."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def start_arrays(method: Method, setting: Setting, task: Task) -> dict[str, np.ndarray]:
    """What a run starts from, of what it trains."""
    trained, _ = jax.jit(lambda task: Run(method, setting, task).start())(task)
    return {name: np.asarray(array) for name, array in trained.items()}


def row_of(arrays: Mapping[str, jax.Array], row: int = 0) -> dict[str, np.ndarray]:
    """One setting's arrays of a chunk's."""
    return {name: np.asarray(array)[row] for name, array in arrays.items()}


def validation_accuracy(logits: np.ndarray, task: Task) -> float:
    return float(np.mean(logits.argmax(axis=1) == np.asarray(task.validation_labels)))


def validation_nll(logits: np.ndarray, task: Task) -> float:
    return tempered_nll(logits, np.asarray(task.validation_labels))


def tempered_nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """The smallest mean negative log-likelihood over temperatures from 1/16 to 16 times the spread
    of the logits, in float64 by SciPy's bounded search."""
    centred = np.asarray(logits, np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    z = centred / np.sqrt(np.mean(centred**2))

    def nll(log_sharpness: float) -> float:
        b = np.exp(log_sharpness) * z
        return float(np.mean(logsumexp(b, axis=1) - b[np.arange(len(labels)), labels]))

    edge = np.log(16)
    return minimize_scalar(nll, bounds=(-edge, edge), method="bounded").fun
