"""Evaluate settings of any method on folds: trained runs, a closed form's grid, or a solver."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.engine import closed_form
from clip_adapter.adapters.engine.evaluation import Evaluation, Images, Journal, Leaves, Score
from clip_adapter.adapters.engine.runner import Chunk, Engine
from clip_adapter.adapters.engine.scoring import make_classify, pooled, score
from clip_adapter.adapters.engine.successive_halving import (
    Rung,
    rung_epochs,
    successive_halving,
    survivors,
)
from clip_adapter.adapters.engine.training import Run
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Arrays, Method, Rounds, Setting, Solve, Task, same_program
from clip_adapter.adapters.optimisation import evaluated_epochs

Values = Mapping[str, Sequence[Value]]


def search(
    method: Method,
    values: Values,
    folds: Sequence[Task],
    engine: Engine,
    journal: Journal,
    *,
    halving: bool = False,
    rounds: tuple[Task, Rounds] | None = None,
) -> Iterator[Evaluation]:
    """Each setting that `values` make, judged on every fold; under halving also on the way.

    folds: support sets with validation sets. Those that ran to the end may be chosen.
    rounds: of a method with `left_out`, whose folds leave out these rounds of this task: of them
        the validation labels and weights alone are looked at.
    """
    if method.solver:
        yield from _solved(method, values, folds, engine, journal)
    elif method.is_trained:
        runs = runs_of(method, values)
        rungs = rungs_of(runs[0][0], halving=halving)
        yield from successive_halving(runs, rungs, folds, journal, partial(_train, method, engine))
    else:
        yield from _closed(method, values, folds, engine, rounds)


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
                proposed.send(Score(0.0, 0.0))
        return count
    if not method.is_trained:
        return len(method.settings(values))
    runs = runs_of(method, values)
    rungs = rungs_of(runs[0][0], halving=halving)
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
        (chunk,) = engine.run(method, [method.of_the_run(setting)], task, stop=epoch)
        return _trained_arrays(Run(method, setting, task), chunk, 0)
    return _as_saved(method, closed_form.fit(method, setting, task))


def runs_of(method: Method, values: Values) -> list[list[Setting]]:
    """The settings, those together that differ in nothing that training sees."""
    runs: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in method.settings(values):
        runs.setdefault(tuple(method.of_the_run(setting).items()), []).append(setting)
    return [*runs.values()]


def _train(
    method: Method, engine: Engine, rung: Rung
) -> Iterator[tuple[int, list[Evaluation], Callable[[], list[Leaves]]]]:
    """Train the runs of a rung on every fold; yields the index of each, how its settings did, and
    its states."""
    settings = [method.of_the_run(rung.runs[index][0]) for index in rung.indices]
    for _, members in same_program(method, settings):
        indices = [rung.indices[member] for member in members]
        alike = [settings[member] for member in members]
        of_folds = [
            engine.run(
                method,
                alike,
                task,
                first=rung.first,
                stop=rung.stop,
                states=[partial(rung.state, fold, index) for index in indices],
            )
            for fold, task in enumerate(rung.folds)
        ]
        for chunks in zip(*of_folds, strict=True):
            histories = pooled([chunk.state.history for chunk in chunks], rung.folds)
            right, losses = Images.joined([chunk.state for chunk in chunks])
            seconds = sum(chunk.seconds for chunk in chunks) / len(chunks[0].indices)
            for row, member in enumerate(chunks[0].indices):
                index, setting = indices[member], alike[member]
                fitted = [
                    partial(_trained_arrays, Run(method, setting, task), chunk, row)
                    for task, chunk in zip(rung.folds, chunks, strict=True)
                ]
                run = Evaluation(
                    setting,
                    rung.stop,
                    *_judged(setting, rung.stop, histories[row]),
                    seconds,
                    Images(right[row], losses[row]),
                    fitted[0] if len(fitted) == 1 else None,
                )
                evaluations = _of_each(method, run, rung.runs[index], rung.folds, fitted)
                yield index, evaluations, partial(_rows, chunks, row)


def _judged(
    setting: Setting, epochs_run: int, history: npt.NDArray[np.float64]
) -> tuple[int, float, float]:
    """(epoch, accuracy, nll) of a run's last epoch, or of its best evaluated one where that is
    kept; one NaN on the way marks it as diverged."""
    if setting["epoch"] != "best":
        accuracy, nll = history[0].tolist()
        return epochs_run, accuracy, nll
    epochs = [epoch for epoch in evaluated_epochs(setting) if epoch <= epochs_run]
    reached = history[: len(epochs)].tolist()
    best = max(range(len(epochs)), key=lambda row: Score(reached[row][0], -reached[row][1]))
    accuracy, nll = reached[best]
    return epochs[best], accuracy, nll if np.isfinite(reached).all() else float("nan")


def _of_each(
    method: Method,
    run: Evaluation,
    settings: Sequence[Setting],
    folds: Sequence[Task],
    fitted: Sequence[Callable[[], Arrays]],
) -> list[Evaluation]:
    """How the settings do that share a run, on what it trained in each fold."""
    if not method.after_training:
        return [run]
    tasks = [
        fold._replace(extra={**fold.extra, "trained": dict(arrays())})
        for fold, arrays in zip(folds, fitted, strict=True)
    ]
    seconds = run.seconds / len(settings)
    return [
        # A run that diverged on the way has diverged, whatever comes after it.
        replace(
            run,
            setting=setting,
            accuracy=accuracy,
            nll=run.nll if run.failed else nll,
            seconds=seconds,
            images=images,
        )
        for setting, (accuracy, nll, images) in zip(
            settings, closed_form.judged(_as_trained(method), settings, tasks), strict=True
        )
    ]


@lru_cache(maxsize=256)
def _as_trained(method: Method) -> Method:
    """The method as a closed form that gives back what was trained, `task.extra["trained"]`."""
    return replace(method, trained=(), fit=lambda xp, task, setting: task.extra["trained"])


def _rows(chunks: Sequence[Chunk], row: int) -> list[Leaves]:
    return [chunk.row(row) for chunk in chunks]


def _trained_arrays(run: Run, chunk: Chunk, row: int) -> Arrays:
    """What is saved of row `row` of a chunk."""
    kept = chunk.state.best if run.setting["epoch"] == "best" else chunk.state.trained
    trained = {name: np.asarray(array)[row] for name, array in kept.items()}
    return _as_saved(run.method, run.fitted(trained))


def _closed(
    method: Method,
    values: Values,
    folds: Sequence[Task],
    engine: Engine,
    rounds: tuple[Task, Rounds] | None,
) -> Iterator[Evaluation]:
    """Nothing is looked up: a whole grid takes no longer than reading what it found before."""
    settings = method.settings(values)
    for _, members in same_program(method, settings):
        started = time.perf_counter()
        alike = [settings[index] for index in members]
        if rounds is None:
            judged = closed_form.judged(method, alike, folds)
        else:
            judged = closed_form.left_out_scores(method, alike, *rounds, folds)
        seconds = (time.perf_counter() - started) / len(members)
        engine.progress(len(members))
        for setting, (accuracy, nll, images) in zip(alike, judged, strict=True):
            yield Evaluation(setting, 0, 0, accuracy, nll, seconds, images)


def judge(method: Method, folds: Sequence[Task]) -> Evaluation:
    """How a method does that has nothing to choose and nothing to train."""
    ((accuracy, nll, images),) = closed_form.judged(method, [{}], folds)
    return Evaluation({}, 0, 0, accuracy, nll, 0.0, images)


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
