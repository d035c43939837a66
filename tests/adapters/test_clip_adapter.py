"""The adapter against the paper's formulas in float64 PyTorch, its start, and α = β = 0."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from clip_adapter.adapters import classifier
from clip_adapter.adapters.clip_adapter import Architecture, Branch, ClipAdapter
from clip_adapter.adapters.engine import Engine
from clip_adapter.adapters.method import Grid
from clip_adapter.adapters.methods import METHODS
from clip_adapter.adapters.ratio import Constant, RatioKind
from tests.adapters import torch_reference as reference
from tests.adapters.tasks import SHORT, named, separable_task

DIM, CLASSES, ROWS = 12, 5, 7
SCALE, BIAS = 30.0, -0.7


def adapter(branch: Branch, kind: RatioKind, reduction: int = 4, dim: int = DIM) -> ClipAdapter:
    architecture = Architecture(branch, reduction, kind, kind)
    return ClipAdapter(
        architecture, dim, jnp.float32(0.6), jnp.float32(0.3), rngs=nnx.Rngs(jax.random.key(3))
    )


@pytest.mark.parametrize("kind", ["fixed", "learned", "hypernet"])
@pytest.mark.parametrize("branch", ["image", "text", "both"])
def test_logits_loss_and_gradients_are_those_of_the_formula(branch: Branch, kind: RatioKind):
    rng = np.random.default_rng(0)
    features = 3 * rng.normal(size=(ROWS, DIM))
    weights = rng.normal(size=(CLASSES, DIM))
    labels = rng.integers(CLASSES, size=ROWS)
    with jax.enable_x64(True):
        graph, parameters, constants = nnx.split(adapter(branch, kind), nnx.Param, Constant)
        # At random everywhere, so that no gradient vanishes as it does where v is zero.
        parameters = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2), parameters
        )
        constants = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), constants)

        def loss(parameters: nnx.State) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, parameters, constants)
            logits = model(jnp.asarray(features), jnp.asarray(weights), SCALE, BIAS)
            return classifier.cross_entropy(logits, jnp.asarray(labels)).mean(), logits

        differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, logits), gradients = differentiated(parameters)
        assert logits.dtype == jnp.float64
        found = named(gradients)
        inputs = reference.tensors(named(nnx.merge_state(parameters, constants)))

    for name in found:
        inputs[name].requires_grad_()
    expected = reference.logits(
        inputs, branch, kind, torch.tensor(features), torch.tensor(weights), SCALE, BIAS
    )
    expected_loss = torch.nn.functional.cross_entropy(expected, torch.tensor(labels))
    expected_loss.backward()
    np.testing.assert_allclose(np.asarray(logits), expected.detach().numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(float(value), expected_loss.item(), rtol=1e-6)
    for name, gradient in found.items():
        wanted = inputs[name].grad.numpy()
        assert np.abs(wanted).max() > 0, f"nothing is compared for {name}"
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-9 * np.abs(wanted).max())
    sides = {"both": {"image", "text"}}.get(branch, {branch})
    assert {name.partition("/")[0] for name in inputs} == sides


def test_a_bottleneck_starts_as_two_torch_linear_layers_without_bias():
    state = nnx.state(adapter("both", "fixed", reduction=8, dim=512), nnx.Param)
    found = named(state)
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
def test_a_trained_ratio_starts_where_it_is_told(kind: RatioKind, start: float):
    architecture = Architecture("image", 4, kind, kind)
    model = ClipAdapter(architecture, DIM, jnp.float32(start), jnp.float32(0), rngs=nnx.Rngs(0))
    rows = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
    ratio = np.broadcast_to(model.image.ratio(jnp.asarray(rows)), (ROWS, 1))
    np.testing.assert_allclose(ratio, start, atol=2e-4)


def arrays_after_training(grid: Grid, engine: Engine) -> tuple[dict, Mapping[str, np.ndarray]]:
    task = separable_task()
    method = METHODS["clip-adapter"]
    setting = method.single(grid)
    return setting, method.fit(setting, None, task, engine)


@pytest.mark.parametrize("branch", ["image", "text", "both"])
def test_ratios_of_zero_are_zero_shot_to_the_last_bit(branch: Branch, engine: Engine):
    grid = Grid(
        branch=branch,
        alpha=(0.0,),
        beta=(0.0,),
        learning_rate=(0.05,),
        weight_decay=(0.5,),
        schedule=SHORT,
    )
    setting, arrays = arrays_after_training(grid, engine)
    task = separable_task()
    rng = np.random.default_rng(5)
    features = 4 * rng.normal(size=(700, task.weights.shape[1])).astype(np.float32)
    inputs = (features, np.asarray(task.weights), 31.7, -0.3)
    adapted = METHODS["clip-adapter"].logits(setting, arrays, *inputs)
    zero_shot = METHODS["zero-shot"].logits({}, {}, *inputs)
    assert adapted.tobytes() == zero_shot.tobytes()


def test_a_ratio_above_zero_is_not_zero_shot(engine: Engine):
    grid = Grid(alpha=(0.2,), schedule=SHORT)
    setting, arrays = arrays_after_training(grid, engine)
    task = separable_task()
    inputs = (np.asarray(task.features[0]), np.asarray(task.weights), 31.7, -0.3)
    adapted = METHODS["clip-adapter"].logits(setting, arrays, *inputs)
    assert np.abs(adapted - METHODS["zero-shot"].logits({}, {}, *inputs)).max() > 0.01
