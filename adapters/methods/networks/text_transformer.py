"""CLIP's text transformer (Radford et al., arXiv 2103.00020, section 2.4) in Flax NNX, frozen.

    x ← x + positions;  x ← x + attention(norm(x));  x ← x + mlp(norm(x))  per block;
    feature = norm(x)[pooled] · projection

Its arrays are passed at each call and are nobody's attribute, so that what is trained around it
does not find them among its own parameters. Attention is causal: what stands behind the pooled
token does not reach it, and need not be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

# What a chunk of classes may keep for the backward pass. For RN50's tower, 120 classes, 26 tokens
# on 2 cores, chunks of 128 MiB to 1 GiB took equally long (9 s a step); one chunk of all, 6.6 s.
CHUNK_BYTES = 1 << 29

Tree = TypeVar("Tree")


@jax.tree_util.register_static
@dataclass(frozen=True)
class TowerShape:
    """The static side of a tower; the fields are those of the file beside the cache."""

    width: int
    heads: int
    layers: int
    mlp_width: int
    context_length: int
    embed_dim: int
    activation: str
    epsilon: float
    pooling: str
    projection: str

    @classmethod
    def of(cls, config: Any) -> TowerShape:
        """From anything that has these attributes."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


def quick_gelu(x: Array) -> Array:
    """x · sigmoid(1.702 x), of OpenAI's models."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
}


class Block(nnx.Module):
    """Causal attention and a two-layer perceptron, each on normalised input and added to it."""

    def __init__(self, shape: TowerShape, *, rngs: nnx.Rngs) -> None:
        self.activation = shape.activation
        self.ln_1 = _norm(shape, rngs)
        self.attention = nnx.MultiHeadAttention(shape.heads, shape.width, decode=False, rngs=rngs)
        self.ln_2 = _norm(shape, rngs)
        self.c_fc = nnx.Linear(shape.width, shape.mlp_width, rngs=rngs)
        self.c_proj = nnx.Linear(shape.mlp_width, shape.width, rngs=rngs)

    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        causal = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        x = x + self.attention(self.ln_1(x), mask=causal)
        return x + self.c_proj(ACTIVATIONS[self.activation](self.c_fc(self.ln_2(x))))


class TextTransformer(nnx.Module):
    """Token embeddings, L at most the context length, and places → text features."""

    def __init__(self, shape: TowerShape, *, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=shape.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(shape, rngs=rngs)

        self.positional_embedding = nnx.Param(jnp.zeros((shape.context_length, shape.width)))
        self.blocks = stacked(rngs)
        self.ln_final = _norm(shape, rngs)
        has_bias = shape.projection == "linear_with_bias"
        if shape.projection != "none":
            linear = nnx.Linear(shape.width, shape.embed_dim, use_bias=has_bias, rngs=rngs)
            self.text_projection = linear

    def __call__(self, x: Float[Array, "B L E"], pooled: Int[Array, " B"]) -> Float[Array, "B D"]:
        graph, state = nnx.split(self.blocks)

        def through(x: Array, state: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graph, state)(x), None

        x, _ = jax.lax.scan(through, x + self.positional_embedding[: x.shape[1]], state)
        x = self.ln_final(jnp.take_along_axis(x, pooled[:, None, None], axis=1)[:, 0])
        return self.text_projection(x) if hasattr(self, "text_projection") else x


def _norm(shape: TowerShape, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # E[x²] − E[x]² would lose digits where the mean is large, as it is in CLIP's residual stream.
    return nnx.LayerNorm(shape.width, epsilon=shape.epsilon, use_fast_variance=False, rngs=rngs)


def text_features(
    arrays: Mapping[str, Any],
    shape: TowerShape,
    embeddings: Float[Array, "B L E"],
    pooled: Int[Array, " B"],
) -> Float[Array, "B D"]:
    """Text features, un-normalised.

    arrays: by their Flax names; those of the blocks stacked. embeddings: of tokens or learned,
    without positions. pooled: which of the L places gives the feature.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: TextTransformer(shape, rngs=nnx.Rngs(0))))
    flat = {
        path: variable.replace(arrays["/".join(map(str, path))])
        for path, variable in nnx.to_flat_state(state)
    }
    tower = nnx.merge(graph, nnx.from_flat_state(flat))
    # Otherwise a GPU rounds the factors of its products to ten bits.
    with jax.default_matmul_precision("float32"):
        return tower(embeddings, pooled)


def classes_at_once(shape: TowerShape, length: int) -> int:
    """How many texts of `length` tokens a chunk has, at least one.

    Kept for the backward pass are, per token and block, about six arrays of the width, four of the
    perceptron's and two rows of attention per head, 4 bytes each.
    """
    token = 6 * shape.width + 4 * shape.mlp_width + 2 * shape.heads * length
    return max(1, CHUNK_BYTES // (4 * shape.layers * length * token))


def in_chunks(
    compute: Callable[[Tree], Float[Array, "B D"]], inputs: Tree, at_once: int
) -> Float[Array, "N D"]:
    """compute(inputs), in chunks of the first axis of all inputs.

    Where there are several, each is computed again in the backward pass, so that memory does not
    grow with their number.
    """
    total = len(jax.tree.leaves(inputs)[0])
    chunks = -(-total // at_once)
    if chunks <= 1:
        return compute(inputs)
    rows = -(-total // chunks)

    def divided(values: Array) -> Array:
        filled = jnp.pad(values, [(0, chunks * rows - total)] + [(0, 0)] * (values.ndim - 1))
        return filled.reshape(chunks, rows, *values.shape[1:])

    results = jax.lax.map(jax.checkpoint(compute, prevent_cse=False), jax.tree.map(divided, inputs))
    return results.reshape(chunks * rows, *results.shape[2:])[:total]
