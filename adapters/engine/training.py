"""Train one setting of any method: a pure function from setting, task and state to the next state.

A run is divided into epochs so that it can be advanced piece by piece: `advance` takes it from one
epoch to a later one, and advancing 0 → 5 → 10 gives what 0 → 10 gives. A grid of runs is the same
function over stacked numbers and states (engine.py).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from clip_adapter.adapters import optimisation as recipe
from clip_adapter.adapters.engine import modules as networks
from clip_adapter.adapters.engine.epoch_draws import Draws, epoch_keys
from clip_adapter.adapters.engine.scoring import Scored, validation_score
from clip_adapter.adapters.engine.shared_runs import during_training
from clip_adapter.adapters.formulas import mean_cross_entropy
from clip_adapter.adapters.method import Arrays, Batch, Classify, Method, Setting, Task

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

    Epoch = int | Int[Array, ""]


class RunState(NamedTuple):
    """A run between two epochs; dictionaries of arrays by name.

    trained: what the optimiser moves. best: of a run that keeps its best epoch, `trained` after
    that one: highest validation accuracy, ties broken by the lower negative log-likelihood, then
    by the earlier epoch; else empty. best_evaluation: its row of `history`, −1 before the first.
    history: (E, 2), accuracy and negative log-likelihood at each evaluation, NaN where not
    reached; of a run that keeps its last epoch (1, 2), those after the last one so far.
    right, losses: of each validation image under the kept parameters, as in scoring.Scored.
    """

    trained: Arrays
    optimizer: optax.OptState
    best: Arrays
    best_evaluation: Int[Array, ""]
    history: Float[Array, "E score=2"]
    right: Bool[Array, " M"]
    losses: Float[Array, " M"]


def advance(
    method: Method,
    static: Setting,
    task: Task,
    draws: Draws,
    numbers: Setting,
    state: RunState,
    first: Epoch,
    stop: Epoch,
    judged: Epoch,
) -> RunState:
    """Train from epoch `first` to `stop`.

    draws: those of some epochs, with these among them (draws.py).
    judged: the epoch after which a run that keeps its last epoch is evaluated.
    """
    setting = {**static, **numbers}
    # Not part of the state: what depends on no number is there once for all settings of a chunk.
    constants = _constants(method, task, setting)
    epoch = partial(_epoch, method, task, draws, setting, constants)
    state = jax.lax.fori_loop(first, stop, epoch, state)
    if setting["epoch"] == "best":
        return state
    return jax.lax.cond(
        stop == judged,
        partial(_judge, method, task, setting, constants),
        lambda state: state,
        state,
    )


def start(method: Method, task: Task, setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is trained, what stays): the arrays before the first step."""
    if method.network:
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(task.seed), 0))
        return networks.parameters(networks.make(method, setting, task, rngs)), {}
    arrays = method.fit(jnp, task, setting)
    trained = {name: arrays[name] for name in method.trained}
    return trained, {name: array for name, array in arrays.items() if name not in trained}


def _constants(method: Method, task: Task, setting: Setting) -> dict[str, Any]:
    """What of `start` stays; a network has nothing of the kind, and need not be drawn for it."""
    return {} if method.network else start(method, task, setting)[1]


def initial_state(method: Method, task: Task, setting: Setting) -> RunState:
    """The state before the first epoch."""
    trained, _ = start(method, task, setting)
    keeps_best = setting["epoch"] == "best"
    evaluations = len(recipe.evaluated_epochs(setting)) if keeps_best else 1
    return RunState(
        trained=trained,
        optimizer=_optimizer(method, task, setting).init(trained),
        best=trained if keeps_best else {},
        best_evaluation=jnp.int32(-1),
        history=jnp.full((evaluations, 2), jnp.nan),
        right=jnp.zeros(len(task.validation_labels), bool),
        losses=jnp.zeros(len(task.validation_labels), jnp.float32),
    )


def classifier(method: Method, task: Task, setting: Setting, arrays: Arrays) -> Classify:
    """features → logits with these arrays."""
    if method.network:
        module: Any = networks.filled(networks.make(method, setting, task, nnx.Rngs(0)), arrays)
        return lambda features: module(features, task)
    seen = during_training(method, setting)
    return lambda features: method.logits(jnp, arrays, seen, features, task.head)


