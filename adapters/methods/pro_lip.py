"""ProLIP (Fahes et al., arXiv 2410.05270): CLIP's last visual projection, fine-tuned and held near
where it was, so that nothing has to be chosen on validation data.

    logits = scale · unit(h P + c) · Wᵀ + bias              P: F × D, from the backbone's projection
    loss   = cross-entropy + λ Σ (P − P₀)²

h (F) is an image's feature before that projection; the projection's own bias c stays. λ is
1 / shots unless it is given; of unequal classes, shots are images per class on average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.formulas import cosine_logits, mean_cross_entropy
from clip_adapter.adapters.method import (
    Array,
    Arrays,
    Batch,
    Classify,
    Head,
    Method,
    Setting,
    Task,
)
from clip_adapter.adapters.methods.rla import HYPER, strength

if TYPE_CHECKING:
    from jaxtyping import Float


def fit(xp: Any, task: Task, setting: Setting) -> Arrays:
    """P and c at the start."""
    return {"projection": task.extra["projection"], "bias": task.extra["bias"]}


def adapt(
    xp: Any, arrays: Arrays, setting: Setting, features: Float[Array, "N F"], head: Head
) -> Float[Array, "N D"]:
    """h P + c."""
    return features @ arrays["projection"] + arrays["bias"]


def logits(
    xp: Any, arrays: Arrays, setting: Setting, features: Float[Array, "N F"], head: Head
) -> Float[Array, "N C"]:
    """scale · unit(h P + c) · unit(W)ᵀ + bias."""
    return cosine_logits(xp, adapt(xp, arrays, setting, features, head), head)


def held_loss(
    xp: Any, classify: Classify, arrays: Arrays, batch: Batch, setting: Setting, task: Task
) -> Float[Array, ""]:
    """Cross-entropy + λ Σ (P − P₀)²."""
    moved = arrays["projection"] - task.extra["projection"]
    penalty = strength(setting, task) * xp.sum(moved**2)
    return mean_cross_entropy(xp, classify(batch.features), batch) + penalty


PRO_LIP = Method(
    name="prolip",
    reference="arXiv 2410.05270",
    hyper=HYPER,
    logits=logits,
    shapes={"projection": "F D", "bias": "D"},
    fit=fit,
    trained=("projection",),
    adapt=adapt,
    loss=held_loss,
    needs=("projection",),
    uses_views=True,
    unseen_classes=True,
)
