"""Multinomial logistic regression by L-BFGS, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from clip_adapter.adapters.classifier import cross_entropy
from clip_adapter.adapters.method import Arrays

MAX_ITERATIONS = 1000
GRADIENT_TOLERANCE = 1e-8


def fit_linear_probe(
    features: npt.ArrayLike, labels: npt.ArrayLike, classes: int, c: float
) -> Arrays:
    """Minimise C · Σ_i CE(f_i K + b, y_i) + ½‖K‖², the objective of scikit-learn's
    LogisticRegression, in float64.

    Features are scaled to mean norm 1 (and C with them, which leaves the minimum where it is), so
    that one gradient tolerance fits encoders of any output scale.

    features: (N, D). labels: (N,) integers. c: C > 0.
    Returns kernel (D, classes) and bias (classes,), float32, for un-scaled features.
    """
    rows = np.asarray(features, np.float64)
    scale = np.mean(np.linalg.norm(rows, axis=1))
    dim = rows.shape[1]
    with jax.enable_x64(True):
        data = (jnp.asarray(rows / scale), jnp.asarray(labels), jnp.float64(c * scale**2))

        def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
            value, gradient = _value_and_gradient(jnp.asarray(flat), *data, classes=classes)
            return float(value), np.asarray(gradient)

        solution = minimize(
            objective,
            np.zeros((dim + 1) * classes),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS, "gtol": GRADIENT_TOLERANCE, "ftol": 1e-15},
        )
    solved = solution.x.reshape(dim + 1, classes)
    return {
        "kernel": (solved[:-1] / scale).astype(np.float32),
        "bias": solved[-1].astype(np.float32),
    }


@partial(jax.jit, static_argnames="classes")
@jax.value_and_grad
def _value_and_gradient(
    flat: jax.Array, features: jax.Array, labels: jax.Array, c: jax.Array, *, classes: int
) -> jax.Array:
    """The objective divided by C·N, so that its gradient is of order one whatever C and N are."""
    kernel, bias = jnp.split(flat.reshape(-1, classes), [features.shape[1]])
    losses = cross_entropy(jnp, features @ kernel + bias, labels)
    return jnp.mean(losses) + jnp.sum(kernel * kernel) / (2 * c * len(labels))
