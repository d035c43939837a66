"""The tower in Flax: open_clip's features to 1e-5, in bounded memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_adapter.adapters.methods.networks import text_transformer as flax_tower
from clip_adapter.adapters.methods.networks.coop_context import Tower, class_weights
from clip_adapter.adapters.methods.networks.text_transformer import (
    TextTransformer,
    TowerShape,
    text_features,
)
from clip_adapter.cache.text_tower import TOKEN_EMBEDDING, TextTower, array_shapes
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.backbones.text_arrays import take_text_tower
from tests.adapters.tasks import unit
from tests.adapters.towers import NAMES, backbone, named

PROMPTS = ("a photo of a three.", "", "potholed, banded; woven (dog)", "x " * 40)
END = 4513
VARIANTS: dict[str, dict[str, Any]] = {
    "eos": {"pool_type": "eos", "eos_id": END},
    "last": {"pool_type": "last"},
    "biased projection": {"proj_bias": True},
    "own text module": {"custom_text": True, "norm_kwargs": {"eps": 1e-3}},
    "no projection": {"custom_text": True, "proj_type": "none", "mlp_ratio": 2.0},
}


def features(tower: TextTower, tokens: np.ndarray, length: int) -> np.ndarray:
    """Of token ids (B, L), of which the first `length` are read."""
    shape = TowerShape.of(tower.config)
    places = {
        "argmax": tokens.argmax(axis=1),
        "eos": (tokens == END).argmax(axis=1),
        "last": np.full(len(tokens), tokens.shape[1] - 1),
    }
    embeddings = tower.arrays[TOKEN_EMBEDDING][tokens[:, :length]]
    compute = jax.jit(lambda *given: text_features(given[0], shape, *given[1:]))
    return np.asarray(compute(tower.arrays, embeddings, places[tower.config.pooling]))


def check(found: Backbone) -> None:
    tower = take_text_tower(found, NAMES)
    tokens = found.tokenizer(list(PROMPTS))
    expected = found.model.encode_text(tokens).numpy()
    ours = features(tower, tokens.numpy(), tokens.shape[1])
    assert ours.shape == expected.shape
    assert np.abs(unit(ours) - unit(expected)).max() < 1e-6
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["glyph-clip", "gelu", "quick_gelu"])
def test_features_are_open_clips(kind: str) -> None:
    check(named(kind))


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_open_clips_in_every_variant(variant: str) -> None:
    check(backbone(**VARIANTS[variant]))


def test_what_stands_behind_the_pooled_token_does_not_matter() -> None:
    tower = take_text_tower(named("gelu"), NAMES)
    tokens = named("gelu").tokenizer(["a photo of a three."]).numpy()
    end = int(tokens.argmax())
    other = tokens.copy()
    other[:, end + 1 :] = 17
    whole = features(tower, tokens, tokens.shape[1])
    np.testing.assert_allclose(features(tower, other, tokens.shape[1]), whole, rtol=1e-6)
    np.testing.assert_allclose(features(tower, tokens, end + 1), whole, rtol=1e-5)


@pytest.mark.parametrize("projection", ["none", "linear", "linear_with_bias"])
def test_the_file_has_the_names_and_shapes_of_flax(projection: str) -> None:
    config = take_text_tower(named("gelu"), NAMES).config
    kind = {"projection": projection, "embed_dim": config.width if projection == "none" else 24}
    stated = array_shapes(type(config)(**{**vars(config), **kind}))
    shape = TowerShape.of(type(config)(**{**vars(config), **kind}))
    tower = nnx.eval_shape(lambda: TextTransformer(shape, rngs=nnx.Rngs(0)))
    made = {
        "/".join(map(str, path)): variable.shape
        for path, variable in nnx.to_flat_state(nnx.state(tower, nnx.Param))
    }
    assert made | {TOKEN_EMBEDDING: stated[TOKEN_EMBEDDING]} == stated


RN50 = TowerShape(
    width=512, heads=8, layers=12, mlp_width=2048, context_length=77, embed_dim=1024,
    activation="quick_gelu", epsilon=1e-5, pooling="argmax", projection="linear",
)  # fmt: skip


def bytes_for_a_gradient(classes: int) -> int:
    """What the compiled program for the context's gradient needs beside its arguments."""
    transformer = nnx.eval_shape(lambda: TextTransformer(RN50, rngs=nnx.Rngs(0)))
    whole = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    tower = Tower(
        RN50,
        {
            "/".join(map(str, path)): jax.ShapeDtypeStruct(variable.shape, jnp.float32)
            for path, variable in nnx.to_flat_state(nnx.state(transformer, nnx.Param))
        },
        jax.ShapeDtypeStruct((1500, 512), jnp.float32),
        whole((classes, 8)),
        whole((classes,)),
        whole((classes,)),
        {},
    )  # type: ignore[arg-type]
    setting = {"position": "end"}
    loss = lambda context, tower: jnp.sum(class_weights(context, setting, tower) ** 2)  # noqa: E731
    context = jax.ShapeDtypeStruct((16, 512), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(context, tower).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_bounded_whatever_the_number_of_classes() -> None:
    # A chunk, and 4 bytes per class and feature for the weights, a few times over.
    assert bytes_for_a_gradient(3000) < 1.3 * flax_tower.CHUNK_BYTES + 3000 * 4 * 4 * 1024


def test_a_larger_budget_takes_more_classes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 20 < flax_tower.classes_at_once(RN50, 26) < 60
    assert 6 < flax_tower.classes_at_once(RN50, 77) < 20
    monkeypatch.setattr(flax_tower, "CHUNK_BYTES", 1)
    assert flax_tower.classes_at_once(RN50, 77) == 1
