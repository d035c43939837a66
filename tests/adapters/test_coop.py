"""CoOp: open_clip's features, PyTorch's gradients and whole runs with the same vectors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import fit
from clip_adapter.adapters.engine.training import Run
from clip_adapter.adapters.method import Head, Task
from clip_adapter.adapters.methods.networks import text_transformer as flax_tower
from clip_adapter.adapters.methods.networks.coop_context import (
    Tower,
    check_room,
    class_weights,
    compiled_weights,
    initial_context,
    prepare,
)
from clip_adapter.adapters.registry import METHODS
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.backbones.text_arrays import take_text_tower
from tests.adapters.tasks import setting_of, unit
from tests.adapters.torch_reference import normalised
from tests.adapters.towers import NAMES, backbone, coop_features, named

COOP = METHODS["coop"]
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
    (normalised(expected) * torch.tensor(direction)).sum().backward()

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


EPOCHS, BATCH, RATE = 10, 10, 0.05
SHOTS, SCALE = 4, 20.0


def support() -> Task:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(NAMES)), SHOTS)
    features = 3 * rng.standard_normal((len(labels), 24)) + labels[:, None]
    weights = rng.standard_normal((len(NAMES), 24))
    tower = tower_of(backbone())
    head = Head(jnp.asarray(weights, jnp.float32), jnp.float32(SCALE), jnp.float32(0.5))
    return Task(
        features=jnp.asarray(features[None], jnp.float32),
        labels=jnp.asarray(labels, jnp.int32),
        validation_features=jnp.zeros((0, 24)),
        validation_labels=jnp.zeros(0, jnp.int32),
        head=head,
        seed=jnp.int32(0),
        extra={"tower": tower},
    )


def batches(task: Task, epoch: int) -> np.ndarray:
    """(steps, B): the rows of each step, by JAX's generator from seed and epoch."""
    key = jax.random.split(jax.random.fold_in(jax.random.key(task.seed), epoch + 1))[0]
    return np.array(jax.random.permutation(key, len(task.labels))).reshape(-1, BATCH)


class InPyTorch:
    """SGD with momentum 0.9 and an L2 penalty through open_clip's tower, in float64."""

    def __init__(self, task: Task, context: np.ndarray, position: str) -> None:
        self.model, self.task, self.position = backbone(), task, position
        self.model.model.double()
        self.learned = torch.tensor(context, dtype=torch.float64, requires_grad=True)
        self.descent = torch.optim.SGD([self.learned], lr=1.0, momentum=0.9, weight_decay=5e-4)
        self.features = torch.tensor(np.asarray(task.features[0], np.float64))
        self.labels = torch.tensor(np.asarray(task.labels, np.int64))

    def weights(self) -> torch.Tensor:
        return coop_features(self.model, NAMES, self.learned, self.position)

    def loss(self, weights: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        logits = SCALE * normalised(self.features[rows]) @ normalised(weights).T + 0.5
        return torch.nn.functional.cross_entropy(logits, self.labels[rows])

    def loss_of_all(self, weights: Any) -> float:
        with torch.no_grad():
            return float(self.loss(torch.as_tensor(weights).double(), np.arange(len(self.labels))))

    def train(self, epoch: int) -> None:
        cosine = 0.5 * (1 + np.cos(np.pi * (epoch - 1) / EPOCHS))
        self.descent.param_groups[0]["lr"] = 1e-5 if epoch == 0 else RATE * cosine
        for rows in batches(self.task, epoch):
            self.descent.zero_grad()
            self.loss(self.weights(), rows).backward()
            self.descent.step()


@pytest.mark.parametrize(
    ("position", "by_class"), [("end", False), ("middle", True), ("front", False)]
)
def test_twenty_steps_are_pytorchs(position: str, by_class: bool, engine: Engine) -> None:
    task = support()
    given = {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": RATE, "context_length": 3}
    chosen = setting_of(COOP, class_specific=by_class, position=position, **given)
    name = "contexts" if by_class else "context"
    start = np.asarray(Run(COOP, chosen, task).start()[0][name])
    theirs = InPyTorch(task, start, position)
    losses = [theirs.loss_of_all(theirs.weights())]
    for epoch in range(EPOCHS):
        theirs.train(epoch)
        losses.append(theirs.loss_of_all(theirs.weights()))
        arrays = fit(COOP, chosen, epoch + 1, task, engine)
        assert abs(theirs.loss_of_all(np.array(arrays["weights"])) - losses[-1]) < 4e-5
    assert arrays.keys() == {name, "weights"}
    assert losses[-1] < losses[0] - 0.1, "hardly anything moved: nothing is compared"
    wanted = theirs.learned.detach().numpy()
    assert np.abs(arrays[name] - wanted).max() < 1e-3 * np.abs(wanted - start).max()


def test_predicting_needs_the_saved_weights_alone() -> None:
    task = support()
    weights = np.random.default_rng(1).standard_normal((len(NAMES), 24))
    head = jax.tree.map(np.asarray, task.head)
    features = np.asarray(task.features[0], np.float64)
    logits = COOP.logits(np, {"weights": weights}, COOP.defaults(), features, head)
    np.testing.assert_allclose(logits, SCALE * unit(features) @ unit(weights).T + 0.5, rtol=1e-6)
