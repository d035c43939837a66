"""Ridge regression from the zero-shot classifier (as few-shot probes of vision models have it from
zero: Dosovitskiy et al., arXiv 2010.11929, section 4.1).

    W = argmin Σ ‖y_i − W f_i‖² + λ ‖W − c T‖²        logits(f) = f Wᵀ

in cosines: f_i, the support rows (all views beside each other), and T, the classifier weights, are
unit vectors, y_i is one-hot. λ → ∞ is zero-shot. There is no intercept: it would take the support
set's mean out of the zero-shot logits, which is then no longer among the classifiers. The logits
have no scale: they estimate 0 and 1.

With a second encoder, whose unit features f₂ are counted from the mean of the training images', the
rows are [f, √ρ f₂] and the start is [c T, 0]: the kernel f·f' + ρ f₂·f₂'.

With R = Y − c F Tᵀ, W = c T + ((FᵀF + λI)⁻¹ Fᵀ R)ᵀ = c T + (Fᵀ (FFᵀ + λI)⁻¹ R)ᵀ: the smaller of the
two systems is decomposed, once for every λ and c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.formulas import unit
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Array, Method, Setting, Task
from clip_adapter.adapters.methods.kernels import (
    SECOND,
    both_parts,
    decomposed,
    finish,
    geometric,
    left_out_fit,
    residuals,
    second_rows,
)

if TYPE_CHECKING:
    from jaxtyping import Float


def fit(xp, task, setting):
    """weights W (C, D); of a second encoder √ρ W₂ (C, E), and its centre (E,)."""
    rows, _, residual = residuals(xp, task, setting["prior"])
    dim, rows = rows.shape[1], beside(xp, rows, task, setting)
    values, vectors = decomposed(xp, smaller_gram(rows))
    if is_primal(rows):
        basis, right = vectors, vectors.T @ (rows.T @ residual)
    else:
        basis, right = rows.T @ vectors, vectors.T @ residual
    change = basis @ (right / (values + setting["ridge"])[:, None])
    fitted = {"weights": setting["prior"] * unit(xp, task.head.weights) + change[:dim].T}
    if rows.shape[1] > dim:
        root = xp.sqrt(xp.asarray(setting["second"], dtype=rows.dtype))
        fitted |= {"second_weights": root * change[dim:].T, "centre": task.extra["centre"]}
    return fitted


def beside(
    xp: Any, rows: Float[Array, "N D"], task: Task, setting: Setting
) -> Float[Array, "N D+E"]:
    """The rows with √ρ times those of the second encoder behind them, where there is one."""
    second = second_rows(xp, task)
    if second is None:
        return rows
    root = xp.sqrt(xp.asarray(setting["second"], dtype=rows.dtype))
    return xp.concatenate([rows, root * second], axis=1)


def is_primal(rows: Float[Array, "N D"]) -> bool:
    """Whether D × D is less than N × N."""
    return rows.shape[1] < rows.shape[0]


def smaller_gram(rows: Float[Array, "N D"]) -> Any:
    return rows.T @ rows if is_primal(rows) else rows @ rows.T


def logits(xp, arrays, setting, features, head):
    """unit(f) Wᵀ, and √ρ unit(f₂ − m) W₂ᵀ."""
    first, second = both_parts(xp, features, head, arrays)
    found = first @ arrays["weights"].T
    return found if second is None else found + second @ arrays["second_weights"].T


def left_out(xp, task, setting, rounds):
    rows, known, residual = residuals(xp, task, setting["prior"])
    rows = beside(xp, rows, task, setting)
    values, vectors = decomposed(xp, smaller_gram(rows))
    mapped = rows if is_primal(rows) else None
    fitted = left_out_fit(xp, values, vectors, setting["ridge"], residual, rounds, mapped)
    return known[: len(fitted)] + fitted


RIDGE = Method(
    name="ridge",
    source="arXiv 2010.11929",
    hyper={
        "second": SECOND,  # the costliest first: an eigendecomposition for each
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
    shapes={"weights": "C D", "second_weights": "C E", "centre": "E"},
    fit=fit,
    finish=finish,
    left_out=left_out,
    uses_views=True,
)
