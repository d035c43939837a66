"""Tip-Adapter (Zhang et al., arXiv 2111.03930): a key-value cache of the support set.

    logits = zero-shot logits + α · exp(−β (1 − unit(f) Kᵀ)) V

K (S, D): directions of the support features, averaged over views. V (S, C): their labels, one-hot.
Nothing is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.classifier import cosine_logits, one_hot, unit
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Array, Arrays, Head, Method, Setting, Task

if TYPE_CHECKING:
    from jaxtyping import Float


def fit(xp: Any, task: Task, setting: Setting) -> Arrays:
    """keys: unit(mean over views of the unit features). values: the labels, one-hot."""
    keys = unit(xp, xp.mean(unit(xp, task.features), axis=0))
    return {"keys": keys, "values": one_hot(xp, task.labels, len(task.head.weights), keys)}


def logits(
    xp: Any, arrays: Arrays, setting: Setting, features: Float[Array, "N D"], head: Head
) -> Float[Array, "N C"]:
    """scale · unit(f) · unit(W)ᵀ + bias + α · exp(−β (1 − unit(f) Kᵀ)) V."""
    affinity = unit(xp, features) @ arrays["keys"].T
    cache = xp.exp(-setting["beta"] * (1 - affinity)) @ arrays["values"]
    return cosine_logits(xp, features, head) + setting["alpha"] * cache


def even(scale: float, count: int) -> tuple[float, ...]:
    """`count` values in equal steps from 0.1 up to `scale`, which is left out, as in the official
    code."""
    return tuple(round(0.1 + (scale - 0.1) * step / count, 6) for step in range(count))


# 4,000 points, as in the official code, whose ranges end between 3 and 50, by data set.
BETAS, ALPHAS = even(50, 200), even(50, 20)
TIP_ADAPTER = Method(
    name="tip-adapter",
    reference="arXiv 2111.03930",
    hyper={
        # The costlier one first: exp(…) is computed once for each β.
        "beta": Hyper(5.5, "Sharpness of the cache.", BETAS, low=0),
        "alpha": Hyper(1.0, "Weight of the cache.", ALPHAS, low=0),
    },
    logits=logits,
    shapes={"keys": "S D", "values": "S C"},
    fit=fit,
    uses_views=True,
    unseen_classes=False,
)
