"""CoOp as a method: its first three steps are PyTorch's, and predicting needs no tower."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_adapter.adapters.engine import training
from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import fit
from clip_adapter.adapters.method import Head, Task
from clip_adapter.adapters.methods.coop import COOP
from clip_adapter.adapters.methods.networks.coop_context import prepare
from clip_adapter.extract.backbones.text_arrays import take_text_tower
from tests.adapters.towers import NAMES, backbone, coop_features

EPOCHS, SHOTS, SCALE = 3, 4, 20.0


def support() -> Task:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(NAMES)), SHOTS)
    features = 3 * rng.standard_normal((len(labels), 24)) + labels[:, None]
    weights = rng.standard_normal((len(NAMES), 24))
    tower = prepare(*take_text_tower(backbone(), NAMES))
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


def in_pytorch(task: Task, context: np.ndarray, position: str) -> tuple[np.ndarray, np.ndarray]:
    """Three full-batch steps of SGD with momentum 0.9 and an L2 penalty, in float64."""
    model = backbone()
    model.model.double()
    learned = torch.tensor(context, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.SGD([learned], lr=1.0, momentum=0.9, weight_decay=5e-4)
    features = torch.tensor(np.asarray(task.features[0], np.float64))
    labels = torch.tensor(np.asarray(task.labels, np.int64))
    unit = torch.nn.functional.normalize
    for epoch in range(EPOCHS):
        cosine = 0.5 * (1 + np.cos(np.pi * (epoch - 1) / EPOCHS))
        descent.param_groups[0]["lr"] = 1e-5 if epoch == 0 else 0.2 * cosine
        weights = coop_features(model, NAMES, learned, position)
        logits = SCALE * unit(features) @ unit(weights).T + 0.5
        descent.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        descent.step()
    weights = coop_features(model, NAMES, learned, position)
    return learned.detach().numpy(), weights.detach().numpy()


@pytest.mark.parametrize(
    ("position", "by_class"), [("end", False), ("middle", True), ("front", False)]
)
def test_the_first_steps_are_pytorchs(position: str, by_class: bool) -> None:
    task = support()
    chosen: dict[str, Any] = {
        **COOP.defaults(),
        "context_length": 3,
        "class_specific": by_class,
        "position": position,
        "epochs": EPOCHS,
        "learning_rate": 0.2,
    }
    del chosen["evaluate_every"], chosen["adam_epsilon"]
    assert COOP.checked(chosen) == chosen
    name = "contexts" if by_class else "context"
    start = np.asarray(training.start(COOP, task, chosen)[0][name])
    arrays = fit(COOP, chosen, None, task, Engine())
    assert arrays.keys() == {name, "weights"}
    context, weights = in_pytorch(task, start, position)
    moved = np.abs(context - start).max()
    assert moved > 0.01
    assert np.abs(arrays[name] - context).max() < 1e-4 * moved
    np.testing.assert_allclose(arrays["weights"], weights, rtol=1e-3, atol=1e-4)


def test_predicting_needs_the_saved_weights_alone() -> None:
    task = support()
    weights = np.random.default_rng(1).standard_normal((len(NAMES), 24))
    head = jax.tree.map(np.asarray, task.head)
    features = np.asarray(task.features[0], np.float64)
    logits = COOP.logits(np, {"weights": weights}, COOP.defaults(), features, head)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, weights)]
    np.testing.assert_allclose(logits, SCALE * unit[0] @ unit[1].T + 0.5, rtol=1e-6)
