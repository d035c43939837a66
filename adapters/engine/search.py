"""Evaluate settings of any method on folds: trained runs, a closed form's grid, or a solver."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters import optimisation as recipe
from clip_adapter.adapters.engine import closed_form, training
from clip_adapter.adapters.engine.evaluation import Evaluation, Images, Journal, Judged, Leaves
from clip_adapter.adapters.engine.runner import Chunk, Engine
from clip_adapter.adapters.engine.scoring import make_classify, pooled, score
from clip_adapter.adapters.engine.shared_runs import (
    SharedRuns,
    as_trained,
    of_the_run,
    with_trained,
)
from clip_adapter.adapters.engine.successive_halving import (
    Rung,
    rung_epochs,
    successive_halving,
    survivors,
)
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import (
    Arrays,
    Method,
    Score,
    Setting,
    Solve,
    Task,
    same_program,
)

Values = Mapping[str, Sequence[Value]]


def search(
    method: Method,
    values: Values,
    folds: Sequence[Task],
    engine: Engine,
    journal: Journal,
    *,
    halving: bool = False,
) -> Iterator[Evaluation]:
    """Each setting that `values` make, judged on every fold; under halving also on the way.

    folds: support sets with validation sets. Those that ran to the end may be chosen.
    """
    if method.solver:
        yield from _solved(method, values, folds, engine, journal)
    elif method.is_trained:
        shared = SharedRuns(method, method.settings(values), journal)
        rungs = rungs_of(shared.runs[0], halving=halving)
        train = partial(_train, method, engine, shared)
        for run in successive_halving(shared.runs, rungs, folds, shared, train):
            yield from shared.take(run)
    else:
        yield from _closed(method, values, folds, engine)


def rungs_of(setting: Setting, *, halving: bool) -> list[int]:
    """The epochs at which settings of a trained method are compared."""
    epochs = int(setting["epochs"])
    return rung_epochs(epochs, int(setting.get("evaluate_every", 1))) if halving else [epochs]


def work(method: Method, values: Values, folds: int, *, halving: bool = False) -> float:
    """How much `search` will tell the engine's progress, in settings trained on one fold.

    Of a solver that is sent scores it is what it takes where all scores are equal.
    """
    if method.solver:
        proposed = method.propose(values) if method.propose else _product(method, values)
        count = 0
        with suppress(StopIteration):
            next(proposed)
            while True:
                count += 1
                proposed.send((0.0, 0.0))
        return count
    settings = method.settings(values)
    if not method.is_trained:
        return len(settings)
    rungs = rungs_of(settings[0], halving=halving)
    runs = {tuple(of_the_run(method, setting).items()) for setting in settings}
    counts = survivors(len(runs), len(rungs))
    spans = [stop - first for first, stop in pairwise([0, *rungs])]
    epochs = sum(count * span for count, span in zip(counts, spans, strict=True))
    return folds * epochs / rungs[-1]


def fit(method: Method, setting: Setting, epoch: int | None, task: Task, engine: Engine) -> Arrays:
    """Fit one setting on the support set, up to `epoch` (None: the end); float32 arrays of NumPy.

    On the task it was judged on, this gives the arrays that the search had.
    """
    if method.solver:
        return _as_saved(method, method.solver(_on_host(task))(setting))
    if method.is_trained:
        static, numbers = method.split(of_the_run(method, setting))
        (chunk,) = engine.run(method, static, task, [numbers], stop=epoch)
        return _trained_arrays(method, setting, task, chunk, 0)
    return _as_saved(method, closed_form.fit(method, setting, task))


def _train(
    method: Method, engine: Engine, shared: SharedRuns, rung: Rung
) -> Iterator[tuple[int, Evaluation, Callable[[], list[Leaves]]]]:
    """Train each setting of a rung on every fold; yields its index, how it did, its states."""
    for static, group in same_program(method, [rung.settings[index] for index in rung.indices]):
        members = [rung.indices[position] for position in group]
        numbers = [method.split(rung.settings[index])[1] for index in members]
        runs = [
            engine.run(
                method,
                static,
                task,
                numbers,
                first=rung.first,
                stop=rung.stop,
                states=[partial(rung.state, fold, index) for index in members],
            )
            for fold, task in enumerate(rung.folds)
        ]
        for chunks in zip(*runs, strict=True):
            histories = pooled([chunk.state.history for chunk in chunks], rung.folds)
            right, losses = Images.joined([chunk.state for chunk in chunks])
            seconds = sum(chunk.seconds for chunk in chunks) / len(chunks[0].indices)
            for row, position in enumerate(chunks[0].indices):
                index = members[position]
                setting = rung.settings[index]
                kept = (
                    partial(_trained_arrays, method, setting, rung.folds[0], chunks[0], row)
                    if len(chunks) == 1
                    else None
                )
                images = Images(right[row], losses[row])
                run = _judged(setting, rung.stop, histories[row], seconds, images, kept)
                best = shared.judged(run, partial(_after, method, rung.folds, chunks, row, setting))
                yield index, best, partial(_rows, chunks, row)


def _after(
    method: Method,
    folds: Sequence[Task],
    chunks: Sequence[Chunk],
    row: int,
    run: Setting,
    settings: Sequence[Setting],
) -> list[Judged]:
    """Judge settings on what one run trained in each fold."""
    trained = [
        with_trained(fold, _trained_arrays(method, run, fold, chunk, row))
        for fold, chunk in zip(folds, chunks, strict=True)
    ]
    return _grid(as_trained(method), settings, trained)


def _judged(
    setting: Setting,
    epochs_run: int,
    history: npt.NDArray[np.float64],
    seconds: float,
    images: Images,
    arrays: Callable[[], Arrays] | None,
) -> Evaluation:
    """Judge a run by its last epoch, or by its best evaluated one where that is kept; one NaN on
    the way marks it as diverged."""
    if setting["epoch"] != "best":
        accuracy, nll = history[0].tolist()
        return Evaluation(setting, epochs_run, epochs_run, accuracy, nll, seconds, images, arrays)
    epochs = [epoch for epoch in recipe.evaluated_epochs(setting) if epoch <= epochs_run]
    reached = history[: len(epochs)]
    accuracies, nlls = reached.T
    best = np.lexsort((np.arange(len(epochs)), nlls, -accuracies))[0]
    nll = float(nlls[best]) if np.isfinite(reached).all() else float("nan")
    accuracy = float(accuracies[best])
    return Evaluation(setting, epochs_run, epochs[best], accuracy, nll, seconds, images, arrays)


def _rows(chunks: Sequence[Chunk], row: int) -> list[Leaves]:
    return [chunk.row(row) for chunk in chunks]


def _trained_arrays(method: Method, setting: Setting, task: Task, chunk: Chunk, row: int) -> Arrays:
    """What is saved of row `row` of a chunk."""
    state = chunk.state
    kept = state.best if setting["epoch"] == "best" else state.trained
    trained = {name: np.asarray(array)[row] for name, array in kept.items()}
    return _as_saved(method, training.fitted(method, setting, task, trained))


def _closed(
    method: Method, values: Values, folds: Sequence[Task], engine: Engine
) -> Iterator[Evaluation]:
    """Nothing is looked up: a whole grid takes no longer than reading what it found before."""
    settings = method.settings(values)
    for _, members in same_program(method, settings):
        started = time.perf_counter()
        alike = [settings[index] for index in members]
        judged = _grid(method, alike, folds)
        seconds = (time.perf_counter() - started) / len(members)
        engine.progress(len(members))
        for setting, (accuracy, nll, images) in zip(alike, judged, strict=True):
            yield Evaluation(setting, 0, 0, accuracy, nll, seconds, images)


def judge(method: Method, folds: Sequence[Task]) -> Evaluation:
    """How a method does that has nothing to choose and nothing to train."""
    ((accuracy, nll, images),) = _grid(method, [{}], folds)
    return Evaluation({}, 0, 0, accuracy, nll, 0.0, images)


def _grid(method: Method, settings: Sequence[Setting], folds: Sequence[Task]) -> list[Judged]:
    """How a closed form's settings do over all folds.

    settings: those that share a program are a product, in its order.
    """
    found: dict[int, Judged] = {}
    for static, members in same_program(method, settings):
        numbers = method.split(settings[members[0]])[1]
        # What a run was trained with does not vary here: such an axis has one value, and goes last.
        names = sorted(numbers, key=lambda name: name not in method.after_training)
        axes = {
            name: list(dict.fromkeys(float(settings[index][name]) for index in members))
            for name in names
        }
        scored = [closed_form.grid_scores(method, static, axes, fold) for fold in folds]
        scores = pooled([fold.score.reshape(-1, 2) for fold in scored], folds).tolist()
        of_each = (rows.reshape(len(members), -1) for rows in Images.joined(scored))
        rows = zip(members, scores, map(Images, *of_each), strict=True)
        found |= {index: (accuracy, nll, images) for index, (accuracy, nll), images in rows}
    return [found[index] for index in range(len(settings))]


def _solved(
    method: Method, values: Values, folds: Sequence[Task], engine: Engine, journal: Journal
) -> Iterator[Evaluation]:
    assert method.solver is not None
    tasks = [_on_host(fold) for fold in folds]
    solvers: list[Solve] = []
    proposed = method.propose(values) if method.propose else _product(method, values)
    setting = next(proposed, None)
    while setting is not None:
        evaluation = journal.known(setting, 0)
        if evaluation is None:
            solvers = solvers or [method.solver(task) for task in tasks]
            evaluation = _evaluate(method, setting, folds, solvers)
        engine.progress(1)
        yield evaluation
        try:
            setting = proposed.send(evaluation.score)
        except StopIteration:
            return


def _product(method: Method, values: Values) -> Generator[Setting, Score, None]:
    for setting in method.settings(values):  # noqa: UP028 (it is sent scores)
        yield setting


def _evaluate(
    method: Method, setting: Setting, folds: Sequence[Task], solvers: Sequence[Solve]
) -> Evaluation:
    started = time.perf_counter()
    fits = [_as_saved(method, solve(setting)) for solve in solvers]
    scored = []
    for arrays, fold in zip(fits, folds, strict=True):
        classify = make_classify(method, setting, arrays, fold.head)
        logits = jnp.asarray(classify(fold.validation_features))
        judged = _score(logits, fold.validation_labels, fold.validation_weights)
        scored.append(jax.device_get(judged))
    accuracy, nll = pooled([fold.score for fold in scored], folds).tolist()
    kept = (lambda: fits[0]) if len(folds) == 1 else None
    seconds = time.perf_counter() - started
    return Evaluation(setting, 0, 0, accuracy, nll, seconds, Images.joined(scored), kept)


# One program: its operations one by one are ten, each to be compiled.
_score = jax.jit(score)


def _on_host(task: Task) -> Task:
    return jax.tree.map(np.asarray, task)


def _as_saved(method: Method, arrays: Arrays) -> Arrays:
    return {
        name: np.asarray(array, np.float32)
        for name, array in arrays.items()
        if name in method.shapes
    }
