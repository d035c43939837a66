"""The balanced loss of trained methods: every class counts alike, however many images it has."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.search import fit
from clip_adapter.adapters.formulas import balanced_weights, mean_cross_entropy
from clip_adapter.adapters.method import Batch, Task
from clip_adapter.adapters.optimisation import FULL_BATCH
from clip_adapter.adapters.registry import METHODS
from tests.adapters.tasks import CLASSES, needed, separable_task, setting_of

COUNTS = (1, 2, 3, 6)


def unequal(task: Task) -> Task:
    """Of its six images a class as many as COUNTS says, class by class in this order."""
    rows = np.concatenate([6 * label + np.arange(n) for label, n in enumerate(COUNTS)])
    return task._replace(features=task.features[:, rows], labels=task.labels[rows])


def repeated(task: Task) -> Task:
    """The images of each class so often that all have six."""
    times = np.array([6 // n for n in COUNTS])[np.asarray(task.labels)]
    rows = np.repeat(np.arange(len(times)), times)
    return task._replace(features=task.features[:, rows], labels=task.labels[rows])


def weighed(task: Task) -> Task:
    weights = balanced_weights(np, np.asarray(task.labels), CLASSES)
    return task._replace(class_weights=jnp.asarray(weights, jnp.float32))


def test_the_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([0, 0, 0, 2, 3, 3, 0])
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels)
    found = balanced_weights(np, labels, 5)
    np.testing.assert_allclose(found[[0, 2, 3]], expected)
    assert found[[1, 4]].tolist() == [1, 1] and found[labels].mean() == pytest.approx(1)


def test_a_batch_is_weighed_as_pytorch_weighs_it() -> None:
    """Σ w ℓ / Σ w over the rows of the batch, of which the last fills it up."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 4)), np.array([3, 0, 0, 1, 2])
    weights = np.array([0.5, 2.0, 3.0, 0.25])
    counts = weights[labels] * [1, 1, 1, 1, 0]
    batch = Batch(logits, labels, counts, None)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:4]), torch.tensor(labels[:4]), weight=torch.tensor(weights)
    )
    assert float(mean_cross_entropy(np, logits, batch)) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("clip-adapter", {}),
        ("taskres", {}),
        ("zs-lp", {"optimizer": "adamw"}),
        ("clap", {"optimizer": "adamw"}),
        ("rla", {"strength": 0.5}),
    ],
)
def test_training_is_that_on_a_set_whose_images_are_repeated(
    name: str, given: dict[str, Any], engine: Engine
) -> None:
    """In one batch of all images the two losses are the same function."""
    method = METHODS[name]
    setting = setting_of(method, epochs=12, batch_size=FULL_BATCH, **given)
    task = needed(method, unequal(separable_task(shots=6)))
    plain, balanced, expected = (
        fit(method, setting, None, one, engine) for one in (task, weighed(task), repeated(task))
    )
    for key, array in expected.items():
        np.testing.assert_allclose(balanced[key], array, rtol=2e-3, atol=2e-5)
    assert any(not np.allclose(plain[key], expected[key], rtol=1e-2, atol=1e-4) for key in plain)


def test_lp_plus_plus_bounds_its_steps_by_the_weighed_loss() -> None:
    """As on the set whose images are repeated; without, its steps would be too long."""
    method = METHODS["lp++"]
    assert method.optimizer is not None
    make: Callable[..., Any] = method.optimizer
    task = needed(method, unequal(separable_task(shots=6)))
    sizes = []
    for one in (weighed(task), repeated(task), task):
        setting = setting_of(method)
        state = make(setting, one, 1).init(method.fit(jnp, one, setting))
        sizes.append([float(state["sizes"][part]) for part in ("weights", "alpha")])
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=1e-5)
    assert not np.allclose(sizes[0], sizes[2], rtol=1e-2)


def test_texts_of_cross_modal_count_alike() -> None:
    """They are drawn of all classes alike; whose image stands in the same row has no say."""
    import jax

    method = METHODS["cross-modal"]
    assert method.loss is not None
    task = needed(method, separable_task(shots=6))
    images = task.features[0, :8]
    labels = task.labels[:8]
    weights = jnp.arange(1.0, 9.0)
    seen: list[Batch] = []

    def classify(features: Any) -> Any:
        seen.append(features)
        return features[:, :CLASSES]

    value = method.loss(
        jnp,
        classify,
        {},
        Batch(images, labels, weights, jax.random.key(0)),
        setting_of(method),
        task,
    )
    texts = np.asarray(seen[1], np.float64)
    whose = [
        int(np.argmin([np.abs(t - own).sum(axis=1).min() for own in np.asarray(task.head.text)]))
        for t in texts
    ]

    def losses(rows: Any, own: Any) -> Any:
        rows = np.asarray(rows, np.float64)[:, :CLASSES]
        return np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(8), np.asarray(own)]

    of_images = np.average(losses(images, labels), weights=np.asarray(weights))
    assert float(value) == pytest.approx((of_images + losses(texts, whose).mean()) / 2, rel=1e-4)
