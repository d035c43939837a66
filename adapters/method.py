"""What a method is: a way to turn a support set into a classifier, judged on validation data."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.clip_adapter import Branch
from clip_adapter.adapters.engine import Engine, Leaves
from clip_adapter.adapters.training import Schedule, Task

Ratio = float | Literal["learned", "hypernet"]
Setting = dict[str, Any]
"""One point of a grid: hyper-parameters by name, JSON-able."""
Arrays = dict[str, npt.NDArray[Any]]
"""What was fitted: arrays by name."""

# Logits are computed for this many rows at a time, always: how a matrix product is blocked depends
# on its shape, and with it the last bit of the result.
BLOCK = 512

DEFAULTS = MappingProxyType(
    {"alpha": 0.2, "beta": 0.2, "reduction": 4, "learning_rate": 1e-3, "weight_decay": 1e-2}
)


@dataclass(frozen=True)
class Grid:
    """The hyper-parameters to try: tuples make a product, single values hold for all settings.

    alpha, beta: residual ratios of the image and the text adapter; `learned` and `hypernet` start
        from alpha_init and beta_init. halving: successive halving instead of every setting to the
        end. defaults: values by name to take, where they are among those to try, when nothing
        chooses.
    """

    branch: Branch = "image"
    alpha: tuple[Ratio, ...] = (0.2, 0.4, 0.6, 0.8)
    beta: tuple[Ratio, ...] = (0.2,)
    alpha_init: float = 0.5
    beta_init: float = 0.5
    reduction: tuple[int, ...] = (4,)
    learning_rate: tuple[float, ...] = (1e-3,)
    weight_decay: tuple[float, ...] = (1e-2,)
    schedule: Schedule = field(default_factory=Schedule)
    halving: bool = False
    defaults: Mapping[str, float] = field(default_factory=lambda: DEFAULTS)


@dataclass(frozen=True)
class Evaluation:
    """How a setting did on the validation data.

    epochs_run: how long it was trained. epoch: the best of its evaluated epochs: highest accuracy,
    then lowest negative log-likelihood, then earliest. accuracy in [0, 1] and nll: at that epoch,
    over the images of all folds; an nll that is not finite marks a setting that diverged.
    arrays: fetches what was fitted, as it was at `epoch`; None where that was not kept.
    """

    setting: Setting
    epochs_run: int
    epoch: int
    accuracy: float
    nll: float
    seconds: float
    arrays: Callable[[], Arrays] | None = None

    @property
    def failed(self) -> bool:
        return not np.isfinite(self.nll)

    @property
    def score(self) -> tuple[float, float]:
        """(accuracy, −NLL), (−∞, −∞) for a setting that diverged; larger is better."""
        return (-np.inf, -np.inf) if self.failed else (self.accuracy, -self.nll)


Known = Callable[[Setting, int], Evaluation | None]
"""What an interrupted run found already for a setting after so many epochs."""


@dataclass(frozen=True)
class Search:
    """What a method searches: a grid, judged on folds (support sets with validation sets).

    known: evaluations that need not be repeated. states: a place for the states of runs that may
    go on, by name.
    """

    grid: Grid
    folds: Sequence[Task]
    known: Known = lambda setting, epochs_run: None
    states: MutableMapping[str, Leaves] = field(default_factory=dict)


class Method(Protocol):
    """One way to fit. A new method is a new file that implements this, and a line in methods.py.

    The command line and saved adapters work without JAX, so they name it too: MethodName in
    pipelines/fit.py, its hyper-parameters in pipelines/run_folder.py, and its arrays in
    pipelines/adapter_layout.py.
    """

    unseen_classes: bool
    """Whether it can classify classes that had no support images."""

    def search(self, search: Search, engine: Engine) -> Iterator[Evaluation]:
        """Try settings, each on every fold. Those that ran to the end may be chosen."""

    def evaluations(self, grid: Grid) -> int:
        """How many evaluations `search` makes."""

    def single(self, grid: Grid) -> Setting:
        """The setting to take when there is nothing to choose by."""

    def fit(self, setting: Setting, epoch: int | None, task: Task, engine: Engine) -> Arrays:
        """Fit one setting on the support set, up to `epoch` (None: the end).

        On the task it was judged on, this gives the arrays that the search had.
        """

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


def pooled(judged: Sequence[npt.ArrayLike], folds: Sequence[Task]) -> npt.NDArray[np.float64]:
    """Accuracy and mean negative log-likelihood over the validation images of all folds.

    judged: (…, 2) per fold, accuracy in [0, 1] and mean negative log-likelihood. Returns (…, 2);
    the images that are right are counted, so that equal accuracies are equal numbers.
    """
    sizes = np.array([len(fold.validation_labels) for fold in folds])
    accuracy, nll = np.moveaxis(np.asarray(judged, np.float64), (0, -1), (-1, 0))
    right = np.rint(accuracy * sizes).sum(axis=-1)
    return np.stack([right, (nll * sizes).sum(axis=-1)], axis=-1) / sizes.sum()


def blockwise(
    function: Callable[[jax.Array], jax.Array], features: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """function(features), (N, D) → (N, C), in blocks of always the same shape.

    In full float32, also where matrix products would be rounded to fewer bits by default (GPU).
    """
    rows = np.asarray(features, np.float32)
    blocks = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        filled = np.pad(block, ((0, BLOCK - len(block)), (0, 0)))
        with jax.default_matmul_precision("float32"):
            blocks.append(np.asarray(function(jnp.asarray(filled)))[: len(block)])
    return np.concatenate(blocks)
