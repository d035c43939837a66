"""Compiled training programs, which a process keeps.

A program depends on the method, on what is static of the settings and on shapes, not on numbers. So
the runs of a process share them: other seeds, other values, other data of the same shape.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clip_adapter.adapters.evaluation import Leaves
from clip_adapter.adapters.method import Method, Setting, Task
from clip_adapter.adapters.training import RunState, advance, initial_state

# Between two calls of a program a run can be interrupted, and says how far it is.
SECONDS_PER_CALL = 0.25
MOST_KEPT = 256


@dataclass(frozen=True)
class Grid:
    """Settings that share a program: what selects it, and the numbers of each of them."""

    method: Method
    static: Setting
    task: Task
    numbers: Sequence[Setting]

    def abstract_numbers(self, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in self.numbers[0]}

    def abstract_state(self) -> RunState:
        """The shapes of one setting's state."""
        return jax.eval_shape(self._initial, self.abstract_numbers())

    def _initial(self, numbers: Setting) -> RunState:
        return initial_state(self.method, self.task, {**self.static, **numbers})


class Program:
    """The compiled training of `size` settings that differ in numbers only."""

    def __init__(self, grid: Grid, size: int, placement: str, mesh: Mesh) -> None:
        self._size = size
        self._blank = grid.abstract_state()
        self._epochs_per_call = 1

        def chunk(
            task: Task, stacked: Any, states: RunState, first: int, stop: int, judged: int
        ) -> RunState:
            def one(numbers: Setting, state: RunState) -> RunState:
                return advance(grid.method, grid.static, task, numbers, state, first, stop, judged)

            if placement == "sequential":
                return jax.lax.map(lambda pair: one(*pair), (stacked, states))
            return jax.vmap(one)(stacked, states)

        alike, settings = PartitionSpec(), PartitionSpec("settings")
        sharded = jax.shard_map(
            chunk,
            mesh=mesh,
            in_specs=(alike, settings, settings, alike, alike, alike),
            out_specs=settings,
            check_vma=False,
        )
        states = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), self._blank
        )
        epochs = [jax.ShapeDtypeStruct((), jnp.int32)] * 3
        jitted = jax.jit(sharded, donate_argnums=2)
        with jax.default_matmul_precision("tensorfloat32"):
            task, numbers = _abstract(grid.task), grid.abstract_numbers(size)
            lowered = jitted.lower(task, numbers, states, *epochs)
            self._compiled = lowered.compile()

    def blank_states(self) -> RunState:
        """States of the right shapes, for runs that start."""
        zeros = jax.tree.map(
            lambda leaf: np.zeros((self._size, *leaf.shape), leaf.dtype), self._blank
        )
        # Made on the host they are no programs, one for each shape; the training overwrites them.
        return jax.device_put(zeros, may_alias=False)

    def fits(self, leaves: Leaves) -> bool:
        """Whether these can be the state of one setting."""
        wanted = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(self._blank)]
        return [(leaf.shape, leaf.dtype) for leaf in leaves] == wanted

    def calls(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Epochs from … to of each call, so that one takes about SECONDS_PER_CALL."""
        while first < stop:
            called = time.perf_counter()
            until = min(stop, first + self._epochs_per_call)
            yield first, until
            pace = (time.perf_counter() - called) / (until - first)
            self._epochs_per_call = max(1, int(SECONDS_PER_CALL / max(pace, 1e-9)))
            first = until

    def __call__(
        self, task: Task, stacked: Setting, state: RunState, first: int, stop: int, judged: int
    ) -> RunState:
        return jax.block_until_ready(self._compiled(task, stacked, state, first, stop, judged))


def program_of(grid: Grid, size: int, placement: str, mesh: Mesh) -> tuple[Program, bool]:
    """The program of `size` settings of a grid, and whether it had to be compiled."""
    leaves, structure = jax.tree.flatten(grid.task)
    shapes = tuple((np.shape(leaf), str(leaf.dtype)) for leaf in leaves)
    static, names = tuple(grid.static.items()), tuple(grid.numbers[0])
    key = (grid.method, static, names, shapes, structure, size, placement, mesh)
    with _LOCK:
        if key in _KEPT:
            _KEPT.move_to_end(key)
            return _KEPT[key], False
    program = Program(grid, size, placement, mesh)
    with _LOCK:
        _KEPT[key] = program
        if len(_KEPT) > MOST_KEPT:
            _KEPT.popitem(last=False)
    return program, True


def _abstract(task: Task) -> Task:
    """The shapes of a task: a program that is kept must not keep its arrays."""
    abstract: Task = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), task)
    return abstract


_KEPT: OrderedDict[Any, Program] = OrderedDict()
_LOCK = threading.Lock()
