"""What a method is: a way to turn a support set into a classifier, judged on validation data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.clip_adapter import Branch
from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.training import Schedule, Task

Ratio = float | Literal["learned", "hypernet"]
Setting = dict[str, Any]
"""One point of a grid: hyper-parameters by name, JSON-able."""
Arrays = dict[str, npt.NDArray[Any]]
"""What was fitted: arrays by name."""

# Logits are computed for this many rows at a time, always: how a matrix product is blocked depends
# on its shape, and with it the last bit of the result.
BLOCK = 512


@dataclass(frozen=True)
class Grid:
    """The hyper-parameters to try: tuples make a product, single values hold for all settings.

    alpha, beta: residual ratios of the image and the text adapter; `learned` and `hypernet` start
        from alpha_init and beta_init.
    """

    branch: Branch = "image"
    alpha: tuple[Ratio, ...] = (0.2, 0.4, 0.6, 0.8)
    beta: tuple[Ratio, ...] = (0.2,)
    alpha_init: float = 0.5
    beta_init: float = 0.5
    reduction: tuple[int, ...] = (4,)
    learning_rate: tuple[float, ...] = (1e-3,)
    weight_decay: tuple[float, ...] = (1e-2,)
    schedule: Schedule = Schedule()


@dataclass(frozen=True)
class Evaluation:
    """How a setting did on the validation data.

    epochs: the E epochs after which it was evaluated. history: (E, 2), accuracy in [0, 1] and
    negative log-likelihood, means over the folds. arrays: fetches what was fitted, as it was after
    the best of those epochs; None where there were several folds.
    """

    setting: Setting
    epochs: Sequence[int]
    history: npt.NDArray[np.float32]
    seconds: float
    arrays: Callable[[], Arrays] | None

    @property
    def failed(self) -> bool:
        """Whether training diverged (a negative log-likelihood that is not finite)."""
        return not np.isfinite(self.history[:, 1]).all()

    @property
    def best(self) -> int:
        """Index of the best epoch: highest accuracy, then lowest NLL, then earliest."""
        return max(range(len(self.epochs)), key=lambda index: (*self._score(index), -index))

    @property
    def score(self) -> tuple[float, float]:
        """(accuracy, −NLL) at the best epoch, (−∞, −∞) for a failed setting; larger is better."""
        return (-np.inf, -np.inf) if self.failed else self._score(self.best)

    def _score(self, index: int) -> tuple[float, float]:
        accuracy, nll = self.history[index].tolist()
        return accuracy, -nll


class Method(Protocol):
    """One way to fit. A new method is a new file that implements this, and a line in methods.py."""

    unseen_classes: bool
    """Whether it can classify classes that had no support images."""

    def search(self, grid: Grid, folds: Sequence[Task], engine: Engine) -> Iterator[Evaluation]:
        """Try settings, each on every fold (a support set with its validation set)."""

    def single(self, grid: Grid) -> Setting:
        """The setting to take when there is nothing to choose by."""

    def fit(self, setting: Setting, epoch: int | None, task: Task, engine: Engine) -> Arrays:
        """Fit one setting on the support set, up to `epoch` (None: the end)."""

    def logits(
        self,
        setting: Setting,
        arrays: Mapping[str, npt.NDArray[Any]],
        features: npt.ArrayLike,
        weights: npt.ArrayLike,
        logit_scale: float,
        logit_bias: float,
    ) -> npt.NDArray[np.float32]:
        """(N, C) float32 for features (N, D) and zero-shot classifier weights (C, D)."""

    def describe(
        self,
        setting: Setting,
        arrays: Mapping[str, npt.NDArray[Any]],
        features: npt.ArrayLike,
        weights: npt.ArrayLike,
    ) -> dict[str, float]:
        """Numbers by name that say what was learned, judged on features (N, D)."""


def without_validation(task: Task) -> Task:
    return task._replace(
        validation_features=task.validation_features[:0],
        validation_labels=task.validation_labels[:0],
    )


def blockwise(
    function: Callable[[jax.Array], jax.Array], features: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """function(features), (N, D) → (N, C), in blocks of always the same shape."""
    rows = np.asarray(features, np.float32)
    blocks = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        filled = np.pad(block, ((0, BLOCK - len(block)), (0, 0)))
        blocks.append(np.asarray(function(jnp.asarray(filled)))[: len(block)])
    return np.concatenate(blocks)
