"""Train and judge what protocol.py compares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ours import KeepsNothing
from protocol_sets import DataSet

from clip_adapter.adapters.clip_adapter import CLIP_ADAPTER
from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.evaluation import Evaluation
from clip_adapter.adapters.method import Arrays, Setting, Task
from clip_adapter.adapters.recipe import evaluated_epochs
from clip_adapter.adapters.scoring import make_classify
from clip_adapter.adapters.search import search

ALPHAS = (0.2, 0.4, 0.6, 0.8)
STARTS = (0.2, 0.8)
RATIO_RATES = (0.01, 0.05, 0.1, 0.2)
GRID = {
    "alpha": ALPHAS,
    "learning_rate": (3e-4, 1e-3, 3e-3, 1e-2),
    "weight_decay": (0.0, 1e-2, 1e-1),
}
SEEDS_OF_SLOW_PARTS = 2


@dataclass(frozen=True)
class Asked:
    """The tasks, and where the search by halving is compared with the full one."""

    shots: Sequence[int] = (1, 2, 4, 8, 16)
    seeds: Sequence[int] = (1, 2, 3, 4)
    epochs: int = 200
    searched_shots: Sequence[int] = (4, 16)


@dataclass(frozen=True)
class Outcome:
    """How a classifier did: accuracies in percent, nll on validation."""

    val: float
    nll: float
    test: float


@dataclass(frozen=True)
class Run:
    """One training at a fixed α: after its last epoch, and after the best on validation."""

    alpha: float
    last: Outcome
    best: Outcome


@dataclass(frozen=True)
class Learned:
    """One training of a learned α. ratio: what it ended at."""

    start: float
    rate: float
    ratio: float
    last: Outcome


@dataclass(frozen=True)
class Searched:
    """What the full grid and halving chose."""

    full: Outcome
    halving: Outcome
    same: bool


@dataclass(frozen=True)
class Measured:
    """A task. learned, searched: measured for some tasks."""

    dataset: str
    shots: int
    seed: int
    fixed: Sequence[Run]
    learned: Sequence[Learned] = ()
    searched: Searched | None = None


def measure(data: DataSet, asked: Asked) -> Iterator[Measured]:
    """Every task of a data set."""
    engine = Engine()
    for shots in asked.shots:
        for number, seed in enumerate(asked.seeds):
            task = data.task(shots, seed)
            parts: dict[str, Any] = {}
            if number < SEEDS_OF_SLOW_PARTS:
                parts["learned"] = learned_runs(engine, data, task, asked.epochs)
                if shots in asked.searched_shots:
                    parts["searched"] = searched(engine, data, task, asked.epochs)
            fixed = fixed_runs(engine, data, task, asked.epochs)
            yield Measured(data.name, shots, seed, fixed, **parts)


def fixed_runs(engine: Engine, data: DataSet, task: Task, epochs: int) -> list[Run]:
    """Validation is watched on the way, which changes nothing of the training."""
    values = CLIP_ADAPTER.values({"alpha": ALPHAS, "epochs": (epochs,), "epoch": ("best",)})
    found = []
    for setting, state in trained(engine, task, CLIP_ADAPTER.settings(values)):
        history = np.asarray(state["history"])[: len(evaluated_epochs(setting))]
        best = history[int(state["best_evaluation"])]
        last = outcome(data, setting, state["trained"], task, history[-1])
        found.append(Run(setting["alpha"], last, outcome(data, setting, state["best"], task, best)))
    return found


def learned_runs(engine: Engine, data: DataSet, task: Task, epochs: int) -> list[Learned]:
    settings = [
        setting
        for start in STARTS
        for rate in RATIO_RATES
        for setting in CLIP_ADAPTER.settings(
            CLIP_ADAPTER.values(
                {
                    "alpha": ("learned",),
                    "alpha_init": (start,),
                    "ratio_learning_rate": (rate,),
                    "epochs": (epochs,),
                }
            )
        )
    ]
    found = []
    for setting, state in trained(engine, task, settings):
        logit = float(state["trained"]["image/ratio/logit"])
        found.append(
            Learned(
                setting["alpha_init"],
                setting["ratio_learning_rate"],
                1 / (1 + np.exp(-logit)),
                outcome(data, setting, state["trained"], task, np.asarray(state["history"])[0]),
            )
        )
    return found


def searched(engine: Engine, data: DataSet, task: Task, epochs: int) -> Searched:
    values = CLIP_ADAPTER.values({**GRID, "epochs": (epochs,)})

    def chosen(halving: bool) -> Evaluation:
        """As `fit` chooses: of the settings that ran to the end the best on validation."""
        found = search(CLIP_ADAPTER, values, [task], engine, KeepsNothing(), halving=halving)
        return max(found, key=lambda evaluation: (evaluation.epochs_run, evaluation.score))

    def judged(evaluation: Evaluation) -> Outcome:
        assert evaluation.arrays is not None
        score = np.array([evaluation.accuracy, evaluation.nll])
        return outcome(data, evaluation.setting, evaluation.arrays(), task, score)

    full, halving = chosen(False), chosen(True)
    return Searched(judged(full), judged(halving), full.setting == halving.setting)


def trained(
    engine: Engine, task: Task, settings: Sequence[Setting]
) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Settings that share a program, each with its state at the end."""
    static = CLIP_ADAPTER.split(settings[0])[0]
    numbers = [CLIP_ADAPTER.split(setting)[1] for setting in settings]
    for chunk in engine.run(CLIP_ADAPTER, static, task, numbers):
        for row, index in enumerate(chunk.indices):
            state = chunk.state
            yield (
                settings[index],
                {
                    "trained": {name: np.asarray(a)[row] for name, a in state.trained.items()},
                    "best": {name: np.asarray(a)[row] for name, a in state.best.items()},
                    "best_evaluation": np.asarray(state.best_evaluation)[row],
                    "history": np.asarray(state.history)[row],
                },
            )


def outcome(
    data: DataSet, setting: Setting, arrays: Arrays, task: Task, score: np.ndarray
) -> Outcome:
    """score: (2,) accuracy and negative log-likelihood on validation."""
    features, labels = data.test
    classify = make_classify(CLIP_ADAPTER, setting, arrays, task.head)
    test = float(np.mean(classify(features).argmax(axis=1) == labels))
    return Outcome(100 * float(score[0]), float(score[1]), 100 * test)
