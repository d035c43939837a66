"""CLAP (Silva-Rodríguez et al., CVPR 2024, arXiv 2312.12730, section 4): a linear probe that is
held near the text features, and ZS-LP, the same without holding.

    logits = scale · unit(f) · unit(W)ᵀ + bias              W: C × D, from t
    loss   = cross-entropy + mean_c λ_c ‖w_c − t_c‖²

t are the mean text features of each class, un-normalised; λ_c is the mean zero-shot probability of
class c on its own support images, and 1 for a class that has none: nothing speaks against its text.
"""

from dataclasses import replace

from clip_adapter.adapters.formulas import (
    cosine_logits,
    log_softmax,
    mean_cross_entropy,
    mean_of_own_class,
    mean_text,
)
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.optimisation import trained_with


def text_prototypes(xp, task, setting):
    """W at the start."""
    return {"weights": mean_text(xp, task.head)}


def held_prototypes(xp, task, setting):
    """The same, with what the loss holds them by."""
    text = mean_text(xp, task.head)
    zero_shot = cosine_logits(xp, task.features[0], task.head._replace(weights=text))
    trust = mean_of_own_class(xp, xp.exp(log_softmax(xp, zero_shot)), task.labels, missing=1.0)
    return {"weights": text, "text": text, "trust": trust}


def logits(xp, arrays, setting, features, head):
    """scale · unit(f) · unit(W)ᵀ + bias."""
    return cosine_logits(xp, features, head._replace(weights=arrays["weights"]))


def held_loss(xp, classify, arrays, batch, setting, task):
    """Cross-entropy + mean_c λ_c ‖w_c − t_c‖²."""
    distances = xp.sum((arrays["weights"] - arrays["text"]) ** 2, axis=-1)
    held = xp.mean(arrays["trust"] * distances)
    return mean_cross_entropy(xp, classify(batch.features), batch) + held


ZS_LP = Method(
    name="zs-lp",
    source="arXiv 2312.12730",
    hyper=trained_with(
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=0.0,
        epochs=300,
        warmup="constant",
        drop_last=True,
    ),
    logits=logits,
    shapes={"weights": "C D"},
    fit=text_prototypes,
    trained=("weights",),
    needs=("text",),
    uses_views=True,
)
CLAP = replace(ZS_LP, name="clap", fit=held_prototypes, loss=held_loss)