def fitted(method: Method, setting: Setting, task: Task, trained: Arrays) -> Arrays:
    """What is saved of a run whose trained arrays are these."""
    arrays = {**_constants(method, task, setting), **trained}
    finished = method.finish(arrays, setting, task) if method.finish else arrays
    # What the loss alone needs is not saved.
    return {name: array for name, array in finished.items() if name in method.shapes}


def _optimizer(method: Method, task: Task, setting: Setting) -> optax.GradientTransformation:
    steps, _ = recipe.steps_and_batch(task.features.shape[1], setting)
    if method.optimizer:
        return method.optimizer(setting, task, steps)
    return recipe.optimizer(setting, steps)


def _epoch(
    method: Method,
    task: Task,
    draws: Draws,
    setting: Setting,
    constants: Arrays,
    epoch: Int[Array, ""],
    state: RunState,
) -> RunState:
    views, support, _ = task.features.shape
    steps, size = recipe.steps_and_batch(support, setting)
    # Every image once (unless drop_last); the last batch is filled up with rows of weight zero.
    counts = (jnp.arange(steps * size) < support).reshape(steps, size)
    rows, chosen = (several[epoch % len(several)] for several in draws)
    _, _, key = epoch_keys(task.seed, epoch)
    optimizer = _optimizer(method, task, setting)

    def images(row: Int[Array, " B"], view: Int[Array, " B"]) -> tuple[Array, Array]:
        if views > 1:
            return task.features[view, row], task.labels[row]
        # In a batch of all images their order means nothing, and collecting them costs 4 % of a
        # step (256 images, D = 1024, CPU).
        if size == support:
            return task.features[0], task.labels
        return task.features[0, row], task.labels[row]

    def loss(trained: Arrays, batch: Batch) -> Float[Array, ""]:
        arrays = {**constants, **trained}
        classify = classifier(method, task, setting, arrays)
        if method.loss:
            return method.loss(jnp, classify, arrays, batch, setting, task)
        return mean_cross_entropy(jnp, classify(batch.features), batch)

    def step(carry: Any, inputs: Any) -> tuple[Any, None]:
        trained, moments = carry
        number, row, view, count = inputs
        batch = Batch(*images(row, view), count, jax.random.fold_in(key, number))
        gradient = _together(jax.grad(loss)(trained, batch))
        updates, moments = optimizer.update(gradient, moments, trained)
        return (optax.apply_updates(trained, updates), moments), None

    (trained, moments), _ = jax.lax.scan(
        step, (state.trained, state.optimizer), (jnp.arange(steps), rows, chosen, counts)
    )
    state = state._replace(trained=trained, optimizer=moments)
    if setting["epoch"] != "best":
        return state
    done = epoch + 1
    due = (done % setting["evaluate_every"] == 0) | (done == setting["epochs"])
    keep = partial(_keep_best, method, task, setting, constants, epoch)
    return jax.lax.cond(due, keep, lambda state: state, state)


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


def _score(
    method: Method, task: Task, setting: Setting, constants: Arrays, trained: Arrays
) -> Scored:
    return validation_score(classifier(method, task, setting, {**constants, **trained}), task)


def _judge(
    method: Method, task: Task, setting: Setting, constants: Arrays, state: RunState
) -> RunState:
    """Record how the parameters do on the validation data."""
    if not len(task.validation_labels):
        return state
    now = _score(method, task, setting, constants, state.trained)
    return state._replace(history=now.score[None], right=now.right, losses=now.losses)


def _keep_best(
    method: Method,
    task: Task,
    setting: Setting,
    constants: Arrays,
    epoch: Int[Array, ""],
    state: RunState,
) -> RunState:
    """The same on the way, and keep the best parameters."""
    index = (epoch // setting["evaluate_every"]).astype(jnp.int32)
    if not len(task.validation_labels):
        return state._replace(best=state.trained, best_evaluation=index)
    now, right, losses = _score(method, task, setting, constants, state.trained)
    best = state.history[state.best_evaluation]
    better = (
        (state.best_evaluation < 0)
        | (now[0] > best[0])
        | ((now[0] == best[0]) & (now[1] < best[1]))
    )
    return state._replace(
        best=jax.tree.map(partial(jnp.where, better), state.trained, state.best),
        best_evaluation=jnp.where(better, index, state.best_evaluation),
        history=state.history.at[index].set(now),
        right=jnp.where(better, right, state.right),
        losses=jnp.where(better, losses, state.losses),
    )
