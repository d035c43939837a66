"""The adapter against the paper's formulas in float64 PyTorch, its start, and α = β = 0."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_adapter.adapters.engine.runner import Engine
from clip_adapter.adapters.engine.scoring import make_classify
from clip_adapter.adapters.engine.search import fit
from clip_adapter.adapters.engine.training import Run
from clip_adapter.adapters.method import Batch, Head, Task
from clip_adapter.adapters.registry import METHODS
from tests.adapters import torch_reference as reference
from tests.adapters.tasks import (
    CLIP_ADAPTER,
    SHORT,
    row_of,
    separable_task,
    setting_of,
    start_arrays,
)

DIM, CLASSES, ROWS = 12, 5, 7
SCALE, BIAS = 30.0, -0.7


def random_task(dim: int = DIM) -> Task:
    rng = np.random.default_rng(0)
    features, labels = 3 * rng.normal(size=(1, ROWS, dim)), rng.integers(CLASSES, size=ROWS)
    head = Head(jnp.asarray(rng.normal(size=(CLASSES, dim))), jnp.asarray(SCALE), jnp.asarray(BIAS))
    rows, labels = jnp.asarray(features), jnp.asarray(labels)
    return Task(rows, labels, rows[0], labels, head, jnp.int32(3))


def setting(branch: str, kind: Any, **given: Any) -> dict[str, Any]:
    sides = {"alpha": ("image", "both"), "beta": ("text", "both")}
    ratios = {name: kind for name, branches in sides.items() if branch in branches}
    return setting_of(branch=branch, **ratios, **given)


@pytest.mark.parametrize(
    ("branch", "kind"),
    [  # 0.625 is exact in float32
        *(("image", 0.625), ("text", "learned"), ("both", 0.625)),
        *(("both", "learned"), ("both", "hypernet")),
    ],
)
def test_logits_loss_and_gradients_are_those_of_the_formula(branch: str, kind: Any):
    chosen = setting(branch, kind)
    with jax.enable_x64(True):
        task = random_task()
        # At random everywhere, so that no gradient vanishes as it does where v is zero.
        rng = np.random.default_rng(1)
        shapes = start_arrays(CLIP_ADAPTER, chosen, task)
        arrays = {name: rng.normal(size=array.shape) / 2 for name, array in shapes.items()}
        batch = Batch(task.features[0], task.labels, jnp.ones(ROWS, bool), jax.random.key(0))

        def loss(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            classify = Run(CLIP_ADAPTER, chosen, task).classify(arrays)
            logits = classify(batch.features)
            labels = jax.nn.one_hot(batch.labels, CLASSES)
            return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1)), logits

        differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, logits), gradients = differentiated(jax.tree.map(jnp.asarray, arrays))
        assert logits.dtype == jnp.float64

    inputs = reference.tensors(arrays)
    for name in inputs:
        inputs[name].requires_grad_()
    features, weights = (reference.tensor(x) for x in (task.features[0], task.head.weights))
    expected = reference.logits(inputs, chosen, features, weights, SCALE, BIAS)
    labels = torch.tensor(np.asarray(task.labels), dtype=torch.int64)
    expected_loss = torch.nn.functional.cross_entropy(expected, labels)
    expected_loss.backward()
    np.testing.assert_allclose(np.asarray(logits), expected.detach().numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(float(value), expected_loss.item(), rtol=1e-6)
    for name, gradient in gradients.items():
        wanted = inputs[name].grad.numpy()
        assert np.abs(wanted).max() > 0, f"nothing is compared for {name}"
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-9 * np.abs(wanted).max())
    sides = {"both": {"image", "text"}}.get(branch, {branch})
    assert {name.partition("/")[0] for name in inputs} == sides
    # The formula that is saved with is the one that was trained with.
    found = CLIP_ADAPTER.logits(
        np, arrays, chosen, np.asarray(task.features[0]), Head(weights.numpy(), SCALE, BIAS)
    )
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-6, atol=1e-9)


def test_a_bottleneck_starts_as_two_torch_linear_layers_without_bias():
    found = start_arrays(CLIP_ADAPTER, setting("both", 0.5, reduction=8), random_task(512))
    assert {name: array.shape for name, array in found.items()} == {
        f"{side}/bottleneck/{layer}/kernel": shape
        for side in ("image", "text")
        for layer, shape in (("down", (512, 64)), ("up", (64, 512)))
    }
    for kernel in found.values():
        bound = 1 / np.sqrt(kernel.shape[0])
        assert np.abs(kernel).max() <= bound
        assert np.abs(kernel).max() > 0.999 * bound
        # U(±b) has mean 0 and variance b²/3; the tolerances are six standard errors.
        assert abs(kernel.mean()) < 6 * bound / np.sqrt(3 * kernel.size)
        spread = 6 * np.sqrt(4 / 45 / kernel.size)
        assert kernel.var() / bound**2 == pytest.approx(1 / 3, abs=spread)
    kernels = [array.ravel() for array in found.values()]
    for other in kernels[1:]:
        assert abs(np.corrcoef(kernels[0], other)[0, 1]) < 0.05


@pytest.mark.parametrize("kind", ["learned", "hypernet"])
@pytest.mark.parametrize("start", [0.0, 0.2, 1.0])
def test_a_trained_ratio_starts_where_it_is_told(kind: str, start: float):
    task, chosen = random_task(), setting("image", kind, alpha_init=start)
    arrays = start_arrays(CLIP_ADAPTER, chosen, task)
    found = CLIP_ADAPTER.describe(np, arrays, chosen, np.asarray(task.features[0]), task.head)
    np.testing.assert_allclose(np.broadcast_to(found["alpha"], (ROWS, 1)), start, atol=2e-4)


def ratio_task(best: str) -> Task:
    """Sixteen images of each of four classes. `high`: the class names say little, so that the
    images have to. `low`: they say all, and a bottleneck of one unit can only take away."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16))
    noise, disturbed = {"high": (1.0, 3.0), "low": (1.5, 0.0)}[best]
    weights = centres + disturbed * rng.normal(size=centres.shape)

    def images(count: int) -> tuple[jax.Array, jax.Array]:
        labels = np.repeat(np.arange(4), count)
        rows = 2 * (centres[labels] + noise * rng.normal(size=(len(labels), 16)))
        return jnp.asarray(rows, jnp.float32), jnp.asarray(labels, jnp.int32)

    (features, labels), validation = images(16), images(250)
    head = Head(jnp.asarray(weights, jnp.float32), jnp.float32(20), jnp.float32(0))
    return Task(features[None], labels, *validation, head, jnp.int32(1))


