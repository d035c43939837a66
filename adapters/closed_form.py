"""Score every point of a closed form's grid in one compiled program.

The axes are nested, not zipped into points: the first runs one value after another, the others side
by side. What depends on no hyper-parameter, or on some of them, is then computed once for each of
their values: batching leaves alone what does not touch the batched number, and XLA moves what does
not change out of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from clip_adapter.adapters.blas import one_blas_thread
from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Arrays, Method, Setting, Task
from clip_adapter.adapters.scoring import VALIDATION_ROWS, Scored, validation_score

# What the points that are computed side by side may take in memory.
SIDE_BY_SIDE_BYTES = 1 << 28


def grid_scores(
    method: Method, static: Setting, axes: Mapping[str, Sequence[float]], task: Task
) -> Scored:
    """How each point does on the task's validation data: `score` (len(first axis), …, 2), `right`
    (len(first axis), …, M).

    axes: the values of each number, the costliest first.
    """
    # A tuple: a dictionary leaves `jit` with its keys sorted.
    values = tuple(jnp.asarray(axis, jnp.float32) for axis in axes.values())
    # A single axis has nothing to be nested in.
    beside = list(axes)[1:] or list(axes)
    points = int(np.prod([len(axes[name]) for name in beside], dtype=int))
    fits = points * _point_bytes(method, static, list(axes), beside, task) <= SIDE_BY_SIDE_BYTES
    program = _grid_program(method, tuple(static.items()), tuple(axes), fits)
    with _arithmetic():
        return jax.device_get(program(values, task))


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


def _point_bytes(
    method: Method, static: Setting, names: Sequence[str], beside: Sequence[str], task: Task
) -> int:
    """Memory of one of the points that lie side by side: what of the arrays depends on their
    numbers, with a copy, and the logits five times (for the temperature, too)."""

    def arrays(inner: Setting, outer: Setting, task: Task) -> list[Any]:
        return jax.tree.leaves(method.fit(jnp, task, {**static, **outer, **inner}))

    number = jax.ShapeDtypeStruct((), jnp.float32)
    inner = dict.fromkeys(beside, number)
    outer = {name: number for name in names if name not in inner}
    closed, shapes = jax.make_jaxpr(arrays, return_shape=True)(inner, outer, task)
    traced = closed.jaxpr
    dependent = set(traced.invars[: len(inner)])
    for equation in traced.eqns:
        if any(isinstance(v, Var) and v in dependent for v in equation.invars):
            dependent |= set(equation.outvars)
    outputs = zip(traced.outvars, shapes, strict=True)
    fitted = sum(shape.size for v, shape in outputs if isinstance(v, Var) and v in dependent)
    rows = min(len(task.validation_labels), VALIDATION_ROWS)
    return 4 * (5 * rows * len(task.head.weights) + 2 * fitted)


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
    side_by_side: bool,
) -> Callable[[tuple[jax.Array, ...], Task], Scored]:
    def program(values: tuple[jax.Array, ...], task: Task) -> Scored:
        def point(*numbers: Any) -> Scored:
            setting = {**dict(static), **dict(zip(names, numbers, strict=True))}
            arrays = method.fit(jnp, task, setting)
            return validation_score(
                lambda features: method.logits(jnp, arrays, setting, features, task.head), task
            )

        function: Any = point
        for axis in reversed(range(len(names))):
            nested = side_by_side and (axis > 0 or len(names) == 1)
            function = _along(function, axis, values[axis], one_by_one=not nested)
        return function()

    return jax.jit(program)


def _along(function: Any, axis: int, values: jax.Array, *, one_by_one: bool) -> Any:
    """`function` of the numbers before `axis`, for every value there."""

    def mapped(*before: Any) -> Scored:
        def at(value: jax.Array) -> Scored:
            return function(*before, value)

        return jax.lax.map(at, values) if one_by_one else jax.vmap(at)(values)

    return mapped
