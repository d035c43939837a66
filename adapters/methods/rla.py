"""Regularised linear adapter (Fahes et al., arXiv 2410.05270): a matrix on the image features that
is held near the identity, so that nothing has to be chosen on validation data.

    logits = scale · unit(f Mᵀ) · Wᵀ + bias                 M: D × D, from the identity
    loss   = cross-entropy + λ Σ (M − I)²

λ is 1 / shots unless it is given; of unequal classes, shots are images per class on average.
"""

from clip_adapter.adapters.formulas import cosine_logits, mean_cross_entropy
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.optimisation import FULL_BATCH, trained_with

ONE_BY_SHOTS = "1/shots"


def fit(xp, task, setting):
    """M at the start."""
    return {"matrix": xp.eye(task.features.shape[-1], dtype=task.features.dtype)}


def adapt(xp, arrays, setting, features, head):
    """f Mᵀ."""
    return features @ arrays["matrix"].T


def logits(xp, arrays, setting, features, head):
    """scale · unit(f Mᵀ) · unit(W)ᵀ + bias."""
    return cosine_logits(xp, adapt(xp, arrays, setting, features, head), head)


def held_loss(xp, classify, arrays, batch, setting, task):
    """Cross-entropy + λ Σ (M − I)²."""
    moved = arrays["matrix"] - xp.eye(len(arrays["matrix"]))
    penalty = strength(setting, task) * xp.sum(moved**2)
    return mean_cross_entropy(xp, classify(batch.features), batch) + penalty


def strength(setting, task):
    """λ."""
    if setting["strength"] == ONE_BY_SHOTS:
        return len(task.head.weights) / task.features.shape[1]
    return setting["strength"]


# As in the official code, for both of the paper's methods.
HYPER = {
    "strength": Hyper(
        ONE_BY_SHOTS,
        "How strongly the matrix is held where it starts (λ).",
        low=0,
        words=(ONE_BY_SHOTS,),
    ),
    **trained_with(
        optimizer="adam",
        learning_rate=1e-3,
        weight_decay=0.0,
        epochs=300,
        batch_size=FULL_BATCH,
        warmup="none",
        adam_epsilon=1e-4,
    ),
}

RLA = Method(
    name="rla",
    source="arXiv 2410.05270",
    hyper=HYPER,
    logits=logits,
    shapes={"matrix": "D D"},
    fit=fit,
    trained=("matrix",),
    adapt=adapt,
    loss=held_loss,
    uses_views=True,
    unseen_classes=True,
)