@pytest.mark.parametrize(("best", "reduction"), [("high", 4), ("low", 16)])
def test_a_learned_ratio_comes_near_the_best_one(best: str, reduction: int, engine: Engine):
    """From 0.2 and from 0.8, on data where one of the two is clearly better than the other."""
    task = ratio_task(best)

    def runs(**given: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """(what is described of α, validation's (accuracy, NLL)) of each value."""
        settings = [
            setting_of(
                reduction=reduction, learning_rate=1e-3, **dict(zip(given, values, strict=True))
            )
            for values in zip(*given.values(), strict=True)
        ]
        alphas, scores = [], []
        for chunk in engine.run(CLIP_ADAPTER, settings, task):
            for row, index in enumerate(chunk.indices):
                arrays = row_of(chunk.state.trained, row)
                told = CLIP_ADAPTER.describe(np, arrays, settings[index], task.features, task.head)
                alphas.append(told.get("alpha"))
                scores.append(np.asarray(chunk.state.history[row, 0]))
        return np.array(alphas), np.array(scores)

    grid = [0.1, 0.2, 0.4, 0.6, 0.8, 0.9]
    _, fixed = runs(alpha=grid)
    low, high = fixed[grid.index(0.2)], fixed[grid.index(0.8)]
    better, worse = (low, high) if best == "low" else (high, low)
    assert better[0] > worse[0] + 0.02, "neither is clearly better: nothing is shown"
    assert better[1] < worse[1] - 0.1, "neither is clearly better: nothing is shown"
    learned, scores = runs(alpha=["learned"] * 2, alpha_init=[0.2, 0.8])
    wanted = grid[int(fixed[:, 1].argmin())]
    np.testing.assert_allclose(learned, wanted, atol=0.2)
    assert scores[:, 1].max() < fixed[:, 1].min() + 0.01
    assert scores[:, 0].min() > fixed[:, 0].max() - 0.01


def test_a_bottleneck_without_hidden_units_is_refused():
    with pytest.raises(ValueError, match="reduction of 13 leaves no hidden unit"):
        start_arrays(CLIP_ADAPTER, setting("image", 0.5, reduction=13), random_task())


def test_described_ratios_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    chosen = setting_of(branch="both", alpha="learned", beta="hypernet")
    arrays = {
        "image/ratio/logit": np.float32(0.7),
        "text/ratio/hidden/kernel": rng.normal(size=(DIM, 32)),
        "text/ratio/direction": rng.normal(size=(32, 1)),
        "text/ratio/logit": np.float32(-0.5),
    }
    w = rng.normal(size=(CLASSES, DIM))
    found = CLIP_ADAPTER.describe(np, arrays, chosen, np.zeros((3, DIM)), Head(w, SCALE, BIAS))
    w = w / np.linalg.norm(w, axis=1, keepdims=True)
    hidden = np.maximum(w @ arrays["text/ratio/hidden/kernel"], 0)
    beta = 1 / (1 + np.exp(0.5 - hidden @ arrays["text/ratio/direction"]))
    assert found.keys() == {"alpha", "beta"}
    np.testing.assert_allclose(found["alpha"], 1 / (1 + np.exp(-0.7)), rtol=1e-6)
    np.testing.assert_allclose(found["beta"], beta, rtol=1e-6)
    assert CLIP_ADAPTER.describe(np, {}, setting("both", 0.4), w, Head(w, SCALE, BIAS)) == {}


@pytest.mark.parametrize("branch", ["image", "both"])
def test_ratios_of_zero_are_zero_shot_to_the_last_bit(branch: str, engine: Engine):
    chosen = setting(branch, 0.0, learning_rate=0.05, weight_decay=0.5, **SHORT)
    task = separable_task()
    arrays = fit(CLIP_ADAPTER, chosen, None, task, engine)
    rng = np.random.default_rng(5)
    features = 4 * rng.normal(size=(700, task.head.weights.shape[1])).astype(np.float32)
    head = task.head._replace(logit_scale=np.float32(31.7), logit_bias=np.float32(-0.3))
    adapted = make_classify(CLIP_ADAPTER, chosen, arrays, head)(features)
    zero_shot = make_classify(METHODS["zero-shot"], {}, {}, head)(features)
    assert adapted.tobytes() == zero_shot.tobytes()


def test_an_adapter_on_the_text_moves_no_image():
    features, task = np.ones((2, DIM)), random_task()
    found = CLIP_ADAPTER.adapt(np, {}, setting("text", 0.3), features, task.head)
    np.testing.assert_array_equal(found, features)


def test_a_ratio_above_zero_is_not_zero_shot(engine: Engine):
    chosen, task = setting_of(alpha=0.2, **SHORT), separable_task()
    arrays = fit(CLIP_ADAPTER, chosen, None, task, engine)
    adapted = make_classify(CLIP_ADAPTER, chosen, arrays, task.head)(task.features[0])
    zero_shot = make_classify(METHODS["zero-shot"], {}, {}, task.head)(task.features[0])
    assert np.abs(adapted - zero_shot).max() > 0.01
