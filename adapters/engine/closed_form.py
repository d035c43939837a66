"""Score every point of a closed form's grid in one compiled program.

The axes are nested, not zipped into points: the first runs one value after another, of the others
as many points lie side by side as fit into memory. What does not depend on an axis is computed once
for all of its values: batching leaves alone what does not touch the batched number, and `_hoisted`
takes it out of the loop over what did not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun

from clip_adapter.adapters.engine.evaluation import Images, Judged
from clip_adapter.adapters.engine.process import one_blas_thread
from clip_adapter.adapters.engine.scoring import (
    VALIDATION_ROWS,
    Scored,
    pooled,
    score,
    validation_score,
)
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Arrays, Method, Rounds, Setting, Task, same_program
from clip_adapter.words import counted

if TYPE_CHECKING:
    from jaxtyping import Float

Axes = Mapping[str, Sequence[float]]
"""The values of each number, the costliest first."""
# What the points that are computed side by side may take in memory.
SIDE_BY_SIDE_BYTES = 1 << 28
# Up to so many validation rows are scored at once, so that what no number of the grid touches, such
# as the products of rows and keys, is computed once for the whole grid.
AT_ONCE = 4096
# Settings × images × classes that are scored in a CPU second.
RATE = 1.8e8


def judged(method: Method, settings: Sequence[Setting], folds: Sequence[Task]) -> list[Judged]:
    """How a closed form's settings do over all folds.

    settings: those that share a program are a product, in its order.
    """

    def by_folds(static: Setting, axes: Axes) -> tuple[npt.NDArray[np.float64], Images]:
        scored = [grid_scores(method, static, axes, fold) for fold in folds]
        return pooled([fold.score for fold in scored], folds), Images.joined(scored)

    return _judged(method, settings, by_folds)


def left_out_scores(
    method: Method, settings: Sequence[Setting], task: Task, rounds: Rounds, folds: Sequence[Task]
) -> list[Judged]:
    """What `judged` finds on the folds that `rounds` are, without a fit for each.

    folds: their validation labels and weights.
    """
    present = rounds.members >= 0
    counts = np.ones(len(task.labels), np.float32)
    for own, fold in zip(rounds.members, folds, strict=True):
        if fold.validation_weights is not None:
            counts[own[own >= 0]] = np.asarray(fold.validation_weights)
    placed = jax.tree.map(jnp.asarray, rounds)

    def by_rounds(static: Setting, axes: Axes) -> tuple[npt.NDArray[np.float64], Images]:
        scored = _grid(method, static, axes, task, placed, counts)
        of_each, *of_images = map(np.asarray, scored)
        scores = pooled(list(np.moveaxis(of_each, -2, 0)), folds)
        return scores, Images(*(rows[..., present] for rows in of_images))

    return _judged(method, settings, by_rounds)


def _judged(
    method: Method,
    settings: Sequence[Setting],
    scores_of: Callable[[Setting, Axes], tuple[npt.NDArray[np.float64], Images]],
) -> list[Judged]:
    found: dict[int, Judged] = {}
    for static, members in same_program(method, settings):
        numbers = method.split(settings[members[0]])[1]
        # What a run was trained with does not vary here: such an axis has one value, and goes last.
        names = sorted(numbers, key=lambda name: name not in method.after_training)
        axes = {
            name: list(dict.fromkeys(float(settings[index][name]) for index in members))
            for name in names
        }
        scores, images = scores_of(static, axes)
        of_each = (rows.reshape(len(members), -1) for rows in images)
        rows = zip(members, scores.reshape(-1, 2).tolist(), map(Images, *of_each), strict=True)
        found |= {index: (accuracy, nll, images) for index, (accuracy, nll), images in rows}
    return [found[index] for index in range(len(settings))]


def grid_scores(method: Method, static: Setting, axes: Axes, task: Task) -> Scored:
    """How each point does on the task's validation data: `score` (len(first axis), …, 2), `right`
    (len(first axis), …, M).
    """
    return _grid(method, static, axes, task)


def _grid(
    method: Method,
    static: Setting,
    axes: Axes,
    task: Task,
    rounds: Rounds | None = None,
    counts: Float[np.ndarray, " S"] | None = None,
) -> Scored:
    """How each point does on the validation data, or on each of the rounds."""
    # A tuple: a dictionary leaves `jit` with its keys sorted.
    values = tuple(jnp.asarray(axis, jnp.float32) for axis in axes.values())
    sizes = _side_by_side(method, static, axes, task, rounds)
    program = _grid_program(method, tuple(static.items()), tuple(axes), sizes)
    with _arithmetic():
        return jax.device_get(program(values, task, rounds, counts))


def note(method: Method, settings: int, task: Task, folds: Sequence[Task]) -> str:
    """The method's own note of a search on these folds or, where it has none and so many settings
    of a grid take long to score, how long."""
    # Left-out images of the support set judge, too: a search takes as long on them.
    of_folds = [np.asarray(fold.validation_labels) for fold in folds]
    judging = np.concatenate([np.zeros(0, np.int32), *of_folds])
    own = method.note(task._replace(validation_labels=judging)) if method.note else ""
    minutes = round(settings * len(judging) * len(task.head.weights) / RATE / 60)
    is_grid = method.after_training or not (method.is_trained or method.solver)
    if own or not (is_grid and minutes):
        return own
    return (
        f"{method.name}: scoring {settings:,} settings takes about {counted(minutes, 'CPU minute')}"
        " on this many classes and images; fewer settings take as much less."
    )


def fit(method: Method, setting: Setting, task: Task) -> Arrays:
    """The closed form's arrays for one setting."""
    static, numbers = method.split(setting)
    program = _fit_program(method, tuple(static.items()))
    with _arithmetic():
        arrays = program({name: np.float32(value) for name, value in numbers.items()}, task)
        finished = method.finish(arrays, setting, task) if method.finish else arrays
        return jax.block_until_ready(finished)


