"""TIMO and TIMO-S (Li et al., arXiv 2412.11375): images weigh the prompts, prompts join the images.

    logits = α unit(f) Wᵀ + unit(f) K + b
    m_kp = t_kp · unit(μ_k)
    W_k = unit(Σ_p softmax_p(γ m_kp / ‖m_k‖) t_kp)

in cosines: t_kp are the unit features of class k's P prompts, μ_k the mean of its unit support
rows, all views beside each other; a class without images takes its zero-shot weights for μ_k. K and
b are those of GDA on the support rows and, as rows of class k, the products m_kp t_kp of the β P
prompts with the largest m_kp; beyond P the same come a second time. The neighbours that GDA needs
for a class without images are never asked: its prompts are there.

The official code searches γ by W alone, and then β and α. Here the product of all three is one
program, in which neither γ nor α touches a linear system.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.formulas import norm, sum_by_class, unit
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Array, Head, Method, Setting, Task
from clip_adapter.adapters.methods import gda
from clip_adapter.adapters.methods.kernels import by_refits, support_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def fit(xp, task, setting):
    """weights W (C, D), kernel K (D, C), bias b (C,) and the text's weight α ()."""
    rows, labels = support_rows(xp, task)
    kept = xp.ones_like(rows[:, :1])
    likeness = agreement(xp, rows, labels, task.head, kept)
    kernel, bias = joined_gaussians(xp, rows, labels, task.head, kept, setting["beta"])
    return {
        "weights": guided_weights(xp, likeness, task.head, setting["gamma"]),
        "kernel": kernel,
        "bias": bias,
        "weight": xp.asarray(weight_of(task, setting), dtype=rows.dtype),
    }


def agreement(
    xp: Any,
    rows: Float[Array, "N D"],
    labels: Int[Array, " N"],
    head: Head,
    kept: Float[Array, "N 1"],
) -> Float[Array, "C P"]:
    """m: how near each prompt is to the mean of its class's rows where `kept` is 1 and not 0."""
    classes = len(head.weights)
    counts = sum_by_class(xp, kept, labels, classes)
    sums = sum_by_class(xp, kept * rows, labels, classes)
    means = unit(xp, xp.where(counts > 0, sums, head.weights))
    return xp.sum(unit(xp, head.text) * means[:, None], axis=-1)


def guided_weights(
    xp: Any, likeness: Float[Array, "C P"], head: Head, gamma: Any
) -> Float[Array, "C D"]:
    """W, of the prompts as the images weigh them."""
    sharp = gamma * likeness / norm(xp, likeness)
    shares = xp.exp(sharp - xp.amax(sharp, axis=1, keepdims=True))
    return unit(xp, xp.sum(shares[:, :, None] * unit(xp, head.text), axis=1))


def joined_gaussians(
    xp: Any,
    rows: Float[Array, "N D"],
    labels: Int[Array, " N"],
    head: Head,
    kept: Float[Array, "N 1"],
    beta: Any,
) -> tuple[Float[Array, "D C"], Float[Array, " C"]]:
    """K and b of the kept rows and of the β P prompts that are nearest to them."""
    classes, prompts, dim = head.text.shape
    likeness = agreement(xp, rows, labels, head, kept)
    rank = xp.argsort(xp.argsort(-likeness, axis=1), axis=1)
    count = xp.where(beta * prompts < 1, 1, xp.round(beta * prompts))
    texts = (likeness[:, :, None] * unit(xp, head.text)).reshape(-1, dim)
    # Each prompt twice: how many of them count is a mask, so that β changes no shape.
    twice = xp.concatenate([rank.reshape(-1), prompts + rank.reshape(-1)])
    joined = xp.asarray(twice < count, dtype=rows.dtype)[:, None]
    of_text = xp.asarray(xp.repeat(xp.arange(classes), prompts), dtype=labels.dtype)
    return gda.gaussians(
        xp,
        xp.concatenate([rows, texts, texts]),
        xp.concatenate([labels, of_text, of_text]),
        head.weights,
        xp.concatenate([kept, joined]),
    )


def left_out(xp, task, setting, rounds):
    """By a fit for each round, as GDA: prompts are weighed and joined without its images."""
    rows, labels = support_rows(xp, task)

    # Apart, so that a grid computes the one once for every γ and the other once for every β.
    def text(kept: Array, images: Array) -> Array:
        likeness = agreement(xp, rows, labels, task.head, kept)
        return rows[images] @ guided_weights(xp, likeness, task.head, setting["gamma"]).T

    def gaussian(kept: Array, images: Array) -> Array:
        kernel, bias = joined_gaussians(xp, rows, labels, task.head, kept, setting["beta"])
        return rows[images] @ kernel + bias

    of_text, of_images = (by_refits(xp, task, rounds, part) for part in (text, gaussian))
    return weight_of(task, setting) * of_text + of_images


def weight_of(task: Task, setting: Setting) -> Any:
    return by_shots(task) if setting["alpha"] == gda.BY_SHOTS else setting["alpha"]


def by_shots(task: Task) -> Any:
    """α where nothing chooses: 30 s / √K for K images a class and the logit scale s.

    At 100, of the official grid, three sets of real features lose 5 to 10 points to zero-shot at
    one shot (docs/methods.md).
    """
    shots = max(1.0, task.features.shape[1] / len(task.head.weights))
    return 30 * task.head.logit_scale / shots**0.5


def logits(xp, arrays, setting, features, head):
    """α unit(f) Wᵀ + unit(f) K + b."""
    rows = unit(xp, features)
    return (
        arrays["weight"] * (rows @ arrays["weights"].T) + rows @ arrays["kernel"] + arrays["bias"]
    )


def for_classes(arrays, setting, task, head):
    """For classes without images: GDA's K and b, and prompts weighed by the zero-shot weights."""
    import numpy as np

    rows = np.asarray(head.weights)[:0]
    none = np.zeros(0, np.int32)
    likeness = agreement(np, rows, none, head, rows[:, :1])
    weights = guided_weights(np, likeness, head, setting["gamma"])
    return gda.for_classes(arrays, setting, task, head) | {"weights": weights}


TIMO = Method(
    name="timo",
    source="arXiv 2412.11375",
    hyper={
        # The costlier one first: one linear system for each β.
        "beta": Hyper(
            1.0,
            "How many of a class's prompts join its images, as a multiple of how many it has.",
            above=0,
            high=2,
        ),
        "gamma": Hyper(
            50.0, "How much more prompts count that are near to the images of their class.", low=0
        ),
        "alpha": Hyper(
            gda.BY_SHOTS,
            "Weight of the text; `by-shots` falls with the images per class.",
            tuple(10.0**exponent for exponent in range(-4, 5)),
            low=0,
            words=(gda.BY_SHOTS,),
        ),
    },
    logits=logits,
    shapes={"weights": "C D", "kernel": "D C", "bias": "C", "weight": ""},
    fit=fit,
    left_out=left_out,
    for_classes=for_classes,
    needs=("text",),
    uses_views=True,
)
TIMO_S = replace(
    TIMO,
    name="timo-s",
    hyper={
        **TIMO.hyper,
        "beta": replace(TIMO.hyper["beta"], tried=tuple(step / 5 for step in range(1, 11))),
        "gamma": replace(TIMO.hyper["gamma"], tried=tuple(5.0 * step for step in range(1, 21))),
    },
)
