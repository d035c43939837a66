"""Gaussian discriminant analysis beside zero-shot CLIP (Wang et al., arXiv 2402.04087).

    logits = zero-shot logits + α (unit(f) K + b)
    k_c = P μ_c,  b_c = log 1/C − ½ μ_cᵀ P μ_c,  P = D ((N − 1) Σ + tr(Σ) I)⁻¹

μ_c (D,): class means of the N unit support features, all views beside each other. Σ (D, D): the
covariance that the classes share, shrunk as by Kubokawa and Srivastava. Where all images equal
their class's mean (one shot without views) Σ is zero, whose pseudo-inverse is zero, and zero-shot
CLIP is left. A class without images takes the mean of its nearest neighbours among all images.
With a second encoder, whose features f₂ are counted from the mean of the training images', the
weight is of unit(f) K + b + ρ (unit(f₂) K₂ + b₂).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.formulas import cosine_logits, sum_by_class, unit
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Array, Method, Setting, Task
from clip_adapter.adapters.methods.kernels import (
    SECOND,
    both_parts,
    by_refits,
    finish,
    one_by_one,
    second_rows,
    support_rows,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NEIGHBOURS = 64
"""Support images that stand for a class of which there are none."""
TEXT_COPIES = 16
"""As how many images the text of such a class counts in its mean, where it is classified anew."""
BY_SHOTS = "by-shots"
# Of unit features, the mean squared distance from their class's mean that is float32 rounding.
NO_SPREAD = 1e-12


def fit(xp, task, setting):
    """kernel K (D, C), bias b (C,) and weight α (); of a second encoder K₂ (E, C), b₂ (C,) and its
    centre (E,)."""
    rows, labels = support_rows(xp, task)
    kept = xp.ones_like(rows[:, :1])
    kernel, bias = gaussians(xp, rows, labels, task.head.weights, kept)
    weight = xp.asarray(weight_of(task, setting), dtype=rows.dtype)
    fitted = {"kernel": kernel, "bias": bias, "weight": weight}
    if (second := second_rows(xp, task)) is not None:
        own = gaussians(xp, second, labels, task.head.weights, kept, rows)
        centre = task.extra["centre"]
        fitted |= {"second_kernel": own[0], "second_bias": own[1], "centre": centre}
    return fitted


def gaussians(
    xp: Any,
    rows: Float[Array, "N D"],
    labels: Int[Array, " N"],
    weights: Float[Array, "C F"],
    kept: Float[Array, "N 1"],
    first: Float[Array, "N F"] | None = None,
) -> tuple[Float[Array, "D C"], Float[Array, " C"]]:
    """K and b of the rows where `kept` is 1 and not 0. first: these by the encoder that the weights
    are of, where they are by another one."""
    classes = len(weights)
    counts = sum_by_class(xp, kept, labels, classes)
    means = sum_by_class(xp, kept * rows, labels, classes) / xp.where(counts > 0, counts, 1)
    centred = kept * (rows - means[labels])

    def with_neighbours() -> Array:
        similar = weights @ (rows if first is None else first).T
        near = xp.asarray(nearest(xp, similar, kept), dtype=rows.dtype)
        return xp.where(counts > 0, means, near @ rows / xp.sum(near, axis=1, keepdims=True))

    # To rank all images for each class takes longer than all the rest.
    if xp.__name__ == "numpy":
        means = means if (counts > 0).all() else with_neighbours()
    else:
        import jax

        means = jax.lax.cond(xp.all(counts > 0), lambda: means, with_neighbours)
    spread, count = xp.sum(centred * centred), xp.sum(kept)
    trace = spread / xp.where(count > 1, count - 1, 1)
    flat = spread <= NO_SPREAD * count
    solved = ridge_solve(xp, centred, xp.where(flat, 1, trace), means.T)
    kernel = xp.where(flat, 0, rows.shape[1] * solved)
    prior = xp.log(xp.ones_like(means[:, 0]) / len(means))
    return kernel, prior - xp.sum(means.T * kernel, axis=0) / 2


def left_out(xp, task, setting, rounds):
    """By a fit for each round: the covariance's shrinkage depends on all images that are left."""
    rows, labels = support_rows(xp, task)
    second = second_rows(xp, task)

    def gaussian(kept: Array, images: Array) -> Array:
        kernel, bias = gaussians(xp, rows, labels, task.head.weights, kept)
        said = rows[images] @ kernel + bias
        if second is None:
            return said
        kernel, bias = gaussians(xp, second, labels, task.head.weights, kept, rows)
        return said + setting["second"] * (second[images] @ kernel + bias)

    weighted = weight_of(task, setting) * by_refits(xp, task, rounds, gaussian)
    first = task.features[0][:, : rows.shape[1]]
    return cosine_logits(xp, first, task.head) + weighted


