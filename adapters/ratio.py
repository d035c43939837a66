"""The residual ratio: how much of the adapter's output is blended in.

Three kinds share one call: fixed (a constant), learned (one scalar) and predicted for each row by
a small hyper-network. The last two live in (0, 1) through a sigmoid and start at a given value.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from clip_adapter.adapters.classifier import unit

RatioKind = Literal["fixed", "learned", "hypernet"]
HIDDEN = 32

# A start of exactly 0 or 1 has no finite logit.
EDGE = 1e-4


class Constant(nnx.Variable):
    """A number that belongs to the adapter but is not trained."""


class FixedRatio(nnx.Module):
    """The same constant for every row."""

    def __init__(self, start: jax.Array) -> None:
        self.value = Constant(start)

    def __call__(self, rows: jax.Array) -> jax.Array:
        return self.value[...]


class LearnedRatio(nnx.Module):
    """One trained scalar, sigmoid(λ), the same for every row."""

    def __init__(self, start: jax.Array) -> None:
        self.logit = nnx.Param(_logit(start))

    def __call__(self, rows: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.logit[...])


class HyperNetwork(nnx.Module):
    """A ratio per row, sigmoid(v · ReLU(V unit(x)) + λ): (N, D) → (N, 1).

    v starts at zero, so that every row starts at the same ratio.
    """

    def __init__(self, dim: int, start: jax.Array, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(dim, HIDDEN, use_bias=False, rngs=rngs)
        self.direction = nnx.Param(jnp.zeros((HIDDEN, 1)))
        self.logit = nnx.Param(_logit(start))

    def __call__(self, rows: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(self.hidden(unit(rows)))
        return jax.nn.sigmoid(hidden @ self.direction[...] + self.logit[...])


Ratio = FixedRatio | LearnedRatio | HyperNetwork


def make_ratio(kind: RatioKind, dim: int, start: jax.Array, rngs: nnx.Rngs) -> Ratio:
    """A ratio of the given kind; `start` is its constant or the value it starts from."""
    if kind == "fixed":
        return FixedRatio(start)
    if kind == "learned":
        return LearnedRatio(start)
    return HyperNetwork(dim, start, rngs=rngs)


def _logit(value: jax.Array) -> jax.Array:
    inside = jnp.clip(value, EDGE, 1 - EDGE)
    return jnp.log(inside) - jnp.log1p(-inside)
