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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clip_adapter.adapters.engine.epoch_draws import Draws, draw, epochs_per_drawing
from clip_adapter.adapters.engine.evaluation import Leaves
from clip_adapter.adapters.engine.training import Run, RunState
from clip_adapter.adapters.method import Method, Setting, Task

# Between two calls of a program a run can be interrupted, and says how far it is.
SECONDS_PER_CALL = 0.25
MOST_KEPT = 256
# Of several tasks, what there is once, and which axes of a Task tell them apart.
SHARED: dict[str, Any] = {"head": None, "extra": None}
OF_EACH: Any = Task._make(None if name in SHARED else 0 for name in Task._fields)


@dataclass(frozen=True)
class Grid:
    """Settings of a method that share a program, on one task or on several of equal shapes: what
    selects the program, and the numbers of each of them.

    others: the tasks beside `task`, of the same cache: they share its head and what is extra.
    """

    method: Method
    static: Setting
    task: Task
    numbers: Sequence[Setting]
    others: Sequence[Task] = ()

    @classmethod
    def of(cls, method: Method, settings: Sequence[Setting], *tasks: Task) -> Grid:
        divided = [method.split(setting) for setting in settings]
        numbers = [numbers for _, numbers in divided]
        return cls(method, divided[0][0], tasks[0], numbers, tasks[1:])

    @property
    def leading(self) -> tuple[int, ...]:
        """Of stacked numbers and states, the axes before that of the settings."""
        return (1 + len(self.others),) if self.others else ()

    @property
    def tasks(self) -> Sequence[Task]:
        return self.task, *self.others

    def joined_task(self) -> Task:
        """What the program takes; of several tasks with a leading axis, see OF_EACH."""
        of_each = joined([task._replace(**SHARED) for task in self.tasks])
        return of_each._replace(head=self.task.head, extra=self.task.extra)

    def run(self, task: Task, numbers: Setting) -> Run:
        """That of one setting. task: of the grid's shapes; within a program it is traced."""
        return Run(self.method, {**self.static, **numbers}, task)

    def abstract_numbers(self, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in self.numbers[0]}

    def abstract_state(self) -> RunState:
        """The shapes of one setting's state."""

        def state(task: Task, numbers: Setting) -> RunState:
            return self.run(task, numbers).initial_state()

        return jax.eval_shape(state, self.task, self.abstract_numbers())


def joined(trees: Sequence[Any]) -> Any:
    """Several alike with a leading axis, or the only one as it is."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class Program:
    """The compiled training of `size` settings that differ in numbers only: start and epochs.

    The start is a program of its own: to draw a network's parameters takes long to compile, and
    depends on less than the epochs do.
    """

    def __init__(self, grid: Grid, size: int, placement: str, mesh: Mesh) -> None:
        self._epochs_per_call = 1
        self._epochs_per_drawing = epochs_per_drawing(grid.task.features.shape[1])
        one_by_one = placement == "sequential"

        def each(one: Any, stacked: Any) -> Any:
            return jax.lax.map(one, stacked) if one_by_one else jax.vmap(one)(stacked)

        def start(task: Task, stacked: Any) -> RunState:
            # The rows say how many there are, also where the settings have no numbers.
            rows = jnp.arange(size // mesh.size)
            return each(lambda pair: grid.run(task, pair[0]).initial_state(), (stacked, rows))

        def epochs(
            task: Task, drawn: Draws, stacked: Any, states: Any, first: int, stop: int, judged: int
        ) -> RunState:
            def one(pair: tuple[Setting, RunState]) -> RunState:
                return grid.run(task, pair[0]).advance(drawn, pair[1], first, stop, judged)

            return each(one, (stacked, states))

        if grid.others:
            start = jax.vmap(start, (OF_EACH, 0))
            epochs = jax.vmap(epochs, (OF_EACH, 0, 0, 0, None, None, None))
        alike, settings = PartitionSpec(), PartitionSpec(*(None for _ in grid.leading), "settings")
        spread = partial(jax.shard_map, mesh=mesh, out_specs=settings, check_vma=False)
        starts = spread(start, in_specs=(alike, settings))
        trains = spread(epochs, in_specs=(alike, alike, settings, settings, alike, alike, alike))

        task, numbers = jax.eval_shape(grid.joined_task), grid.abstract_numbers(*grid.leading, size)
        drawings = [grid.task] * len(grid.tasks)
        drawn = jax.eval_shape(lambda: joined([draw(one, grid.static, 0) for one in drawings]))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        with jax.default_matmul_precision("tensorfloat32"):
            lowered = jax.jit(starts).lower(task, numbers)
            self._states = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lowered.out_info
            )
            self._start = lowered.compile()
            self._epochs = (
                jax.jit(trains, donate_argnums=3)
                .lower(task, drawn, numbers, self._states, number, number, number)
                .compile()
            )

    def initial_states(self, task: Task, stacked: Setting) -> RunState:
        """States before the first epoch."""
        return self._start(task, stacked)

    def states(self, rows: Sequence[Leaves]) -> RunState:
        """The states whose leaves these are, on the host."""
        stacks = [np.stack(leaf) for leaf in zip(*rows, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(self._states), stacks)

    def fits(self, leaves: Leaves) -> bool:
        """Whether these can be the state of one setting."""
        wanted = [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(self._states)]
        return [(leaf.shape, leaf.dtype) for leaf in leaves] == wanted

    def calls(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(drawing, epochs from … to) of each call, which takes about SECONDS_PER_CALL at most."""
        while first < stop:
            called = time.perf_counter()
            drawing = first // self._epochs_per_drawing
            end = (drawing + 1) * self._epochs_per_drawing
            until = min(stop, end, first + self._epochs_per_call)
            yield drawing, first, until
            pace = (time.perf_counter() - called) / (until - first)
            self._epochs_per_call = max(1, int(SECONDS_PER_CALL / max(pace, 1e-9)))
            first = until

    def __call__(
        self,
        task: Task,
        drawn: Draws,
        stacked: Setting,
        state: RunState,
        first: int,
        stop: int,
        judged: int,
    ) -> RunState:
        """All settings from epoch `first` to `stop`, as `Run.advance`; `state` must not be used
        again.

        task, drawn: of the shapes that the program was compiled for.
        """
        advanced = self._epochs(task, drawn, stacked, state, first, stop, judged)
        return jax.block_until_ready(advanced)


def program_of(grid: Grid, size: int, placement: str, mesh: Mesh) -> tuple[Program, bool]:
    """The program of `size` settings of a grid, and whether it had to be compiled."""
    leaves, structure = jax.tree.flatten(grid.task)
    shapes = tuple((np.shape(leaf), str(leaf.dtype)) for leaf in leaves)
    static, names = tuple(grid.static.items()), tuple(grid.numbers[0])
    key = (grid.method, static, names, shapes, structure, size, grid.leading, placement, mesh)
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


_KEPT: OrderedDict[Any, Program] = OrderedDict()
_LOCK = threading.Lock()
