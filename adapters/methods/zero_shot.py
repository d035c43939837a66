"""Zero-shot CLIP (Radford et al., arXiv 2103.00020): the classifier weights as they are."""

from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.method import Method


def logits(xp, arrays, setting, features, head):
    """scale · unit(f) · unit(W)ᵀ + bias."""
    return cosine_logits(xp, features, head)


def left_out(xp, task, setting, rounds):
    return cosine_logits(xp, task.features[0], task.head)


ZERO_SHOT = Method(
    name="zero-shot",
    source="arXiv 2103.00020",
    hyper={},
    logits=logits,
    left_out=left_out,
    unseen_classes=True,
)
