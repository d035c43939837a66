"""Learned context: open_clip's features and PyTorch's gradients with the same vectors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_adapter.adapters.methods.networks import text_transformer as flax_tower
from clip_adapter.adapters.methods.networks.coop_context import (
    Tower,
    check_room,
    class_weights,
    compiled_weights,
    initial_context,
    prepare,
)
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.backbones.text_arrays import take_text_tower
from tests.adapters.tasks import unit
from tests.adapters.towers import NAMES, backbone, coop_features, named

WIDTH = {"glyph-clip": 64, "gelu": 32, "quick_gelu": 32}
CASES = [("quick_gelu", "middle", 1), ("glyph-clip", "front", 0), ("glyph-clip", "end", 1)]


def setting(**values: Any) -> dict[str, Any]:
    return {
        "context_length": 3,
        "class_specific": False,
        "position": "end",
        "initialisation": "random",
        **values,
    }


def tower_of(found: Backbone) -> Tower:
    return prepare(*take_text_tower(found, NAMES))


def check(found: Backbone, position: str, own: int, width: int) -> None:
    """Features and the gradient of a weighted sum of their directions."""
    rng = np.random.default_rng(0)
    shape = (len(NAMES), 3, width) if own else (3, width)
    context = (0.1 * rng.standard_normal(shape)).astype(np.float32)
    found.model.double()
    learned = torch.tensor(context, dtype=torch.float64, requires_grad=True)
    expected = coop_features(found, NAMES, learned, position)
    direction = rng.standard_normal(expected.shape)
    (torch.nn.functional.normalize(expected, dim=1) * torch.tensor(direction)).sum().backward()

    tower = tower_of(found)
    chosen = setting(class_specific=bool(own), position=position)

    def loss(context: jax.Array, tower: Tower) -> tuple[jax.Array, jax.Array]:
        weights = class_weights(context, chosen, tower)
        return jnp.sum(
            weights / jnp.linalg.norm(weights, axis=1, keepdims=True) * direction
        ), weights

    gradient, ours = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(context), tower)
    assert np.abs(unit(ours) - unit(expected.detach())).max() < 1e-6
    wanted = learned.grad.numpy()
    assert np.abs(gradient - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(("kind", "position", "own"), CASES)
def test_features_and_gradient_are_pytorchs(kind: str, position: str, own: int) -> None:
    check(named(kind), position, own, WIDTH[kind])


def test_pooling_at_the_last_place_reads_the_padding() -> None:
    check(backbone(pool_type="last"), "end", 0, 32)


@pytest.mark.parametrize("phrase", ["a photo of a", "this is a photo of a"])
def test_words_as_context_are_the_prompt_with_these_words(phrase: str) -> None:
    found = named("glyph-clip")
    tower = tower_of(found)
    chosen = setting(initialisation=phrase)
    context = initial_context(chosen, jax.random.key(0), tower)
    texts = [f"{phrase} {name.replace('_', ' ')}." for name in NAMES]
    expected = found.model.encode_text(found.tokenizer(texts))
    assert np.abs(unit(compiled_weights(context, "end", tower)) - unit(expected)).max() < 1e-6


def test_contexts_start_where_they_should() -> None:
    tower = tower_of(named("gelu"))
    random = setting(context_length=13, class_specific=True)
    drawn = initial_context(random, jax.random.key(1), tower)
    assert drawn.shape == (len(NAMES), 13, 32)
    assert abs(float(drawn.std()) - 0.02) < 0.001 and abs(float(drawn.mean())) < 0.002
    words = setting(class_specific=True, initialisation="a photo of a")
    started = initial_context(words, jax.random.key(1), tower)
    assert started.shape == (len(NAMES), 4, 32)  # as many as the words have tokens
    np.testing.assert_array_equal(started[0], started[-1])


@pytest.mark.parametrize("own", [False, True])
def test_chunks_change_nothing(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tower_of(backbone(layers=1))
    chosen = setting(class_specific=own)
    context = initial_context(chosen, jax.random.key(0), tower)

    def computed(at_once: int) -> tuple[jax.Array, jax.Array]:
        def loss(context: jax.Array, tower: Tower) -> tuple[jax.Array, jax.Array]:
            weights = class_weights(context, chosen, tower)
            return jnp.sum(weights * (jnp.arange(weights.size).reshape(weights.shape) % 7)), weights

        monkeypatch.setattr(flax_tower, "CHUNK_BYTES", at_once * _bytes_of_one(tower))
        return jax.jit(jax.grad(loss, has_aux=True))(context, tower)

    gradient, whole = computed(len(NAMES))
    again, chunks = computed(2)  # 5 classes: chunks of 2, the last filled up
    np.testing.assert_allclose(chunks, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(again, gradient, rtol=1e-4, atol=1e-5 * float(abs(gradient).max()))


def _bytes_of_one(tower: Tower) -> int:
    length = tower.sentences.shape[1] + 3 + 2
    at_once = flax_tower.classes_at_once(tower.shape, length)
    return flax_tower.CHUNK_BYTES // at_once + 1


def test_some_of_the_classes_have_the_weights_that_they_have_among_all() -> None:
    tower = tower_of(named("gelu"))
    context = initial_context(setting(), jax.random.key(0), tower)
    some = compiled_weights(context, "end", tower.of_classes([3, 1]))
    whole = np.asarray(compiled_weights(context, "end", tower))
    np.testing.assert_allclose(some, whole[[3, 1]], rtol=1e-5, atol=1e-6)


def test_too_many_vectors_for_the_tower_are_refused() -> None:
    tower = tower_of(named("gelu"))
    check_room(tower, 13)
    with pytest.raises(ValueError, match=r"reads 24 tokens.*longest class name.*at most 13 of 14"):
        check_room(tower, 14)
    context = initial_context(setting(context_length=13), jax.random.key(0), tower)
    assert compiled_weights(context, "end", tower).shape == (len(NAMES), 24)
