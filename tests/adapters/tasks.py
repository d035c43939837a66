"""Small tasks of synthetic features, one shape for all, so that programs are shared."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clip_adapter.adapters.clip_adapter import Architecture
from clip_adapter.adapters.training import HyperParameters, Schedule, Task, initial_state

CLASSES, DIM = 4, 16

SHORT = Schedule(epochs=10, batch_size=8, evaluate_every=1)


def separable_task(
    *,
    shots: int = 5,
    validation: int = 6,
    views: int = 1,
    seed: int = 0,
    noise: float = 1.0,
    data_seed: int = 0,
) -> Task:
    """Classes around random centres; the text features are the centres, disturbed."""
    rng = np.random.default_rng(data_seed)
    centres = rng.normal(size=(CLASSES, DIM))

    def images(count: int, views: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(CLASSES), count)
        drawn = centres[labels] + noise * rng.normal(size=(views, len(labels), DIM))
        return 2 * drawn, labels

    features, labels = images(shots, views)
    validation_features, validation_labels = images(validation, 1)
    return Task(
        features=jnp.asarray(features, jnp.float32),
        labels=jnp.asarray(labels, jnp.int32),
        validation_features=jnp.asarray(validation_features[0], jnp.float32),
        validation_labels=jnp.asarray(validation_labels, jnp.int32),
        weights=jnp.asarray(centres + noise * rng.normal(size=centres.shape), jnp.float32),
        logit_scale=jnp.float32(20),
        logit_bias=jnp.float32(0.25),
        seed=jnp.int32(seed),
    )


_initial_state = jax.jit(initial_state, static_argnums=(0, 1))


def named(state: nnx.State, row: int | None = None) -> dict[str, np.ndarray]:
    """Arrays by names such as `image/bottleneck/down/kernel`; of one row where they are stacked."""
    flat = {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(state)}
    return {name: np.asarray(v if row is None else v[row]) for name, v in flat.items()}


def start_arrays(
    architecture: Architecture, schedule: Schedule, task: Task, hyper: HyperParameters
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a run starts from: what it trains, and its constants."""
    state = _initial_state(architecture, schedule, task, hyper)
    return named(state.parameters), named(state.constants)