def weight_of(task: Task, setting: Setting) -> Any:
    return by_shots(task) if setting["alpha"] == BY_SHOTS else setting["alpha"]


def by_shots(task: Task) -> float:
    """α where nothing chooses: K^(5/3) / 1000 for K images a class, 0.003 at 2 and 0.1 at 16.

    The fewer images, the less the covariance is known: on real features the best constant at 16
    shots, 0.1, is 20 points below zero-shot at 2 (docs/protocol.md).
    """
    return (task.features.shape[1] / len(task.head.weights)) ** (5 / 3) / 1000


def nearest(xp: Any, similar: Float[Array, "C N"], kept: Float[Array, "N 1"]) -> Bool[Array, "C N"]:
    """For each class, the kept rows that are most similar to its weights: 64, and those equal to
    the last of them."""
    similarity = xp.where(kept.T > 0, similar, -xp.inf)
    last = xp.sort(similarity, axis=1)[:, -min(NEIGHBOURS, len(kept))]
    return (similarity >= last[:, None]) & (kept.T > 0)


def ridge_solve(
    xp: Any, rows: Float[Array, "N D"], strength: Float[Array, ""], right: Float[Array, "D C"]
) -> Float[Array, "D C"]:
    """(XᵀX + s I)⁻¹ B, through N × N where that is less than D × D (Woodbury's identity)."""
    count, dim = rows.shape
    solve = one_by_one(xp, "solve")
    if dim <= count:
        return solve(rows.T @ rows + strength * xp.eye(dim, dtype=rows.dtype), right)
    gram = rows @ rows.T + strength * xp.eye(count, dtype=rows.dtype)
    return (right - rows.T @ solve(gram, rows @ right)) / strength


def logits(xp, arrays, setting, features, head):
    """scale · unit(f) · unit(W)ᵀ + bias + α (unit(f) K + b)."""
    rows, second = both_parts(xp, features, head, arrays)
    gaussian = rows @ arrays["kernel"] + arrays["bias"]
    if second is not None:
        own = second @ arrays["second_kernel"] + arrays["second_bias"]
        gaussian = gaussian + setting["second"] * own
    first = features[:, : rows.shape[1]]
    return cosine_logits(xp, first, head) + arrays["weight"] * gaussian


def for_classes(arrays, setting, task, head):
    """The same for classes without images (the official base-to-new code).

    The mean of a class is that of its 64 nearest support images and 16 copies of its weights w; P
    is the mean over classes of D ((k − 1) Σ_c + tr(Σ_c) I)⁻¹, Σ_c the covariance of these k images
    about w. Of a second encoder, which has no weights of a class, nothing is known of them.
    """
    import numpy as np

    own = task._replace(features=np.asarray(task.features))
    rows, weights = support_rows(np, own)[0], unit(np, np.asarray(head.weights))
    most = min(NEIGHBOURS, len(rows))
    near = [rows[np.argsort(-(rows @ w), kind="stable")[:most]] for w in weights]
    means = np.stack([n.sum(axis=0) for n in near]) + TEXT_COPIES * weights
    means /= most + TEXT_COPIES
    kernel = np.zeros_like(means.T)
    for own, w in zip(near, weights, strict=True):
        strength = np.sum((own - w) ** 2) / max(most - 1, 1)
        kernel += ridge_solve(np, own - w, strength, means.T)
    kernel *= weights.shape[1] / len(weights)
    bias = -np.log(len(weights)) - np.sum(means.T * kernel, axis=0) / 2
    return {"kernel": kernel, "bias": bias, "weight": arrays["weight"]}


GDA = Method(
    name="gda",
    source="arXiv 2402.04087",
    hyper={
        "alpha": Hyper(
            BY_SHOTS,
            "Weight of the Gaussian classifier; `by-shots` grows with the images per class.",
            (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0),
            low=0,
            words=(BY_SHOTS,),
        ),
        "second": SECOND,
    },
    logits=logits,
    shapes={
        "kernel": "D C",
        "bias": "C",
        "weight": "",
        "second_kernel": "E C",
        "second_bias": "C",
        "centre": "E",
    },
    fit=fit,
    finish=finish,
    left_out=left_out,
    for_classes=for_classes,
    uses_views=True,
)
