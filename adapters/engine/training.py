"""Train one setting of any method: a pure function from setting, task and state to the next state.

A run is divided into epochs so that it can be advanced piece by piece: `advance` takes it from one
epoch to a later one, and advancing 0 → 5 → 10 gives what 0 → 10 gives. A grid of runs is the same
function over stacked numbers and states (program.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from clip_adapter.adapters import optimisation
from clip_adapter.adapters.engine.epoch_draws import Draws, epoch_keys
from clip_adapter.adapters.engine.evaluation import Score
from clip_adapter.adapters.engine.scoring import Scored, validation_score
from clip_adapter.adapters.formulas import mean_cross_entropy
from clip_adapter.adapters.method import Arrays, Batch, Classify, Method, Setting, Task

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

    Epoch = int | Int[Array, ""]


class RunState(NamedTuple):
    """A run between two epochs; dictionaries of arrays by name.

    trained: what the optimiser moves. best: of a run that keeps its best epoch, `trained` after
    that one (the earliest of equal ones); else empty. best_evaluation: its row of `history`, −1
    before the first. history: (E, 2), accuracy and negative log-likelihood at each evaluation, NaN
    where not reached; of a run that keeps its last epoch (1, 2), those after the last one so far.
    right, losses: of each validation image under the kept parameters, as in scoring.Scored.
    """

    trained: Arrays
    optimizer: optax.OptState
    best: Arrays
    best_evaluation: Int[Array, ""]
    history: Float[Array, "E score=2"]
    right: Bool[Array, " M"]
    losses: Float[Array, " M"]


@dataclass(frozen=True)
class Run:
    """One setting on one task; within a program the numbers of both are traced.

    constants: what the formula takes of the start and the optimiser does not move, once known.
    """

    method: Method
    setting: Setting
    task: Task
    constants: Arrays = field(default_factory=dict)

    def start(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what is trained, what stays): the arrays before the first step."""
        if self.method.network:
            rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(self.task.seed), 0))
            return _parameters(self._module(rngs)), {}
        arrays = self.method.fit(jnp, self.task, self.setting)
        trained = {name: arrays[name] for name in self.method.trained}
        return trained, {name: array for name, array in arrays.items() if name not in trained}

    def initial_state(self) -> RunState:
        """The state before the first epoch."""
        trained, _ = self.start()
        evaluations = len(optimisation.evaluated_epochs(self.setting)) if self._keeps_best else 1
        return RunState(
            trained=trained,
            optimizer=self._optimizer().init(trained),
            best=trained if self._keeps_best else {},
            best_evaluation=jnp.int32(-1),
            history=jnp.full((evaluations, 2), jnp.nan),
            right=jnp.zeros(len(self.task.validation_labels), bool),
            losses=jnp.zeros(len(self.task.validation_labels), jnp.float32),
        )

    def advance(
        self, draws: Draws, state: RunState, first: Epoch, stop: Epoch, judged: Epoch
    ) -> RunState:
        """Train from epoch `first` to `stop`.

        draws: those of some epochs, with these among them (epoch_draws.py).
        judged: the epoch after which a run that keeps its last epoch is evaluated.
        """
        # Not part of the state: what depends on no number is there once for all settings of a
        # chunk.
        run = self._with_constants()
        state = jax.lax.fori_loop(first, stop, partial(run._epoch, draws), state)
        if self._keeps_best:
            return state
        return jax.lax.cond(stop == judged, run._judge, lambda state: state, state)

    def classify(self, trained: Arrays) -> Classify:
        """features → logits with these arrays."""
        module: Any = self._module(nnx.Rngs(0)) if self.method.network else None
        if callable(module):
            filled = _filled(module, trained)
            return lambda features: filled(features, self.task)
        seen = self.method.during_training(self.setting)
        arrays = {**self.constants, **trained}
        return lambda features: self.method.logits(jnp, arrays, seen, features, self.task.head)

    def fitted(self, trained: Arrays) -> Arrays:
        """What is saved where the trained arrays are these."""
        arrays = {**self._with_constants().constants, **trained}
        finish = self.method.finish
        finished = finish(arrays, self.setting, self.task) if finish else arrays
        # What the loss alone needs is not saved.
        return {name: array for name, array in finished.items() if name in self.method.shapes}

    @property
    def _keeps_best(self) -> bool:
        return self.setting["epoch"] == "best"

    def _module(self, rngs: nnx.Rngs) -> nnx.Module:
        """The method's network, with parameters drawn from `rngs`."""
        module, name = self.method.network.split(":")
        return getattr(import_module(module), name)(self.setting, self.task, rngs=rngs)

    def _with_constants(self) -> Run:
        # A network has nothing of the kind, and need not be drawn for it.
        return self if self.method.network else replace(self, constants=self.start()[1])

    def _optimizer(self) -> optax.GradientTransformation:
        steps, _ = optimisation.steps_and_batch(self.task.features.shape[1], self.setting)
        if self.method.optimizer:
            return self.method.optimizer(self.setting, self.task, steps)
        return optimisation.optimizer(self.setting, steps)

    def _loss(self, trained: Arrays, batch: Batch) -> Float[Array, ""]:
        classify = self.classify(trained)
        if self.method.loss:
            arrays = {**self.constants, **trained}
            return self.method.loss(jnp, classify, arrays, batch, self.setting, self.task)
        return mean_cross_entropy(jnp, classify(batch.features), batch)

    def _epoch(self, draws: Draws, epoch: Int[Array, ""], state: RunState) -> RunState:
        task = self.task
        views, support, _ = task.features.shape
        steps, size = optimisation.steps_and_batch(support, self.setting)
        # Every image once (unless drop_last); the last batch is filled up with rows of weight zero.
        counts = (jnp.arange(steps * size) < support).reshape(steps, size)
        rows, chosen = (several[epoch % len(several)] for several in draws)
        _, _, key = epoch_keys(task.seed, epoch)
        optimizer = self._optimizer()

        def images(row: Int[Array, " B"], view: Int[Array, " B"]) -> tuple[Array, Array]:
            if views > 1:
                return task.features[view, row], task.labels[row]
            # In a batch of all images their order means nothing, and collecting them costs 4 % of a
            # step (256 images, D = 1024, CPU).
            if size == support:
                return task.features[0], task.labels
            return task.features[0, row], task.labels[row]

        def step(carry: Any, inputs: Any) -> tuple[Any, None]:
            trained, moments = carry
            number, row, view, count = inputs
            shown, labels = images(row, view)
            if task.class_weights is not None:
                count = count * task.class_weights[labels]
            batch = Batch(shown, labels, count, jax.random.fold_in(key, number))
            gradient = _together(jax.grad(self._loss)(trained, batch))
            updates, moments = optimizer.update(gradient, moments, trained)
            return (optax.apply_updates(trained, updates), moments), None

        (trained, moments), _ = jax.lax.scan(
            step, (state.trained, state.optimizer), (jnp.arange(steps), rows, chosen, counts)
        )
        state = state._replace(trained=trained, optimizer=moments)
        if not self._keeps_best:
            return state
        done = epoch + 1
        due = (done % self.setting["evaluate_every"] == 0) | (done == self.setting["epochs"])
        return jax.lax.cond(due, partial(self._keep_best, epoch), lambda state: state, state)

    def _score(self, trained: Arrays) -> Scored:
        return validation_score(self.classify(trained), self.task)

    def _judge(self, state: RunState) -> RunState:
        """Record how the parameters do on the validation data."""
        if not len(self.task.validation_labels):
            return state
        now = self._score(state.trained)
        return state._replace(history=now.score[None], right=now.right, losses=now.losses)

    def _keep_best(self, epoch: Int[Array, ""], state: RunState) -> RunState:
        """The same on the way, and keep the best parameters."""
        index = (epoch // self.setting["evaluate_every"]).astype(jnp.int32)
        if not len(self.task.validation_labels):
            return state._replace(best=state.trained, best_evaluation=index)
        now, right, losses = self._score(state.trained)
        best = state.history[state.best_evaluation]
        better = Score(now[0], -now[1]).beats(Score(best[0], -best[1]))
        better |= state.best_evaluation < 0
        return state._replace(
            best=jax.tree.map(partial(jnp.where, better), state.trained, state.best),
            best_evaluation=jnp.where(better, index, state.best_evaluation),
            history=state.history.at[index].set(now),
            right=jnp.where(better, right, state.right),
            losses=jnp.where(better, losses, state.losses),
        )


def _parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """What is trained, by path, such as `image/bottleneck/down/kernel`."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {_name(path): variable[...] for path, variable in flat}


def _filled(module: nnx.Module, arrays: Arrays) -> Any:
    """The module with these parameters; inside `jit` the drawing of its own falls away unused."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    state = {path: variable.replace(arrays[_name(path)]) for path, variable in flat}
    nnx.update(module, nnx.from_flat_state(state))
    return module


def _name(path: tuple[object, ...]) -> str:
    return "/".join(map(str, path))


def _together(gradient: Arrays) -> Arrays:
    """The same gradient, no leaf of which can be used before all of them are there.

    By then the backward pass has read every kernel, and XLA updates them in place. Without this it
    copies some at every step (4 % of it at D = 1024 and batch 256 on a CPU); an
    optimization_barrier is taken away before XLA decides on copies. Infinity becomes NaN in all
    leaves, and such a run has diverged anyway.
    """
    leaves, structure = jax.tree.flatten(gradient)
    nothing = sum(0 * leaf.ravel()[0] for leaf in leaves)
    return jax.tree.unflatten(structure, [leaf + nothing for leaf in leaves])
