"""Methods of somebody else: what stands in a module of a user's own."""

from clip_adapter.adapters import optimisation
from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Method


def logits(xp, arrays, setting, features, head):  # type: ignore[no-untyped-def]
    """The zero-shot classifier with each class weighted."""
    return cosine_logits(xp, features, head) * (1 + setting["alpha"] * arrays["weight"])


def fit(xp, task, setting):  # type: ignore[no-untyped-def]
    count = xp.sum(task.labels[:, None] == xp.arange(len(task.head.weights)), axis=0)
    return {"weight": count / len(task.labels)}


WEIGHTED = Method(
    name="weighted",
    source="made up",
    hyper={"alpha": Hyper(3.0, "Weight of a class's share.", (1.0, 3.0), low=0, high=50)},
    logits=logits,
    shapes={"weight": "C"},
    fit=fit,
)
"""Its alpha is another one than CLIP-Adapter's."""

WORSE = Method(
    name="worse",
    source="made up",
    hyper={"sign": Hyper(-1.0, "Turns the classifier around.", low=-1, high=1)},
    logits=lambda xp, arrays, setting, features, head: (
        setting["sign"] * cosine_logits(xp, features, head)
    ),
)
"""Validation never prefers it."""

GROWING = Method(
    name="growing",
    source="made up",
    hyper=optimisation.trained_with(optimizer="adam", weight_decay=0.0),
    # Better the larger the weight is, and no number where it is 0.5 or more.
    logits=lambda xp, arrays, setting, features, head: (
        arrays["weight"] * cosine_logits(xp, features, head)
        + xp.arange(len(head.weights))
        + 0 * xp.log(0.5 - arrays["weight"])
    ),
    shapes={"weight": ""},
    fit=lambda xp, task, setting: {"weight": xp.zeros(())},
    trained=("weight",),
    loss=lambda xp, classify, arrays, batch, setting, task: -arrays["weight"],
)
"""A weight that grows by about the learning rate at each step."""
