"""The engine behind `fit`, given arrays instead of a cache."""

from collections.abc import MutableMapping

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.engine.evaluation import Evaluation, Leaves
from clip_adapter.adapters.method import Head, Setting, Task


class KeepsNothing:
    """The journal of a search that nobody goes on with."""

    def __init__(self) -> None:
        self.states: MutableMapping[str, Leaves] = {}

    def known(self, setting: Setting, epochs_run: int) -> Evaluation | None:
        return None


def task_of(
    support: tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]],
    validation: tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]],
    weights: npt.NDArray[np.float32],
    logit_scale: float,
    seed: int = 0,
) -> Task:
    """On the device. support, validation: features (N, D) and labels (N,); weights: (C, D)."""
    task = Task(
        features=support[0][None],
        labels=support[1],
        validation_features=validation[0],
        validation_labels=validation[1],
        head=Head(weights, np.float32(logit_scale), np.float32(0)),
        seed=np.int32(seed),
    )
    return jax.tree.map(jnp.asarray, task)
