"""CoOp as a method: its first three steps are PyTorch's, and predicting needs no tower."""

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
from clip_adapter.adapters.methods.coop import COOP
from clip_adapter.adapters.methods.networks.coop_context import prepare
from clip_adapter.extract.backbones.text_arrays import take_text_tower
from tests.adapters.towers import NAMES, backbone, coop_features

EPOCHS, BATCH, RATE = 10, 10, 0.05
SHOTS, SCALE = 4, 20.0


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
        unit = torch.nn.functional.normalize
        logits = SCALE * unit(self.features[rows]) @ unit(weights).T + 0.5
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
    chosen: dict[str, Any] = {
        **COOP.defaults(),
        "context_length": 3,
        "class_specific": by_class,
        "position": position,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "learning_rate": RATE,
    }
    del chosen["evaluate_every"], chosen["adam_epsilon"]
    assert COOP.checked(chosen) == chosen
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
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, weights)]
    np.testing.assert_allclose(logits, SCALE * unit[0] @ unit[1].T + 0.5, rtol=1e-6)
