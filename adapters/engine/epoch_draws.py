"""What chance decides of each epoch of a run: the order of the images, and their views.

It depends on the seed, not on the method or the setting. So it is drawn by a program of its own,
which would have to be compiled again within each training program. The settings of a run share what
is drawn, up to MOST_KEPT drawings; each of them draws again what is more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clip_adapter.adapters.method import Setting, Task
from clip_adapter.adapters.optimisation import steps_and_batch

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Int

# At most so many epochs are drawn at a time, and so many images, or one epoch that has more; so
# many drawings are kept.
MOST_EPOCHS = 64
MOST_IMAGES = 2**20
MOST_KEPT = 8


class Draws(NamedTuple):
    """Of `T` epochs with K steps of B images each.

    rows: the images of each step, with any row where the last batch is filled up; (T, K, 0) where
    every batch is all images, in which their order means nothing. views: of each image; (T, K, 0)
    where there is one.
    """

    rows: Int[Array, "T K B"]
    views: Int[Array, "T K B"]


def epoch_keys(seed: Int[Array, ""], epoch: Int[Array, ""]) -> tuple[Array, Array, Array]:
    """Those of the order, of the views, and of what losses draw."""
    key = jax.random.fold_in(jax.random.key(seed), epoch + 1)
    order, views = jax.random.split(key)
    return order, views, jax.random.fold_in(key, 2)


def epochs_per_drawing(support: int) -> int:
    """Epochs that are drawn at a time, for S support images."""
    return max(1, min(MOST_EPOCHS, MOST_IMAGES // support))


def draw(task: Task, static: Setting, number: int) -> Draws:
    """The `number`-th drawing: of epochs number · T … (number + 1) · T − 1, up to the last one."""
    views, support, _ = task.features.shape
    steps, size = steps_and_batch(support, static)
    length = epochs_per_drawing(support)
    if size == support and views == 1:
        nothing = jax.device_put(np.zeros((length, steps, 0), np.int32))
        return Draws(nothing, nothing)
    first = number * length
    stop = min(first + length, int(static["epochs"]))
    return _draw_epochs(task.seed, first, stop, length, support, views, steps, size)


def kept_draws(task: Task, static: Setting) -> Callable[[int], Draws]:
    """number → the draws; the last few are kept. Threads may draw the same ones at once."""
    return lru_cache(maxsize=MOST_KEPT)(partial(draw, task, static))


@partial(jax.jit, static_argnames=("length", "support", "views", "steps", "size"))
def _draw_epochs(
    seed: Int[Array, ""],
    first: Int[Array, ""],
    stop: Int[Array, ""],
    length: int,
    support: int,
    views: int,
    steps: int,
    size: int,
) -> Draws:
    """Those of epochs first … stop − 1, at the start of arrays of `length` epochs."""

    def of_epoch(epoch: Int[Array, ""]) -> Draws:
        """Without the first axis."""
        order_key, view_key, _ = epoch_keys(seed, epoch)
        order = jax.random.permutation(order_key, support)[: steps * size]
        rows = jnp.pad(order, (0, steps * size - len(order))).reshape(steps, size)
        chosen = jnp.zeros((steps, 0), jnp.int32)
        if views > 1:
            chosen = jax.random.randint(view_key, rows.shape, 0, views)
        return Draws(rows, chosen)

    def put(epoch: Int[Array, ""], drawn: Draws) -> Draws:
        return jax.tree.map(
            lambda several, one: several.at[epoch - first].set(one), drawn, of_epoch(epoch)
        )

    nothing = jax.tree.map(
        lambda one: jnp.zeros((length, *one.shape), one.dtype), jax.eval_shape(of_epoch, first)
    )
    return jax.lax.fori_loop(first, stop, put, nothing)
