"""CLIP-Adapter as a method: grids through the engine."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from clip_adapter.adapters.clip_adapter import Architecture, ClipAdapter, abstract_adapter
from clip_adapter.adapters.engine import Chunk, Engine, Leaves
from clip_adapter.adapters.halving import Leg, climb, halving_rungs, survivors
from clip_adapter.adapters.method import (
    Arrays,
    Evaluation,
    Grid,
    Ratio,
    Search,
    Setting,
    blockwise,
    pooled,
)
from clip_adapter.adapters.ratio import RatioKind
from clip_adapter.adapters.training import HyperParameters, RunState, Schedule, Task


class ClipAdapterMethod:
    """Gao et al., arXiv 2110.04544."""

    unseen_classes = True

    def search(self, search: Search, engine: Engine) -> Iterator[Evaluation]:
        """Every setting to the end, or by successive halving (halving.py)."""
        tried = list(settings(search.grid))
        yield from climb(tried, _rungs(search.grid), search, partial(self._train, engine))

    def _train(
        self, engine: Engine, leg: Leg
    ) -> Iterator[tuple[int, Evaluation, Callable[[], list[Leaves]]]]:
        """Train each setting of a leg on every fold; yields its index, how it did, its states."""
        groups: dict[tuple[Architecture, Schedule], list[int]] = defaultdict(list)
        for index in leg.indices:
            groups[static_part(leg.settings[index])].append(index)
        for static, members in groups.items():
            hypers = [dynamic_part(leg.settings[index]) for index in members]
            runs = [
                engine.run(
                    *static,
                    task,
                    hypers,
                    start=leg.start,
                    stop=leg.stop,
                    states=[partial(leg.state, fold, index) for index in members],
                )
                for fold, task in enumerate(leg.folds)
            ]
            for chunks in zip(*runs, strict=True):
                histories = pooled([chunk.state.history for chunk in chunks], leg.folds)
                seconds = sum(chunk.seconds for chunk in chunks) / len(chunks[0].indices)
                for row, position in enumerate(chunks[0].indices):
                    index = members[position]
                    kept = partial(_best_arrays, chunks[0], row) if len(chunks) == 1 else None
                    evaluation = _evaluation(
                        leg.settings[index], static[1], leg.stop, histories[row], seconds, kept
                    )
                    yield index, evaluation, partial(_rows, chunks, row)

    def evaluations(self, grid: Grid) -> int:
        count = sum(1 for _ in settings(grid))
        return sum(survivors(count, _rungs(grid)))

    def single(self, grid: Grid) -> Setting:
        """The setting with the most default values, of those the first."""

        def defaults(setting: Setting) -> int:
            return sum(setting.get(name) == value for name, value in grid.defaults.items())

        return max(settings(grid), key=defaults)

    def fit(self, setting: Setting, epoch: int | None, task: Task, engine: Engine) -> Arrays:
        static = static_part(setting)
        (chunk,) = engine.run(*static, task, [dynamic_part(setting)], stop=epoch)
        return _arrays(chunk.state.parameters, chunk.state.constants, 0)

    def logits(
        self,
        setting: Setting,
        arrays: Mapping[str, npt.NDArray[Any]],
        features: npt.ArrayLike,
        weights: npt.ArrayLike,
        logit_scale: float,
        logit_bias: float,
    ) -> npt.NDArray[np.float32]:
        classify = partial(
            _logits,
            *_filled(setting, arrays, np.shape(weights)[1]),
            weights=np.asarray(weights),
            logit_scale=logit_scale,
            logit_bias=logit_bias,
        )
        return blockwise(classify, features)

    def describe(
        self,
        setting: Setting,
        arrays: Mapping[str, npt.NDArray[Any]],
        features: npt.ArrayLike,
        weights: npt.ArrayLike,
    ) -> dict[str, float]:
        """Mean and standard deviation of learned ratios, over images and over classes."""
        adapter = nnx.merge(*_filled(setting, arrays, np.shape(weights)[1]))
        ratios = {}
        if adapter.image is not None and isinstance(setting["alpha"], str):
            ratios["alpha"] = adapter.image.ratio(jnp.asarray(features))
        if adapter.text is not None and isinstance(setting["beta"], str):
            ratios["beta"] = adapter.text.ratio(jnp.asarray(weights))
        return {
            f"{name}_{statistic}": float(getattr(jnp, statistic)(value))
            for name, value in ratios.items()
            for statistic in ("mean", "std")
        }


@partial(jax.jit, static_argnums=0)
def _logits(
    graph: nnx.GraphDef[ClipAdapter],
    state: nnx.State,
    features: jax.Array,
    weights: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
) -> jax.Array:
    return nnx.merge(graph, state)(features, weights, logit_scale, logit_bias)


def settings(grid: Grid) -> Iterator[Setting]:
    """The product of the grid; a branch that is not there adds no dimension to it."""
    alphas: tuple[Ratio, ...] = grid.alpha if grid.branch != "text" else grid.alpha[:1]
    betas: tuple[Ratio, ...] = grid.beta if grid.branch != "image" else grid.beta[:1]
    for reduction, alpha, beta, rate, decay in product(
        grid.reduction, alphas, betas, grid.learning_rate, grid.weight_decay
    ):
        setting: Setting = {"branch": grid.branch}
        if grid.branch != "text":
            setting |= {"alpha": alpha}
            if isinstance(alpha, str):
                setting |= {"alpha_init": grid.alpha_init}
        if grid.branch != "image":
            setting |= {"beta": beta}
            if isinstance(beta, str):
                setting |= {"beta_init": grid.beta_init}
        yield setting | {
            "reduction": reduction,
            "learning_rate": rate,
            "weight_decay": decay,
            "epochs": grid.schedule.epochs,
            "batch_size": grid.schedule.batch_size,
            "evaluate_every": grid.schedule.evaluate_every,
            "optimizer": grid.schedule.optimizer,
            "warmup": grid.schedule.warmup,
            "drop_last": grid.schedule.drop_last,
        }


def _rungs(grid: Grid) -> list[int]:
    return halving_rungs(grid.schedule) if grid.halving else [grid.schedule.epochs]


def static_part(setting: Setting) -> tuple[Architecture, Schedule]:
    """What selects the compiled program."""
    architecture = Architecture(
        branch=setting["branch"],
        reduction=setting["reduction"],
        image_ratio=_kind(setting.get("alpha", 0.0)),
        text_ratio=_kind(setting.get("beta", 0.0)),
    )
    schedule = Schedule(
        epochs=setting["epochs"],
        batch_size=setting["batch_size"],
        evaluate_every=setting["evaluate_every"],
        optimizer=setting["optimizer"],
        warmup=setting["warmup"],
        drop_last=setting["drop_last"],
    )
    return architecture, schedule


def dynamic_part(setting: Setting) -> HyperParameters:
    """What the compiled program takes as numbers."""
    return HyperParameters(
        alpha=_number(setting, "alpha"),
        beta=_number(setting, "beta"),
        learning_rate=setting["learning_rate"],
        weight_decay=setting["weight_decay"],
    )


def _kind(ratio: Ratio) -> RatioKind:
    return ratio if isinstance(ratio, str) else "fixed"


def _number(setting: Setting, name: str) -> float:
    value = setting.get(name, 0.0)
    return setting[f"{name}_init"] if isinstance(value, str) else value


def _evaluation(
    setting: Setting,
    schedule: Schedule,
    epochs_run: int,
    history: npt.NDArray[np.float64],
    seconds: float,
    arrays: Callable[[], Arrays] | None,
) -> Evaluation:
    """Judge a run by its best evaluated epoch so far; one NaN on the way marks it as diverged."""
    epochs = [epoch for epoch in schedule.evaluated_epochs() if epoch <= epochs_run]
    reached = history[: len(epochs)]
    accuracy, nll = reached.T
    best = np.lexsort((np.arange(len(epochs)), nll, -accuracy))[0]
    judged_nll = float(nll[best]) if np.isfinite(reached).all() else float("nan")
    return Evaluation(
        setting, epochs_run, epochs[best], float(accuracy[best]), judged_nll, seconds, arrays
    )


def _rows(chunks: tuple[Chunk, ...], row: int) -> list[Leaves]:
    return [chunk.row(row) for chunk in chunks]


def _best_arrays(chunk: Chunk, row: int) -> Arrays:
    state: RunState = chunk.state
    return _arrays(state.best, state.constants, row)


def _arrays(parameters: nnx.State, constants: nnx.State, row: int) -> Arrays:
    """Row `row` of stacked states as arrays by path, such as `image/bottleneck/down/kernel`."""
    merged = nnx.merge_state(parameters, constants)
    return {
        _name(path): np.asarray(variable[...][row]) for path, variable in nnx.to_flat_state(merged)
    }


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _filled(
    setting: Setting, arrays: Mapping[str, npt.NDArray[Any]], dim: int
) -> tuple[nnx.GraphDef[ClipAdapter], nnx.State]:
    """The adapter of this setting with these arrays in it, ready for `nnx.merge`.

    Raises ValueError where names or shapes are not the adapter's.
    """
    graph, blank = nnx.split(abstract_adapter(static_part(setting)[0], dim))
    flat = {_name(path): (path, variable) for path, variable in nnx.to_flat_state(blank)}
    shapes = {name: variable.get_value().shape for name, (_, variable) in flat.items()}
    if shapes != {name: array.shape for name, array in arrays.items()}:
        raise ValueError("the arrays are not those of the adapter's architecture")
    state = nnx.from_flat_state(
        {path: variable.replace(jnp.asarray(arrays[n])) for n, (path, variable) in flat.items()}
    )
    return graph, state
