"""CLIP-Adapter's parameters as Flax NNX modules, whose calls are clip_adapter.py's formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx

from clip_adapter.adapters.formulas import cosine_logits, sigmoid
from clip_adapter.adapters.method import Setting, Task, Value
from clip_adapter.adapters.methods.clip_adapter import RATIOS, blended, bottleneck, predicted_ratio

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# PyTorch's nn.Linear draws from U(±1/√fan_in); variance_scaling draws from U(±√(3 scale/fan_in)).
torch_linear_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
HYPER_NETWORK_WIDTH = 32
# A start of exactly 0 or 1 has no finite logit.
EDGE = 1e-4


class Bottleneck(nnx.Module):
    """A(x); D → D/r → D.

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

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        return bottleneck(jnp, x, self.down.kernel[...], self.up.kernel[...])


class FixedRatio(nnx.Module):
    """The same constant for every row; it is not trained."""

    def __init__(self, value: Value) -> None:
        self.value = nnx.data(jnp.asarray(value, jnp.float32))

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, ""]:
        return self.value


class LearnedRatio(nnx.Module):
    """One trained scalar, sigmoid(λ), the same for every row."""

    def __init__(self, start: Value) -> None:
        self.logit = nnx.Param(_logit(start))

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, ""]:
        return sigmoid(jnp, self.logit[...])


class HyperNetwork(nnx.Module):
    """A ratio for each row. Its direction starts at zero: all rows start at the same ratio."""

    def __init__(self, dim: int, start: Value, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(dim, HYPER_NETWORK_WIDTH, use_bias=False, rngs=rngs)
        self.direction = nnx.Param(jnp.zeros((HYPER_NETWORK_WIDTH, 1)))
        self.logit = nnx.Param(_logit(start))

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N 1"]:
        return predicted_ratio(
            jnp, x, self.hidden.kernel[...], self.direction[...], self.logit[...]
        )


class ResidualAdapter(nnx.Module):
    """x* of one branch, with the kind of ratio that the setting names."""

    def __init__(self, setting: Setting, branch: str, dim: int, *, rngs: nnx.Rngs) -> None:
        name = RATIOS[branch]
        self.bottleneck = Bottleneck(dim, int(setting["reduction"]), rngs=rngs)
        self.ratio: FixedRatio | LearnedRatio | HyperNetwork
        if setting[name] == "learned":
            self.ratio = LearnedRatio(setting[f"{name}_init"])
        elif setting[name] == "hypernet":
            self.ratio = HyperNetwork(dim, setting[f"{name}_init"], rngs=rngs)
        else:
            self.ratio = FixedRatio(setting[name])

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        return blended(x, self.bottleneck(x), self.ratio(x))


class ClipAdapter(nnx.Module):
    """Adapters on the image features, on the classifier weights, or on both."""

    def __init__(self, setting: Setting, task: Task, *, rngs: nnx.Rngs) -> None:
        dim = task.head.weights.shape[1]

        def adapter(branch: str) -> ResidualAdapter | None:
            there = setting["branch"] in (branch, "both")
            return nnx.data(ResidualAdapter(setting, branch, dim, rngs=rngs) if there else None)

        self.image, self.text = adapter("image"), adapter("text")

    def __call__(self, features: Float[Array, "N D"], task: Task) -> Float[Array, "N C"]:
        """The logits of image features, un-normalised."""
        head = task.head
        if self.image is not None:
            features = self.image(features)
        if self.text is not None:
            head = head._replace(weights=self.text(head.weights))
        return cosine_logits(jnp, features, head)


def _logit(value: Value) -> Float[Array, ""]:
    inside = jnp.clip(jnp.asarray(value, jnp.float32), EDGE, 1 - EDGE)
    return jnp.log(inside) - jnp.log1p(-inside)
