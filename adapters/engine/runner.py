"""Run a grid of settings through one compiled program per static signature.

A chunk of K settings is one call of the program, or several that each take it some epochs further:
training (training.py) over stacked numbers and states. Within a device the settings run one after
another (`sequential`) or side by side (`vectorised`); over several devices the chunk is sharded.
How settings share a device changes a result by no more than float rounding.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from clip_adapter.adapters.engine.epoch_draws import kept_draws
from clip_adapter.adapters.engine.evaluation import Leaves
from clip_adapter.adapters.engine.process import own_jax_in_thread
from clip_adapter.adapters.engine.program import Grid, Program, joined, program_of
from clip_adapter.adapters.engine.training import RunState
from clip_adapter.adapters.method import Method, Setting, Task
from clip_adapter.adapters.optimisation import steps_and_batch

Placement = Literal["auto", "sequential", "vectorised"]
Progress = Callable[[float], None]
"""Called with the settings trained since the last call, in fractions."""

# More settings than this are not vectorised at once: a guess, to be measured on a GPU.
LARGEST_CHUNK = 256
# Of the device memory, the share that a chunk may take; under cross-validation the chunks of up to
# four folds are there together.
MEMORY_SHARE = 0.2
# Threads that train on a CPU: more would multiply the memory of the validation logits.
MOST_AT_ONCE = 4


class Cancelled(Exception):
    """The run was stopped from outside; nobody waits for its result."""


@dataclass(frozen=True)
class Chunk:
    """Some settings of a grid after training: `state` is stacked (K, …), row i is `indices[i]`; of
    several tasks (T, K, …).

    seconds: what the chunk took, beside others that may have run at the same time.
    """

    indices: list[int]
    state: RunState
    seconds: float

    def row(self, row: int) -> Leaves:
        """The state of one setting, on the host."""
        # The whole chunk comes to the host once, for all of its rows. A row is a copy, which lets
        # the others go, unless it is the only one.
        alone = len(self.indices) == 1
        rows = [np.asarray(leaf)[row : row + 1] for leaf in jax.tree.leaves(self.state)]
        return [(r if alone else r.copy()).reshape(r.shape[1:]) for r in rows]


class Engine:
    """Runs settings; `compilations` counts the programs that had to be compiled for it.

    placement: `auto` takes `sequential` on a CPU, where one setting's parameters and moments fit
        the cache and many do not, and `vectorised` elsewhere, where one setting does not fill the
        device.
    progress: told how much was trained, from any thread.
    cores: how many may be used; by default those that this process may run on.
    """

    def __init__(
        self,
        placement: Placement = "auto",
        progress: Progress | None = None,
        cores: int | None = None,
    ) -> None:
        self.progress: Progress = progress or (lambda settings: None)
        self.mesh = Mesh(np.array(jax.devices()), ("settings",))
        self.compilations = 0
        on_cpu = jax.default_backend() == "cpu"
        best: Placement = "sequential" if on_cpu else "vectorised"
        self.placement = best if placement == "auto" else placement
        # A second chunk on a CPU keeps the cores busy where the first one is in a serial part: per
        # setting, 4.0 → 3.5 ms a step at batch 256 and 1.2 → 0.86 ms at batch 32 (D 1024, 2 cores).
        alone = not on_cpu or self.mesh.size > 1
        cores = cores or len(os.sched_getaffinity(0))
        self._at_once = 1 if alone else min(cores, MOST_AT_ONCE)
        self._begun: dict[Hashable, tuple[Task, Chunk]] = {}
        # One pool for all runs: under cross-validation the folds are run in step.
        self._pool = ThreadPoolExecutor(
            self._at_once, thread_name_prefix="train", initializer=own_jax_in_thread
        )

    def run(
        self,
        method: Method,
        settings: Sequence[Setting],
        task: Task,
        *,
        first: int = 0,
        stop: int | None = None,
        states: Sequence[Callable[[], Leaves]] = (),
    ) -> Iterator[Chunk]:
        """Train settings that share a program from epoch `first` to `stop` (by default the last),
        chunk by chunk.

        states: one function per setting that gives its state at `first`, needed where that is
            not 0.
        """
        begun = None if first else self._begun.pop(_name(method, settings, task, stop), None)
        if begun:
            share = (stop or settings[0]["epochs"]) / settings[0]["epochs"]
            self.progress(len(settings) * share)
            yield begun[1]
        else:
            yield from self._chunks(Grid.of(method, settings, task), first, stop, states)

    def begin(
        self, method: Method, settings: Sequence[Setting], tasks: Sequence[Task], stop: int | None
    ) -> None:
        """Train settings on several tasks of one cache in one launch, for a `run` of each that
        follows, from epoch 0 to `stop`; nothing where settings do not run side by side, where
        shapes differ, and where all of it is more than one chunk: a few settings leave a device
        waiting for launches, many do not.
        """
        shapes = {str(jax.tree.map(np.shape, task)) for task in tasks}
        if self.placement == "sequential" or len(tasks) < 2 or len(shapes) > 1:
            return
        grid = Grid.of(method, settings, *tasks)
        if self._chunk_size(grid) < len(settings):
            return
        (chunk,) = self._chunks(grid, 0, stop)
        state = jax.device_get(chunk.state)  # so that tasks which wait take no room on the device
        for number, task in enumerate(tasks):
            own = jax.tree.map(itemgetter(number), state)
            done = replace(chunk, state=own, seconds=chunk.seconds / len(tasks))
            self._begun[_name(method, settings, task, stop)] = task, done

    def _chunks(
        self,
        grid: Grid,
        first: int,
        stop: int | None,
        states: Sequence[Callable[[], Leaves]] = (),
    ) -> Iterator[Chunk]:
        numbers, epochs = grid.numbers, int(grid.static["epochs"])
        size = self._chunk_size(grid)
        program = self._program(grid, size)
        last = epochs if stop is None else stop
        cancelled = threading.Event()
        task = grid.joined_task()
        drawings = [kept_draws(one, grid.static) for one in grid.tasks]

        def advanced(
            indices: Sequence[int], start: int, end: int, state: RunState | None = None
        ) -> RunState:
            """state: at epoch `start`; None for that of the first one."""
            # The last chunk is filled up with copies, so that one program serves all.
            filled = [indices[min(row, len(indices) - 1)] for row in range(size)]
            stacked: Setting = {
                name: np.tile(
                    np.array([numbers[index][name] for index in filled], np.float32),
                    (*grid.leading, 1),
                )
                for name in numbers[0]
            }
            if state is None:
                state = program.initial_states(task, stacked)
            for drawing, epoch, until in program.calls(start, end):
                if cancelled.is_set():
                    raise Cancelled
                drawn = joined([of_task(drawing) for of_task in drawings])
                state = program(task, drawn, stacked, state, epoch, until, end)
                self.progress(len(indices) * (until - epoch) / epochs)
            return state

        def leaves_at_first(index: int) -> Leaves:
            try:
                leaves = states[index]()
            except KeyError:
                leaves = []
            if program.fits(leaves):
                return leaves
            # It was lost or damaged since it was kept; what it held can be had again.
            state = advanced([index], 0, first)
            return Chunk([index], state, 0.0).row(0)

        def train(start: int) -> Chunk:
            started = time.perf_counter()
            indices = list(range(start, min(start + size, len(numbers))))
            state = None
            if first:
                rows = [leaves_at_first(index) for index in indices]
                rows += [rows[-1]] * (size - len(rows))
                state = program.states(rows)
            state = advanced(indices, first, last, state)
            return Chunk(indices, state, time.perf_counter() - started)

        try:
            yield from self._in_order(train, range(0, len(numbers), size))
        finally:
            cancelled.set()

    def _in_order(self, train: Callable[[int], Chunk], starts: Sequence[int]) -> Iterator[Chunk]:
        """train(start) for each, in order, some at a time and no further ahead than that."""
        if min(self._at_once, len(starts)) < 2:
            yield from map(train, starts)
            return
        running: deque[Future[Chunk]] = deque()
        try:
            for start in starts:
                running.append(self._pool.submit(train, start))
                if len(running) == self._at_once:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()

    def _chunk_size(self, grid: Grid) -> int:
        devices, settings = self.mesh.size, len(grid.numbers)
        if self.placement == "sequential":
            return devices
        most = LARGEST_CHUNK
        memory = self.mesh.devices.flat[0].memory_stats()
        if memory:
            most = max(1, min(most, int(memory["bytes_limit"] * MEMORY_SHARE / _bytes_of(grid))))
        most = most // len(grid.tasks)
        if not most:
            return 0
        # Chunks as equal as can be, so that the last one is not filled up with many copies.
        chunks = -(-settings // (devices * most))
        return devices * -(-settings // (devices * chunks))

    def _program(self, grid: Grid, size: int) -> Program:
        # Compiling takes seconds, in which the main thread could not be interrupted.
        compiling = self._pool.submit(program_of, grid, size, self.placement, self.mesh)
        program, is_new = compiling.result()
        self.compilations += is_new
        return program


def _name(method: Method, settings: Sequence[Setting], task: Task, stop: int | None) -> Hashable:
    """Of what a run does. The task, which has to be kept beside it, is told by its identity."""
    return method, str([*map(dict, settings)]), id(task), stop


def _bytes_of(grid: Grid) -> int:
    """Device memory of one setting: states in and out, gradients, activations of the widest batch.

    An activation row is D wide about eight times over (features, hidden and blended values,
    their normalised forms and gradients) and C wide about four times (logits to gradients).
    """
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(grid.abstract_state()))
    classes, dim = grid.task.head.weights.shape
    _, batch = steps_and_batch(grid.task.features.shape[1], grid.static)
    rows = max(batch, len(grid.task.validation_labels), classes)
    return 3 * state_bytes + rows * (8 * dim + 4 * classes) * 4
