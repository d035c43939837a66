"""ProLIP (Fahes et al., arXiv 2410.05270): CLIP's last visual projection, fine-tuned and held near
where it was, so that nothing has to be chosen on validation data.

    logits = scale · unit(h P + c) · Wᵀ + bias              P: F × D, from the backbone's projection
    loss   = cross-entropy + λ Σ (P − P₀)²

h (F) is an image's feature before that projection; the projection's own bias c stays. λ is
1 / shots unless it is given; of unequal classes, shots are images per class on average.
"""

from clip_adapter.adapters.formulas import cosine_logits, mean_cross_entropy
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.methods.rla import HYPER, strength


def fit(xp, task, setting):
    """P and c at the start."""
    return {"projection": task.extra["projection"], "bias": task.extra["bias"]}


def adapt(xp, arrays, setting, features, head):
    """h P + c."""
    return features @ arrays["projection"] + arrays["bias"]


def logits(xp, arrays, setting, features, head):
    """scale · unit(h P + c) · unit(W)ᵀ + bias."""
    return cosine_logits(xp, adapt(xp, arrays, setting, features, head), head)


def held_loss(xp, classify, arrays, batch, setting, task):
    """Cross-entropy + λ Σ (P − P₀)²."""
    moved = arrays["projection"] - task.extra["projection"]
    penalty = strength(setting, task) * xp.sum(moved**2)
    return mean_cross_entropy(xp, classify(batch.features), batch) + penalty


PRO_LIP = Method(
    name="prolip",
    source="arXiv 2410.05270",
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
