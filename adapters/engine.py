"""Run a grid of settings through one compiled program per static signature.

A chunk of K settings is one call of the program: training (training.py) over stacked
hyper-parameters and states. Within a device the settings run one after another (`sequential`) or
side by side (`vectorised`); over several devices the chunk is sharded. The layout changes a result
by no more than float rounding.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clip_adapter.adapters.clip_adapter import Architecture
from clip_adapter.adapters.training import (
    HyperParameters,
    RunState,
    Schedule,
    Task,
    advance,
    initial_state,
)

Layout = Literal["auto", "sequential", "vectorised"]
Program = Callable[..., RunState]
Leaves = list[npt.NDArray[Any]]
"""A RunState on the host, as its leaves in tree order."""

# More settings than this are not vectorised at once: a guess, to be measured on a GPU.
LARGEST_CHUNK = 256
# Of the device memory, the share that a chunk may take; under cross-validation the chunks of up to
# four folds are there together.
MEMORY_SHARE = 0.2
# Threads that train on a CPU: more would multiply the memory of the validation logits.
MOST_AT_ONCE = 4


@dataclass(frozen=True)
class Chunk:
    """Some settings of a grid after training: `state` is stacked (K, …), row i is `indices[i]`.

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
    """Compiles programs and keeps them; `compilations` counts them.

    layout: `auto` takes `sequential` on a CPU, where one setting's parameters and moments fit the
        cache and many do not, and `vectorised` elsewhere, where one setting does not fill the
        device.
    """

    def __init__(self, layout: Layout = "auto") -> None:
        self.layout = layout
        self.mesh = Mesh(np.array(jax.devices()), ("settings",))
        self.compilations = 0
        self._programs: dict[Any, Program] = {}
        on_cpu = jax.default_backend() == "cpu"
        if layout == "auto":
            self.layout = "sequential" if on_cpu else "vectorised"
        # A second chunk on a CPU keeps the cores busy where the first one is in a serial part: per
        # setting, 4.0 → 3.5 ms a step at batch 256 and 1.2 → 0.86 ms at batch 32 (D 1024, 2 cores).
        self._at_once = (
            min(os.cpu_count() or 1, MOST_AT_ONCE) if on_cpu and self.mesh.size == 1 else 1
        )
        # One pool for all runs: under cross-validation the folds are run in step.
        self._pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="train")

    def run(
        self,
        architecture: Architecture,
        schedule: Schedule,
        task: Task,
        hypers: Sequence[HyperParameters],
        *,
        start: int = 0,
        stop: int | None = None,
        states: Sequence[Callable[[], Leaves]] = (),
    ) -> Iterator[Chunk]:
        """Train all settings from epoch `start` to `stop` (by default the last), chunk by chunk.

        hypers: one HyperParameters of plain numbers per setting. states: one function per setting
        that gives its state at `start`, needed where that is not 0.
        """
        size = self._chunk_size(architecture, schedule, task, len(hypers))
        program = self._program(architecture, schedule, task, size)
        end = schedule.epochs if stop is None else stop
        blank = jax.eval_shape(partial(initial_state, architecture, schedule, task), _numbers())
        structure = jax.tree.structure(blank)

        def train(first: int) -> Chunk:
            started = time.perf_counter()
            indices = list(range(first, min(first + size, len(hypers))))
            # The last chunk is filled up with copies, so that one program serves all.
            filled = [min(first + offset, len(hypers) - 1) for offset in range(size)]
            columns = zip(*(hypers[index] for index in filled), strict=True)
            stacked = HyperParameters(*(np.array(column, np.float32) for column in columns))
            if start:
                leaves = zip(*(states[index]() for index in filled), strict=True)
                state = jax.tree.unflatten(structure, [np.stack(leaf) for leaf in leaves])
            else:
                state = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), blank)
            trained = jax.block_until_ready(program(task, stacked, state, start, end))
            return Chunk(indices, trained, time.perf_counter() - started)

        yield from self._in_order(train, range(0, len(hypers), size))

    def _in_order(self, train: Callable[[int], Chunk], firsts: Sequence[int]) -> Iterator[Chunk]:
        """train(first) for each, in order, some at a time and no further ahead than that."""
        if min(self._at_once, len(firsts)) < 2:
            yield from map(train, firsts)
            return
        running: deque[Future[Chunk]] = deque()
        try:
            for first in firsts:
                running.append(self._pool.submit(train, first))
                if len(running) == self._at_once:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()

    def _chunk_size(
        self, architecture: Architecture, schedule: Schedule, task: Task, settings: int
    ) -> int:
        devices = self.mesh.size
        if self.layout == "sequential":
            return devices
        most = LARGEST_CHUNK
        memory = self.mesh.devices.flat[0].memory_stats()
        if memory:
            need = _setting_bytes(architecture, schedule, task)
            most = max(1, min(most, int(memory["bytes_limit"] * MEMORY_SHARE / need)))
        # Chunks as equal as can be, so that the last one is not filled up with many copies.
        chunks = -(-settings // (devices * most))
        return devices * -(-settings // (devices * chunks))

    def _program(
        self, architecture: Architecture, schedule: Schedule, task: Task, size: int
    ) -> Program:
        shapes = tuple(np.shape(array) for array in task)
        signature = (architecture, schedule, shapes, size)
        if signature not in self._programs:
            self._programs[signature] = self._compile(architecture, schedule, task, size)
            self.compilations += 1
        return self._programs[signature]

    def _compile(
        self, architecture: Architecture, schedule: Schedule, task: Task, size: int
    ) -> Program:
        def chunk(
            task: Task, hypers: HyperParameters, states: RunState, start: int, stop: int
        ) -> RunState:
            def one(pair: tuple[HyperParameters, RunState]) -> RunState:
                return advance(architecture, schedule, task, *pair, start, stop)

            if self.layout == "sequential":
                return jax.lax.map(one, (hypers, states))
            return jax.vmap(lambda *pair: one(pair))(hypers, states)

        sharded = jax.shard_map(
            chunk,
            mesh=self.mesh,
            in_specs=(P(), P("settings"), P("settings"), P(), P()),
            out_specs=P("settings"),
            check_vma=False,
        )
        program = jax.jit(sharded, donate_argnums=2)
        hypers = _numbers(size)
        states = jax.eval_shape(
            jax.vmap(partial(initial_state, architecture, schedule, task)), hypers
        )
        epoch = jax.ShapeDtypeStruct((), jnp.int32)
        with jax.default_matmul_precision("tensorfloat32"):
            return program.lower(task, hypers, states, epoch, epoch).compile()


def _numbers(*shape: int) -> HyperParameters:
    """Abstract HyperParameters."""
    numbers: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.float32)] * len(HyperParameters._fields)
    return HyperParameters(*numbers)


def _setting_bytes(architecture: Architecture, schedule: Schedule, task: Task) -> int:
    """Device memory of one setting: states in and out, gradients, activations of the widest batch.

    An activation row is D wide about eight times over (features, hidden and blended values,
    their normalised forms and gradients) and C wide about four times (logits to gradients).
    """
    state = jax.eval_shape(partial(initial_state, architecture, schedule, task), _numbers())
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    classes, dim = task.weights.shape
    rows = max(schedule.batch_size, len(task.validation_labels), classes)
    return 3 * state_bytes + rows * (8 * dim + 4 * classes) * 4
