"""The trained side of CoOp as a Flax NNX module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx

from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.method import Setting, Task
from clip_adapter.adapters.methods.coop import BY_CLASS, GENERIC
from clip_adapter.adapters.methods.networks.coop_context import class_weights, initial_context

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class LearnedContext(nnx.Module):
    """Context vectors, (M, E) or (C, M, E).

    The tower is none of its attributes, but comes with the task: its parameters would be found
    among what is trained.
    """

    def __init__(self, setting: Setting, task: Task, *, rngs: nnx.Rngs) -> None:
        self.position = setting["position"]
        self.name = BY_CLASS if setting["class_specific"] else GENERIC
        start = initial_context(setting, rngs.params(), task.extra["tower"])
        setattr(self, self.name, nnx.Param(start))

    def __call__(self, features: Float[Array, "N D"], task: Task) -> Float[Array, "N C"]:
        context = getattr(self, self.name)[...]
        weights = class_weights(context, {"position": self.position}, task.extra["tower"])
        return cosine_logits(jnp, features, task.head._replace(weights=weights))
