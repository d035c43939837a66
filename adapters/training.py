"""Train one CLIP-Adapter: a pure function from settings, task and state to the next state.

A run is divided into epochs so that it can be advanced piece by piece: `advance` takes it from one
epoch to a later one, and advancing 0 → 5 → 10 gives what 0 → 10 gives. A grid of runs is the same
function over stacked hyper-parameters and states (engine.py).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from clip_adapter.adapters import classifier
from clip_adapter.adapters.clip_adapter import Architecture, ClipAdapter, abstract_adapter
from clip_adapter.adapters.ratio import Constant


@dataclass(frozen=True)
class Schedule:
    """How long and in which steps a run trains (static in the compiled program).

    batch_size: images per step at most; the batches of an epoch are of equal size.
    evaluate_every: epochs between evaluations on the validation set; the last epoch always counts.
    warmup: `linear` raises the learning rate over the first tenth of the steps (at most 100);
        `constant` holds it at 1e-5 for the first epoch, as the official implementation does.
        After the warm-up it falls to zero along a half cosine.
    drop_last: leave out an epoch's last batch where it would be smaller than batch_size, as
        PyTorch's DataLoader does on request, instead of making all batches a little smaller.
    """

    epochs: int = 200
    batch_size: int = 256
    evaluate_every: int = 5
    optimizer: Literal["adamw", "sgd"] = "adamw"
    warmup: Literal["linear", "constant"] = "linear"
    drop_last: bool = False

    @property
    def evaluations(self) -> int:
        return -(-self.epochs // self.evaluate_every)

    def evaluated_epochs(self) -> list[int]:
        """The epochs (from 1) after which validation is evaluated."""
        every, last = self.evaluate_every, self.epochs
        return [*range(every, last, every), last]


class HyperParameters(NamedTuple):
    """What a compiled program takes as numbers: each a float or () float32, stacked (K,) in a grid.

    alpha, beta: the fixed residual ratios, or the values learned ones start from, in [0, 1].
    """

    alpha: ArrayLike
    beta: ArrayLike
    learning_rate: ArrayLike
    weight_decay: ArrayLike


class Task(NamedTuple):
    """The arrays of one (cache, shots, seed).

    features: (V, S, D) float32, the support set; V > 1 draws a view per sample and step.
    labels: (S,) int32. validation_features: (M, D); validation_labels: (M,).
    weights: (C, D), zero-shot classifier weights. logit_scale, logit_bias: ().
    seed: () integer, decides initialisation and batch order. All settings of a task share it, so
    that a vectorised grid gathers each batch once.
    """

    features: jax.Array
    labels: jax.Array
    validation_features: jax.Array
    validation_labels: jax.Array
    weights: jax.Array
    logit_scale: jax.Array
    logit_bias: jax.Array
    seed: jax.Array


class RunState(NamedTuple):
    """A run between two epochs.

    best: the parameters after the best evaluated epoch: highest validation accuracy, ties broken
    by the lower negative log-likelihood, then by the earlier epoch. history: (E, 2) float32,
    accuracy and negative log-likelihood at each evaluation, NaN where not reached.
    """

    parameters: nnx.State
    constants: nnx.State
    optimizer: optax.OptState
    best: nnx.State
    best_evaluation: jax.Array
    history: jax.Array


def advance(
    architecture: Architecture,
    schedule: Schedule,
    task: Task,
    hyper: HyperParameters,
    state: RunState,
    start: ArrayLike,
    stop: ArrayLike,
) -> RunState:
    """Train from epoch `start` to epoch `stop`; `start` 0 initialises and ignores `state`."""
    epoch = partial(_epoch, architecture, schedule, task, hyper)
    state = jax.lax.cond(
        start == 0, lambda: initial_state(architecture, schedule, task, hyper), lambda: state
    )
    return jax.lax.fori_loop(start, stop, epoch, state)


def initial_state(
    architecture: Architecture, schedule: Schedule, task: Task, hyper: HyperParameters
) -> RunState:
    """The state before the first epoch."""
    dim = task.weights.shape[1]
    key = jax.random.fold_in(jax.random.key(task.seed), 0)
    ratios = jnp.asarray(hyper.alpha), jnp.asarray(hyper.beta)
    model = ClipAdapter(architecture, dim, *ratios, rngs=nnx.Rngs(key))
    _, parameters, constants = nnx.split(model, nnx.Param, Constant)  # type: ignore[misc]
    return RunState(
        parameters=parameters,
        constants=constants,
        optimizer=_optimizer(schedule, task, hyper).init(parameters),
        best=parameters,
        best_evaluation=jnp.int32(-1),
        history=jnp.full((schedule.evaluations, 2), jnp.nan),
    )


def steps_and_batch(support: int, schedule: Schedule) -> tuple[int, int]:
    """Steps of an epoch and rows of a step, for S support images."""
    if schedule.drop_last and support >= schedule.batch_size:
        return support // schedule.batch_size, schedule.batch_size
    steps = -(-support // schedule.batch_size)
    return steps, -(-support // steps)


def _epoch(
    architecture: Architecture,
    schedule: Schedule,
    task: Task,
    hyper: HyperParameters,
    epoch: jax.Array,
    state: RunState,
) -> RunState:
    views, support, _ = task.features.shape
    steps, batch = steps_and_batch(support, schedule)
    key = jax.random.fold_in(jax.random.key(task.seed), epoch + 1)
    order_key, view_key = jax.random.split(key)
    # Every image once (unless drop_last); the last batch is filled up with rows of weight zero.
    order = jax.random.permutation(order_key, support)[: steps * batch]
    rows = jnp.pad(order, (0, steps * batch - len(order))).reshape(steps, batch)
    counts = (jnp.arange(steps * batch) < support).reshape(steps, batch)
    drawn = jax.random.randint(view_key, rows.shape, 0, views)
    optimizer = _optimizer(schedule, task, hyper)

    def images(row: jax.Array, view: jax.Array) -> tuple[jax.Array, jax.Array]:
        if views > 1:
            return task.features[view, row], task.labels[row]
        # In a batch of all images their order means nothing, and collecting them costs 4 % of a
        # step (256 images, D = 1024, CPU).
        if batch == support:
            return task.features[0], task.labels
        return task.features[0, row], task.labels[row]

    def step(
        carry: tuple[nnx.State, optax.OptState], inputs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[nnx.State, optax.OptState], None]:
        parameters, optimizer_state = carry
        row, view, weight = inputs
        gradient = jax.grad(_loss)(
            parameters,
            state.constants,
            architecture,
            task,
            *images(row, view),
            weight,
        )
        gradient = _together(gradient)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters)
        return (optax.apply_updates(parameters, updates), optimizer_state), None

    (parameters, optimizer_state), _ = jax.lax.scan(
        step, (state.parameters, state.optimizer), (rows, drawn, counts)
    )
    state = state._replace(parameters=parameters, optimizer=optimizer_state)
    done = epoch + 1
    due = (done % schedule.evaluate_every == 0) | (done == schedule.epochs)
    return jax.lax.cond(
        due, partial(_evaluate, architecture, schedule, task, epoch), lambda state: state, state
    )


def _together(gradient: nnx.State) -> nnx.State:
    """The same gradient, no leaf of which can be used before all of them are there.

    By then the backward pass has read every kernel, and XLA updates them in place. Without this it
    copies some at every step (4 % of it at D = 1024 and batch 256 on a CPU); an
    optimization_barrier is taken away before XLA decides on copies. Infinity becomes NaN in all
    leaves, and such a run has diverged anyway.
    """
    leaves, structure = jax.tree.flatten(gradient)
    nothing = sum(0 * leaf.ravel()[0] for leaf in leaves)
    return jax.tree.unflatten(structure, [leaf + nothing for leaf in leaves])


def _loss(
    parameters: nnx.State,
    constants: nnx.State,
    architecture: Architecture,
    task: Task,
    features: jax.Array,
    labels: jax.Array,
    counts: jax.Array,
) -> jax.Array:
    """Mean cross-entropy over the rows that count."""
    logits = adapted_logits(
        architecture,
        parameters,
        constants,
        features,
        task.weights,
        task.logit_scale,
        task.logit_bias,
    )
    losses = classifier.cross_entropy(logits, labels)
    return jnp.sum(losses * counts) / jnp.sum(counts)


def adapted_logits(
    architecture: Architecture,
    parameters: nnx.State,
    constants: nnx.State,
    features: jax.Array,
    weights: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
) -> jax.Array:
    """Logits (N, C) of the adapter with these parameters; features (N, D), weights (C, D)."""
    graph = nnx.graphdef(abstract_adapter(architecture, weights.shape[1]))
    model = nnx.merge(graph, parameters, constants)
    return model(features, weights, logit_scale, logit_bias)


def _evaluate(
    architecture: Architecture, schedule: Schedule, task: Task, epoch: jax.Array, state: RunState
) -> RunState:
    """Record validation accuracy and negative log-likelihood, and keep the best parameters."""
    if not len(task.validation_labels):
        return state._replace(best=state.parameters, best_evaluation=_index(schedule, epoch))
    logits = adapted_logits(
        architecture,
        state.parameters,
        state.constants,
        task.validation_features,
        task.weights,
        task.logit_scale,
        task.logit_bias,
    )
    now = jnp.stack(
        [
            classifier.accuracy(logits, task.validation_labels),
            jnp.mean(classifier.cross_entropy(logits, task.validation_labels)),
        ]
    )
    index = _index(schedule, epoch)
    best = state.history[state.best_evaluation]
    better = (
        (state.best_evaluation < 0)
        | (now[0] > best[0])
        | ((now[0] == best[0]) & (now[1] < best[1]))
    )
    return state._replace(
        best=jax.tree.map(partial(jnp.where, better), state.parameters, state.best),
        best_evaluation=jnp.where(better, index, state.best_evaluation),
        history=state.history.at[index].set(now),
    )


def _index(schedule: Schedule, epoch: jax.Array) -> jax.Array:
    return (epoch // schedule.evaluate_every).astype(jnp.int32)


def _optimizer(
    schedule: Schedule, task: Task, hyper: HyperParameters
) -> optax.GradientTransformation:
    """AdamW, or SGD with momentum 0.9 and L2 decay (PyTorch's), under the schedule's rate."""
    steps, _ = steps_and_batch(task.features.shape[1], schedule)
    rate = partial(_learning_rate, schedule, steps, hyper.learning_rate)
    if schedule.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=hyper.weight_decay)
    return optax.chain(optax.add_decayed_weights(hyper.weight_decay), optax.sgd(rate, momentum=0.9))


def _learning_rate(
    schedule: Schedule, steps_per_epoch: int, peak: ArrayLike, step: jax.Array
) -> jax.Array:
    total = schedule.epochs * steps_per_epoch
    if schedule.warmup == "constant":
        # Dassl's ConstantWarmupScheduler over CosineAnnealingLR, stepped per epoch: the cosine
        # begins when the warm-up ends, and so stops one step short of zero.
        epoch = step // steps_per_epoch
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * (epoch - 1) / schedule.epochs))
        return jnp.where(epoch < 1, 1e-5, peak * cosine)
    warm = min(100, total // 10)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * (step - warm) / max(1, total - warm)))
    return jnp.asarray(peak) * jnp.where(step < warm, (step + 1) / max(1, warm), cosine)
