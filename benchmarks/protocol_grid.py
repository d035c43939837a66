"""CLIP-Adapter's recipes, each judged on validation and on test, and rules that choose among them.

`fit` tests what it has chosen and nothing else; here every setting of a grid is tested.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from protocol_sets import DataSet
from protocol_tables import TaskKey

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.method import Setting, Task, same_program
from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.pipelines.fitting.data import Data, open_data
from clip_adapter.pipelines.fitting.tasks import TaskRows, cross_validation, draw_tasks

Classify = Callable[[Any], npt.NDArray[np.float32]]
ALPHAS = (0.2, 0.4, 0.6, 0.8)
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
LADDER = tuple(f"AdamW {rate:g}" for rate in RATES)
RECIPES: Mapping[str, Setting] = {
    "authors' SGD 0.002": CLIP_ADAPTER.presets["paper"],
    **{name: {"learning_rate": rate} for name, rate in zip(LADDER, RATES, strict=True)},
    **{f"AdamW 0.0001, decay {decay:g}": {"weight_decay": decay} for decay in (0.0, 0.1, 1.0)},
    **{f"AdamW 0.0001, {epochs} epochs": {"epochs": epochs} for epochs in (50, 100)},
    "AdamW 0.0001, batch 32": {"batch_size": 32},
    "AdamW 0.001, 50 epochs": {"learning_rate": 1e-3, "epochs": 50},
    "Adam 0.0001": {"optimizer": "adam", "weight_decay": 0.0},
    **{f"SGD {rate:g}": {"optimizer": "sgd", "learning_rate": rate} for rate in (2e-3, 1e-2)},
}
"""The rate is 1e-4, and all else as CLIP-Adapter's table says, where it does not stand here."""
SETTINGS = [(name, a) for name in RECIPES for a in (ALPHAS if name in LADDER else ALPHAS[:1])]
TEMPERATURES = np.geomspace(0.1, 10, 41)


@dataclass(frozen=True)
class Run:
    """A setting on one task: test accuracy in percent, and how it did on M validation images.

    losses: (T, M), of each image at each of TEMPERATURES. right: (M,). M is 0 where nothing can
    choose.
    """

    recipe: str
    alpha: float
    test: float
    losses: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]

    @property
    def likely(self) -> npt.NDArray[np.float64]:
        """(M,), the losses at the setting's own best temperature."""
        return self.losses[self.losses.mean(axis=1).argmin()]


def grid(
    source: DataSet,
    shots: Sequence[int],
    seeds: Sequence[int],
    epochs: int | None = None,
    named: Sequence[tuple[str, float]] = SETTINGS,
) -> dict[TaskKey, list[Run]]:
    """A run of each recipe and α that is named, in that order, for each task as `fit` draws it."""
    engine = Engine()
    with FeatureCache(source.path) as cache:
        train = cache.labels("train")
        val = cache.labels("val") if "val" in cache.splits else None
        classes = len(cache.class_names)
        drawn = draw_tasks(train, val, classes, shots, seeds, source.select, repeat=False)
        data = open_data(cache, drawn, augment=False)
        return {
            (int(rows.shots), rows.seed): list(
                _runs(engine, data, rows, source.select, named, epochs)
            )
            for rows in drawn
        }


def _runs(
    engine: Engine,
    data: Data,
    rows: TaskRows,
    select: str,
    named: Sequence[tuple[str, float]],
    epochs: int | None,
) -> Iterator[Run]:
    settings = [_setting(RECIPES[name], alpha, epochs) for name, alpha in named]
    whole = data.task(CLIP_ADAPTER, rows)
    heads = trained(engine, whole, settings)
    judged = [(whole, heads)]
    if select == "cv":
        divided = cross_validation(rows, data.labels["train"])
        parts = [data.task(CLIP_ADAPTER, rows, fold) for fold in divided]
        judged = [(part, trained(engine, part, settings)) for part in parts]
    test = list(data.test_blocks(CLIP_ADAPTER))
    for index, (name, alpha) in enumerate(named):
        right = np.concatenate([heads[index](f).argmax(axis=1) == own for f, own in test])
        losses, correct = [np.zeros((len(TEMPERATURES), 0))], [np.zeros(0, bool)]
        for part, own_heads in judged:
            logits, labels = (
                own_heads[index](part.validation_features),
                np.asarray(part.validation_labels),
            )
            losses.append(tempered(logits, labels))
            correct.append(logits.argmax(axis=1) == labels)
        yield Run(
            name,
            alpha,
            100 * float(right.mean()),
            np.concatenate(losses, axis=1),
            np.concatenate(correct),
        )


def _setting(recipe: Setting, alpha: float, epochs: int | None) -> Setting:
    given = {"learning_rate": 1e-4, **recipe, "alpha": alpha}
    given |= {"epochs": epochs} if epochs else {}
    values = CLIP_ADAPTER.values({name: (value,) for name, value in given.items()}, one=True)
    return CLIP_ADAPTER.settings(values)[0]


def trained(engine: Engine, task: Task, settings: Sequence[Setting]) -> list[Classify]:
    """features → logits of each setting after its last epoch."""
    heads: dict[int, Classify] = {}
    for _, members in same_program(CLIP_ADAPTER, settings):
        for chunk in engine.run(CLIP_ADAPTER, [settings[index] for index in members], task):
            for row, index in enumerate(members[own] for own in chunk.indices):
                arrays = {name: np.asarray(a)[row] for name, a in chunk.state.trained.items()}
                heads[index] = make_classify(CLIP_ADAPTER, settings[index], arrays, task.head)
    return [heads[index] for index in range(len(settings))]


def tempered(
    logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """(T, M): −log softmax(logits / τ) of the label at each temperature τ."""
    shifted = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    own = shifted[np.arange(len(labels)), labels]
    return np.array([np.log(np.exp(shifted / t).sum(axis=1)) - own / t for t in TEMPERATURES])


def by_accuracy(runs: Sequence[Run]) -> Run:
    """Ties by the likelihood."""
    return max(runs, key=lambda run: (run.right.mean(), -run.likely.mean()))


def by_likelihood(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda run: run.likely.mean())


def one_standard_error(runs: Sequence[Run]) -> Run:
    """The first whose loss exceeds the best one's by a standard error at most, image by image.

    runs: the smallest rate first.
    """
    best = by_likelihood(runs).likely

    def within(run: Run) -> bool:
        worse = run.likely - best
        return worse.mean() <= worse.std(ddof=1) / np.sqrt(len(worse))

    return next(run for run in runs if within(run))


RULES: Mapping[str, Callable[[Sequence[Run]], Run]] = {
    "accuracy": by_accuracy,
    "likelihood": by_likelihood,
    "one standard error": one_standard_error,
}


def choose(rule: Callable[[Sequence[Run]], Run], runs: Sequence[Run]) -> Run:
    """By the rule; where there are no validation images the rate 1e-4 at the smallest α."""
    if len(runs[0].right):
        return rule(runs)
    return min(runs, key=lambda run: (run.recipe != LADDER[1], run.alpha))


def yesterday(runs: Sequence[Run]) -> Run:
    """Of AdamW at 1e-3 the α with the best accuracy, 0.4 where nothing can choose."""
    own = [run for run in runs if run.recipe == LADDER[-1]]
    return by_accuracy(own) if len(own[0].right) else own[ALPHAS.index(0.4)]


YESTERDAY = [(LADDER[-1], alpha) for alpha in ALPHAS]
