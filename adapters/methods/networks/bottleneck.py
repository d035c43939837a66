"""CLIP-Adapter's parameters as Flax NNX modules; their formula is in clip_adapter.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx

from clip_adapter.adapters.method import Setting, Task, Value
from clip_adapter.adapters.methods.clip_adapter import RATIOS

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# PyTorch's nn.Linear draws from U(±1/√fan_in); variance_scaling draws from U(±√(3 scale/fan_in)).
torch_linear_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
HYPER_NETWORK_WIDTH = 32
# A start of exactly 0 or 1 has no finite logit.
EDGE = 1e-4


class Bottleneck(nnx.Module):
    """D → D/r → D.

    Raises ValueError where r leaves no hidden unit.
    """

    def __init__(self, dim: int, reduction: int, *, rngs: nnx.Rngs) -> None:
        if reduction > dim:
            raise ValueError(
                f"a reduction of {reduction} leaves no hidden unit: the features have {dim} numbers"
            )
        hidden = dim // reduction

        def linear(wide: int, narrow: int) -> nnx.Linear:
            return nnx.Linear(
                wide, narrow, use_bias=False, kernel_init=torch_linear_init, rngs=rngs
            )

        self.down = linear(dim, hidden)
        self.up = linear(hidden, dim)


class LearnedRatio(nnx.Module):
    """One trained scalar."""

    def __init__(self, start: Value) -> None:
        self.logit = nnx.Param(_logit(start))


class HyperNetwork(nnx.Module):
    """A ratio for each row. Its direction starts at zero: all rows start at the same ratio."""

    def __init__(self, dim: int, start: Value, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(dim, HYPER_NETWORK_WIDTH, use_bias=False, rngs=rngs)
        self.direction = nnx.Param(jnp.zeros((HYPER_NETWORK_WIDTH, 1)))
        self.logit = nnx.Param(_logit(start))


class ResidualAdapter(nnx.Module):
    """What one branch trains, with the kind of ratio that the setting names."""

    def __init__(self, setting: Setting, branch: str, dim: int, *, rngs: nnx.Rngs) -> None:
        name = RATIOS[branch]
        self.bottleneck = Bottleneck(dim, int(setting["reduction"]), rngs=rngs)
        if setting[name] == "learned":
            self.ratio: LearnedRatio | HyperNetwork = LearnedRatio(setting[f"{name}_init"])
        elif setting[name] == "hypernet":
            self.ratio = HyperNetwork(dim, setting[f"{name}_init"], rngs=rngs)


class ClipAdapter(nnx.Module):
    """Adapters on the image features, on the classifier weights, or on both."""

    def __init__(self, setting: Setting, task: Task, *, rngs: nnx.Rngs) -> None:
        dim = task.head.weights.shape[1]
        if setting["branch"] != "text":
            self.image = ResidualAdapter(setting, "image", dim, rngs=rngs)
        if setting["branch"] != "image":
            self.text = ResidualAdapter(setting, "text", dim, rngs=rngs)


def _logit(value: Value) -> Float[Array, ""]:
    inside = jnp.clip(jnp.asarray(value, jnp.float32), EDGE, 1 - EDGE)
    return jnp.log(inside) - jnp.log1p(-inside)
