"""Each trained method's start and first steps against its formulas in float64 PyTorch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn.functional import cross_entropy, one_hot

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit
from clip_adapter.adapters.method import Batch, Task
from clip_adapter.adapters.registry import METHODS
from tests.adapters.tasks import (
    CLASSES,
    DIM,
    PROMPTS,
    needed,
    row_of,
    separable_task,
    setting_of,
    start_arrays,
)
from tests.adapters.torch_reference import normalised, tensor

Tensors = Mapping[str, torch.Tensor]


class Data:
    """A task in float64; view 0 of its images."""

    def __init__(self, task: Task) -> None:
        self.f = tensor(task.features[0])
        self.y = torch.tensor(np.asarray(task.labels), dtype=torch.int64)
        self.own = one_hot(self.y, CLASSES).double()
        self.w, self.text = tensor(task.head.weights), tensor(task.head.text)
        self.scale, self.bias = float(task.head.logit_scale), float(task.head.logit_bias)
        self.seed = int(task.seed)

    def cosine_logits(self, f: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return self.scale * normalised(f) @ normalised(w).T + self.bias


def constant_then_cosine(peak: float, epochs: int) -> Callable[[int], float]:
    """One epoch at 1e-5, then half a cosine per epoch."""

    def rate(epoch: int) -> float:
        return 1e-5 if epoch == 0 else peak * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2

    return rate


def nothing_more(data: Data, p: Tensors, epoch: int) -> Any:
    return 0.0


@dataclass(frozen=True)
class Reference:
    """A method as its paper writes it; one step an epoch on all images.

    given: hyper-parameters. start: what is trained. logits: with these, of images. loss: what is
    added to the images' cross-entropy. optimizer: of what is trained. rate: by epoch. logit_scale:
    low where the softmax of texts would be all 0 and 1, and their gradient zero.
    """

    given: dict[str, Any]
    start: Callable[[Data], dict[str, torch.Tensor]]
    logits: Callable[[Data, Tensors, torch.Tensor], torch.Tensor]
    optimizer: Callable[[Data, Tensors], torch.optim.Optimizer]
    rate: Callable[[int], float] | None = None
    more: Callable[[Data, Tensors, int], Any] = nothing_more
    image_share: float = 1.0
    logit_scale: float = 20.0
    after: Callable[[Data, Tensors, int], None] = field(default=lambda data, p, epoch: None)
    summed: tuple[str, ...] = ()
    """Whose gradients are never cleared."""

    def train(self, data: Data, epochs: int) -> dict[str, np.ndarray]:
        p = self.start(data)
        for value in p.values():
            value.requires_grad_()
        optimizer = self.optimizer(data, p)
        for epoch in range(epochs):
            if self.rate:
                optimizer.param_groups[0]["lr"] = self.rate(epoch)
            loss = self.image_share * cross_entropy(self.logits(data, p, data.f), data.y)
            for name, value in p.items():
                if name not in self.summed:
                    value.grad = None
            (loss + self.more(data, p, epoch)).backward()
            optimizer.step()
            self.after(data, p, epoch)
        return {name: value.detach().numpy() for name, value in p.items()}


# CLAP: λ_c from the zero-shot probabilities of the un-normalised mean text features.


def trust(data: Data) -> torch.Tensor:
    chances = data.cosine_logits(data.f, data.text.mean(1)).softmax(1)
    return torch.stack([chances[data.y == c, c].mean() for c in range(CLASSES)])


def held_near_text(data: Data, p: Tensors, epoch: int) -> torch.Tensor:
    squared = ((p["weights"] - data.text.mean(1)) ** 2).sum(1)
    return (trust(data) * squared).sum() / CLASSES


def texts_of_the_step(data: Data, p: Tensors, epoch: int) -> torch.Tensor:
    """Half the loss of as many texts, drawn by JAX's generator from seed and epoch."""
    of_epoch = jax.random.fold_in(jax.random.key(data.seed), epoch + 1)
    key = jax.random.fold_in(jax.random.fold_in(of_epoch, 2), 0)
    drawn = np.array(jax.random.randint(key, (len(data.y),), 0, CLASSES * PROMPTS))
    texts = data.text.reshape(-1, DIM)[drawn]
    logits = data.scale * normalised(texts) @ p["weights"].T + data.bias
    return 0.5 * cross_entropy(logits, torch.tensor(drawn // PROMPTS, dtype=torch.int64))


def lp_plus_plus_rates(data: Data) -> tuple[float, float]:
    f, t = normalised(data.f), normalised(data.w)
    largest = torch.linalg.svdvals(f)[0].item() ** 2
    most = ((f @ t.T) ** 2).sum(0).max().item()
    return 4 * len(f) / largest, len(f) / (4 * most)


def lp_plus_plus_start(data: Data) -> dict[str, torch.Tensor]:
    f, t = normalised(data.f), normalised(data.w)
    cosines = torch.stack([f[i] @ t[label] for i, label in enumerate(data.y)])
    return {
        "weights": torch.stack([f[data.y == c].sum(0) for c in range(CLASSES)]),
        "alpha": torch.full((CLASSES,), 250 * cosines.mean().item(), dtype=torch.float64),
        "bias": torch.zeros(CLASSES, dtype=torch.float64),
    }


def lp_plus_plus_blend(data: Data, p: Tensors, epoch: int) -> None:
    """PyTorch sums α's gradients, which no optimiser clears."""
    if epoch % 10 == 9:
        p["alpha"].data -= lp_plus_plus_rates(data)[1] * p["alpha"].grad


REFERENCES = {
    "taskres": Reference(
        {"alpha": 0.7, "weight_decay": 5e-2},
        start=lambda data: {"residual": torch.zeros_like(data.w)},
        logits=lambda data, p, f: data.cosine_logits(f, data.text.mean(1) + 0.7 * p["residual"]),
        optimizer=lambda data, p: torch.optim.Adam(p.values(), weight_decay=5e-2),
        rate=constant_then_cosine(2e-3, 200),
    ),
    "zs-lp": Reference(
        {},
        start=lambda data: {"weights": data.text.mean(1)},
        logits=lambda data, p, f: data.cosine_logits(f, p["weights"]),
        optimizer=lambda data, p: torch.optim.SGD(p.values(), momentum=0.9),
        rate=constant_then_cosine(0.1, 300),
    ),
    "clap": Reference(
        {},
        start=lambda data: {"weights": data.text.mean(1)},
        logits=lambda data, p, f: data.cosine_logits(f, p["weights"]),
        optimizer=lambda data, p: torch.optim.SGD(p.values(), momentum=0.9),
        rate=constant_then_cosine(0.1, 300),
        more=held_near_text,
    ),
    "rla": Reference(
        {"learning_rate": 1e-2},
        start=lambda data: {"matrix": torch.eye(DIM, dtype=torch.float64)},
        logits=lambda data, p, f: data.cosine_logits(f @ p["matrix"].T, data.w),
        optimizer=lambda data, p: torch.optim.Adam(p.values(), eps=1e-4),
        rate=lambda epoch: 1e-2 * (1 + math.cos(math.pi * epoch / 300)) / 2,
        # Twenty images of four classes: five shots.
        more=lambda data, p, epoch: 0.2 * ((p["matrix"] - torch.eye(DIM)) ** 2).sum(),
    ),
    "cross-modal": Reference(
        {"learning_rate": 1e-2, "weight_decay": 0.1, "batch_size": 256},
        start=lambda data: {"weights": data.w.clone()},
        logits=lambda data, p, f: data.scale * normalised(f) @ p["weights"].T + data.bias,
        optimizer=lambda data, p: torch.optim.AdamW(p.values(), weight_decay=0.1),
        rate=lambda epoch: 1e-2 * (epoch + 1) / 20,
        more=texts_of_the_step,
        image_share=0.5,
        logit_scale=0.5,
    ),
    "lp++": Reference(
        {"epoch": "last"},
        start=lp_plus_plus_start,
        logits=lambda data, p, f: (
            normalised(f) @ (p["weights"] + p["alpha"][:, None] * normalised(data.w)).T + p["bias"]
        ),
        optimizer=lambda data, p: torch.optim.SGD(
            [p["weights"], p["bias"]], lp_plus_plus_rates(data)[0], momentum=0.9
        ),
        after=lp_plus_plus_blend,
        summed=("alpha",),
    ),
}
EPOCHS = {"lp++": (3, 12)}
"""After which runs are compared: three, and with LP++ one step of α."""


@pytest.mark.parametrize(
    ("name", "epochs"),
    [(name, epochs) for name in REFERENCES for epochs in EPOCHS.get(name, (3,))],
)
def test_the_first_steps_are_those_of_the_formulas(name: str, epochs: int, engine: Engine):
    method, reference = METHODS[name], REFERENCES[name]
    whole = separable_task(seed=4, noise=2.0)
    scale = jnp.float32(reference.logit_scale)
    whole = whole._replace(head=whole.head._replace(logit_scale=scale))
    task, data = needed(method, whole), Data(whole)
    setting = setting_of(method, **reference.given)
    start = reference.start(data)
    found_start = start_arrays(method, setting, task)
    assert found_start.keys() == start.keys()
    for array, wanted in start.items():
        np.testing.assert_allclose(found_start[array], wanted, rtol=1e-5, atol=1e-5)

    (chunk,) = engine.run(method, [setting], task, stop=epochs)
    found, expected = row_of(chunk.state.trained), reference.train(data, epochs)
    for array, wanted in expected.items():
        moved = np.abs(wanted - start[array].detach().numpy()).max()
        if array != "alpha" or epochs >= 10:
            assert moved > 1e-3 * (1e-2 if array == "alpha" else 1), "nothing is compared"
        np.testing.assert_allclose(
            found[array], wanted, rtol=1e-5, atol=max(1e-6, 5e-4 * moved), err_msg=array
        )

    p = {array: torch.tensor(value) for array, value in expected.items()}
    wanted = reference.logits(data, p, data.f).numpy()
    arrays = fit(method, setting, epochs, task, engine)
    logits = make_classify(method, setting, arrays, task.head)(task.features[0])
    np.testing.assert_allclose(logits, wanted, atol=1e-3 * np.abs(wanted).max())


TIGHT = {"ftol": 1e-15, "gtol": 1e-9}


def unequal(task: Task, *counts: int) -> Task:
    labels = np.repeat(np.arange(CLASSES), counts).astype(np.int32)
    return task._replace(labels=labels, features=task.features[:, : len(labels)])


def test_a_class_without_images_is_held_by_its_text_alone(engine: Engine):
    """CLAP's λ is 1 there; ZS-LP has nothing that holds it."""
    method = METHODS["clap"]
    task = unequal(needed(method, separable_task(noise=2.0)), 12, 7, 1, 0)
    constants = method.fit(np, jax.tree.map(np.asarray, task), {})
    data = Data(task)
    chances = data.cosine_logits(data.f, data.text.mean(1)).softmax(1)
    wanted = [chances[data.y == c, c].mean() for c in range(3)]
    np.testing.assert_allclose(constants["trust"], [*wanted, 1], rtol=1e-5)
    distances = {}
    for name in ("clap", "zs-lp"):
        weights = fit(METHODS[name], setting_of(METHODS[name]), None, task, engine)["weights"]
        distances[name] = np.linalg.norm(weights[3] - data.text.mean(1)[3].numpy())
    assert distances["clap"] < distances["zs-lp"]


@pytest.mark.parametrize("name", ["rla", "prolip"])
@pytest.mark.parametrize("counts", [(5, 5, 5, 5), (12, 7, 1, 0), (1, 1, 1, 1)])
def test_shots_of_unequal_classes_are_images_per_class(counts: Any, name: str):
    """Moved by 1 everywhere, what is held adds λ to the loss for each of its numbers."""
    method, whole = METHODS[name], unequal(separable_task(noise=2.0), *counts)
    task, (held,) = needed(method, whole), method.trained
    start = method.fit(jnp, task, {})
    moved = {**start, held: start[held] + 1}
    batch = Batch(task.features[0], task.labels, jnp.ones(len(task.labels)), None)

    def loss(strength: str | float) -> float:
        nothing = lambda rows: jnp.zeros((len(rows), CLASSES))  # noqa: E731
        return float(method.loss(jnp, nothing, moved, batch, {"strength": strength}, task))

    penalty = loss("1/shots") - loss(0.0)
    assert penalty == pytest.approx(moved[held].size * CLASSES / sum(counts), rel=1e-5)


@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_rla_ends_at_the_minimum_that_l_bfgs_finds(strength: float, engine: Engine):
    """Of the loss over all images, in float64; at ten times the default rate the steps arrive."""
    method, whole = METHODS["rla"], separable_task(noise=2.0, seed=4)
    task, data, identity = needed(method, whole), Data(whole), np.eye(DIM)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        matrix = torch.tensor(flat.reshape(DIM, DIM), requires_grad=True)
        held = strength * ((matrix - tensor(identity)) ** 2).sum()
        loss = cross_entropy(data.cosine_logits(data.f @ matrix.T, data.w), data.y) + held
        loss.backward()
        return float(loss.detach()), matrix.grad.numpy().ravel()

    least = minimize(objective, identity.ravel(), jac=True, method="L-BFGS-B", options=TIGHT)
    setting = setting_of(method, strength=strength, learning_rate=1e-2)
    found = fit(method, setting, None, task, engine)["matrix"].astype(np.float64)
    (start, _), (end, _) = objective(identity.ravel()), objective(found.ravel())
    assert -1e-9 < (end - least.fun) / (start - least.fun) < 1e-4
    moved = np.abs(least.x - identity.ravel()).max()
    assert moved > 0.1 and np.abs(found.ravel() - least.x).max() < 0.1 * moved


def test_rla_without_strength_is_free_and_with_much_is_zero_shot(engine: Engine):
    method, task = METHODS["rla"], needed(METHODS["rla"], separable_task(noise=2.0))
    free, held = (
        fit(method, setting_of(method, strength=strength), None, task, engine)["matrix"]
        for strength in (0.0, 1e6)
    )
    assert np.abs(free - np.eye(DIM)).max() > 0.05
    np.testing.assert_allclose(held, np.eye(DIM), atol=2e-3)


def test_cross_modal_learns_a_class_of_which_there_are_texts_only(engine: Engine):
    method = METHODS["cross-modal"]
    task = needed(method, separable_task(noise=0.5))
    # Images of the first class take the place of the last one's.
    labels = task.labels.at[15:].set(0)
    task = task._replace(features=task.features.at[:, 15:].set(task.features[:, :5]), labels=labels)
    # Zero-shot weights of the last class that point elsewhere.
    head = task.head._replace(weights=task.head.weights.at[3].set(-task.head.weights[3]))
    setting = setting_of(method, learning_rate=0.03, batch_size=256)
    arrays = fit(method, setting, None, task._replace(head=head), engine)
    logits = make_classify(method, setting, arrays, head)(task.validation_features)
    theirs = np.asarray(task.validation_labels) == 3
    zero_shot = make_classify(METHODS["zero-shot"], {}, {}, head)(task.validation_features)
    assert not (zero_shot.argmax(axis=1)[theirs] == 3).any()
    assert np.mean(logits.argmax(axis=1)[theirs] == 3) > 0.5


def test_lp_plus_plus_takes_no_notice_of_the_logit_scale(engine: Engine):
    method, task = METHODS["lp++"], needed(METHODS["lp++"], separable_task(noise=2.0))
    louder = task._replace(head=task.head._replace(logit_scale=task.head.logit_scale * 3))
    setting = setting_of(method, **REFERENCES["lp++"].given)
    one, other = (fit(method, setting, None, t, engine) for t in (task, louder))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