@contextmanager
def _arithmetic() -> Iterator[None]:
    """Full float32; and LAPACK in one thread: on two cores that others use as well, an
    eigendecomposition of 1,600 rows took 1.0 s instead of 10, and 0.3 CPU seconds instead of 2.7.
    """
    with jax.default_matmul_precision("float32"), one_blas_thread():
        yield


def _side_by_side(
    method: Method, static: Setting, axes: Axes, task: Task, rounds: Rounds | None
) -> tuple[int, ...]:
    """How many values of each axis lie side by side."""
    # A single axis has nothing to be nested in.
    beside = list(axes)[1:] or list(axes)
    fit = SIDE_BY_SIDE_BYTES // _point_bytes(method, static, list(axes), beside, task, rounds)
    sizes = []
    for name in reversed([*axes]):
        sizes.append(max(1, min(len(axes[name]), fit)) if name in beside else 1)
        fit //= len(axes[name])
    return tuple(reversed(sizes))


def _point_bytes(
    method: Method,
    static: Setting,
    names: Sequence[str],
    beside: Sequence[str],
    task: Task,
    rounds: Rounds | None,
) -> int:
    """Memory of one of the points that lie side by side: what of the arrays depends on their
    numbers, with a copy, and the logits five times (for the temperature, too). Of left-out logits
    the largest that is computed on the way counts eight times: ProKeR's at 592 rows took half a
    second for 100 λ, 23 side by side, and more than a minute with four times as many."""

    def arrays(inner: Setting, outer: Setting, task: Task) -> list[Any]:
        setting = {**static, **outer, **inner}
        if rounds is not None:
            assert method.left_out is not None
            return [method.left_out(jnp, task, setting, rounds)]
        return jax.tree.leaves(method.fit(jnp, task, setting))

    number = jax.ShapeDtypeStruct((), jnp.float32)
    inner = dict.fromkeys(beside, number)
    outer = {name: number for name in names if name not in inner}
    closed, shapes = jax.make_jaxpr(arrays, return_shape=True)(inner, outer, task)
    dependent = _dependent(closed.jaxpr, closed.jaxpr.invars[: len(inner)])
    if rounds is not None:
        sizes = [v.aval.size for e in closed.jaxpr.eqns for v in e.outvars if v in dependent]
        return 4 * (5 * len(task.labels) * len(task.head.weights) + 8 * max(sizes, default=0))
    outputs = zip(closed.jaxpr.outvars, shapes, strict=True)
    fitted = sum(shape.size for v, shape in outputs if isinstance(v, Var) and v in dependent)
    count = len(task.validation_labels)
    rows = count if count <= AT_ONCE else VALIDATION_ROWS
    return 4 * (5 * rows * len(task.head.weights) + 2 * fitted)


