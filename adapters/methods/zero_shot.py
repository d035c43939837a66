"""Zero-shot CLIP (Radford et al., arXiv 2103.00020): the classifier weights as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.method import Array, Arrays, Head, Method, Setting

if TYPE_CHECKING:
    from jaxtyping import Float


def logits(
    xp: Any, arrays: Arrays, setting: Setting, features: Float[Array, "N D"], head: Head
) -> Float[Array, "N C"]:
    """scale · unit(f) · unit(W)ᵀ + bias."""
    return cosine_logits(xp, features, head)


ZERO_SHOT = Method(
    name="zero-shot",
    reference="arXiv 2103.00020",
    hyper={},
    logits=logits,
    unseen_classes=True,
)
