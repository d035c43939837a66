"""CLIP-Adapter (Gao et al., arXiv 2110.04544, section 3.2), as Flax NNX modules."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from clip_adapter.adapters.classifier import cosine_logits
from clip_adapter.adapters.ratio import RatioKind, make_ratio

Branch = Literal["image", "text", "both"]

# PyTorch's nn.Linear draws from U(±1/√fan_in); variance_scaling draws from U(±√(3 scale/fan_in)).
torch_linear_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class Architecture:
    """What decides the shapes of an adapter (static in the compiled program)."""

    branch: Branch = "image"
    reduction: int = 4
    image_ratio: RatioKind = "fixed"
    text_ratio: RatioKind = "fixed"


class Bottleneck(nnx.Module):
    """A(x) = ReLU(ReLU(x W1) W2), without biases; W1: D → D/r, W2: D/r → D (equation 3)."""

    def __init__(self, dim: int, reduction: int, *, rngs: nnx.Rngs) -> None:
        hidden = max(1, dim // reduction)
        self.down = nnx.Linear(
            dim, hidden, use_bias=False, kernel_init=torch_linear_init, rngs=rngs
        )
        self.up = nnx.Linear(hidden, dim, use_bias=False, kernel_init=torch_linear_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.up(jax.nn.relu(self.down(x))))


class ResidualAdapter(nnx.Module):
    """ρ·A(x) + (1 − ρ)·x with the residual ratio ρ (equations 4 and 5): (N, D) → (N, D)."""

    def __init__(
        self, dim: int, reduction: int, kind: RatioKind, start: jax.Array, *, rngs: nnx.Rngs
    ) -> None:
        self.bottleneck = Bottleneck(dim, reduction, rngs=rngs)
        self.ratio = make_ratio(kind, dim, start, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        ratio = self.ratio(x)
        return ratio * self.bottleneck(x) + (1 - ratio) * x


class ClipAdapter(nnx.Module):
    """Adapters on the image features, on the classifier weights, or on both.

    alpha, beta: () float32, the fixed ratio or the value from which it is learned.
    """

    def __init__(
        self,
        architecture: Architecture,
        dim: int,
        alpha: jax.Array,
        beta: jax.Array,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        reduction = architecture.reduction
        image = architecture.branch in ("image", "both")
        text = architecture.branch in ("text", "both")
        self.image = nnx.data(
            ResidualAdapter(dim, reduction, architecture.image_ratio, alpha, rngs=rngs)
            if image
            else None
        )
        self.text = nnx.data(
            ResidualAdapter(dim, reduction, architecture.text_ratio, beta, rngs=rngs)
            if text
            else None
        )

    def __call__(
        self,
        features: jax.Array,
        weights: jax.Array,
        logit_scale: jax.Array,
        logit_bias: jax.Array,
    ) -> jax.Array:
        """Logits (N, C) = scale · unit(f*) · unit(W*)ᵀ + bias.

        features: (N, D), un-normalised: the normalisation comes after the blend.
        weights: (C, D), the zero-shot classifier weights.
        """
        if self.image is not None:
            features = self.image(features)
        if self.text is not None:
            weights = self.text(weights)
        return cosine_logits(features, weights, logit_scale, logit_bias)


@lru_cache
def abstract_adapter(architecture: Architecture, dim: int) -> ClipAdapter:
    """An adapter of shapes without numbers, from which structure and names are read."""
    number = jax.ShapeDtypeStruct((), jnp.float32)
    return nnx.eval_shape(
        lambda alpha, beta: ClipAdapter(architecture, dim, alpha, beta, rngs=nnx.Rngs(0)),
        number,
        number,
    )