def _dependent(jaxpr: Jaxpr, inputs: Sequence[Var]) -> set[Var]:
    """The variables that depend on these inputs."""
    found = set(inputs)
    for equation in jaxpr.eqns:
        if any(isinstance(v, Var) and v in found for v in equation.invars):
            found |= set(equation.outvars)
    return found


def _hoisted(function: Callable[[jax.Array], Any], number: jax.Array) -> Callable[..., Any]:
    """`function` of a number, with what does not depend on the number computed here and now.

    XLA takes little out of a loop by itself: neither an eigendecomposition nor a large product.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(number)
    traced = closed.jaxpr
    dependent = _dependent(traced, traced.invars)
    once = [e for e in traced.eqns if not dependent.intersection(e.outvars)]
    again = [e for e in traced.eqns if dependent.intersection(e.outvars)]
    known = [*traced.constvars, *(v for equation in once for v in equation.outvars)]
    read = {v for e in again for v in e.invars if isinstance(v, Var)}
    read |= {v for v in traced.outvars if isinstance(v, Var)}
    kept = [v for v in known if v in read]
    unnamed = traced.debug_info.with_unknown_names()
    before = traced.replace(invars=[], outvars=kept, eqns=once, debug_info=unnamed)
    after = traced.replace(
        constvars=[], invars=[*traced.invars, *kept], eqns=again, debug_info=unnamed
    )
    values = jaxpr_as_fun(ClosedJaxpr(before, closed.consts))()
    rest = jaxpr_as_fun(ClosedJaxpr(after, []))
    return lambda number: jax.tree.unflatten(jax.tree.structure(shape), rest(number, *values))


@lru_cache(maxsize=256)
def _fit_program(
    method: Method, static: tuple[tuple[str, Value], ...]
) -> Callable[[Setting, Task], Arrays]:
    # The numbers are inputs, so that fitting the chosen setting again compiles nothing.
    return jax.jit(lambda numbers, task: method.fit(jnp, task, {**dict(static), **numbers}))


@lru_cache(maxsize=256)
def _grid_program(
    method: Method,
    static: tuple[tuple[str, Value], ...],
    names: tuple[str, ...],
    sizes: tuple[int, ...],
) -> Callable[..., Scored]:
    def program(
        values: tuple[jax.Array, ...], task: Task, rounds: Rounds | None, counts: jax.Array | None
    ) -> Scored:
        def point(*numbers: Any) -> Scored:
            setting = {**dict(static), **dict(zip(names, numbers, strict=True))}
            if rounds is not None:
                assert method.left_out is not None and counts is not None
                logits = method.left_out(jnp, task, setting, rounds)
                own = jnp.where(rounds.members < 0, 0, counts[rounds.members])
                labels = task.labels[rounds.members]
                return jax.vmap(score)(logits[rounds.members], labels, own)
            arrays = method.fit(jnp, task, setting)
            return validation_score(
                lambda features: method.logits(jnp, arrays, setting, features, task.head),
                task,
                AT_ONCE,
            )

        function: Any = point
        for axis in reversed(range(len(names))):
            function = _along(function, values[axis], sizes[axis])
        return function()

    return jax.jit(program)


def _along(function: Any, values: jax.Array, size: int) -> Any:
    """`function` of the numbers before an axis, for every value there, `size` at a time."""

    def mapped(*before: Any) -> Scored:
        def at(value: jax.Array) -> Scored:
            return function(*before, value)

        if size == len(values):
            return jax.vmap(at)(values)
        return jax.lax.map(_hoisted(at, values[0]), values, batch_size=size if size > 1 else None)

    return mapped
