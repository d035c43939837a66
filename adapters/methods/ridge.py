"""Ridge regression from the zero-shot classifier (as few-shot probes of vision models have it from
zero: Dosovitskiy et al., arXiv 2010.11929, section 4.1).

    W = argmin Σ ‖y_i − W f_i‖² + λ ‖W − c T‖²        logits(f) = f Wᵀ

in cosines: f_i, the support rows (all views beside each other), and T, the classifier weights, are
unit vectors, y_i is one-hot. λ → ∞ is zero-shot. There is no intercept: it would take the support
set's mean out of the zero-shot logits, which is then no longer among the classifiers. The logits
have no scale: they estimate 0 and 1.

With R = Y − c F Tᵀ, W = c T + ((FᵀF + λI)⁻¹ Fᵀ R)ᵀ = c T + (Fᵀ (FFᵀ + λI)⁻¹ R)ᵀ: the smaller of the
two systems is decomposed, once for every λ and c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.formulas import unit
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Array, Method
from clip_adapter.adapters.methods.kernels import decomposed, geometric, left_out_fit, residuals

if TYPE_CHECKING:
    from jaxtyping import Float


def fit(xp, task, setting):
    """weights W (C, D)."""
    rows, _, residual = residuals(xp, task, setting["prior"])
    values, vectors = decomposed(xp, smaller_gram(rows))
    if is_primal(rows):
        basis, right = vectors, vectors.T @ (rows.T @ residual)
    else:
        basis, right = rows.T @ vectors, vectors.T @ residual
    change = basis @ (right / (values + setting["ridge"])[:, None])
    return {"weights": setting["prior"] * unit(xp, task.head.weights) + change.T}


def is_primal(rows: Float[Array, "N D"]) -> bool:
    """Whether D × D is less than N × N."""
    return rows.shape[1] < rows.shape[0]


def smaller_gram(rows: Float[Array, "N D"]) -> Any:
    return rows.T @ rows if is_primal(rows) else rows @ rows.T


def logits(xp, arrays, setting, features, head):
    """unit(f) Wᵀ."""
    return unit(xp, features) @ arrays["weights"].T


def left_out(xp, task, setting, rounds):
    rows, known, residual = residuals(xp, task, setting["prior"])
    values, vectors = decomposed(xp, smaller_gram(rows))
    mapped = rows if is_primal(rows) else None
    fitted = left_out_fit(xp, values, vectors, setting["ridge"], residual, rounds, mapped)
    return known[: len(fitted)] + fitted


RIDGE = Method(
    name="ridge",
    source="arXiv 2010.11929",
    hyper={
        "ridge": Hyper(
            1.0,
            "λ, how strongly the weights are held to their start.",
            geometric(0.01, 100, 13),
            above=0,
            flag="lambda",
        ),
        "prior": Hyper(
            3.0,
            "c, as a multiple of which the zero-shot weights are the start.",
            (1.0, 3.0, 10.0, 30.0, 100.0),
            low=0,
        ),
    },
    logits=logits,
    shapes={"weights": "C D"},
    fit=fit,
    left_out=left_out,
    uses_views=True,
)
