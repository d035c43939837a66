"""CoOp (Zhou et al., IJCV 2022, arXiv 2109.01134): context vectors in place of a prompt's words.

    logits = s · unit(f) · unit(w(v))ᵀ + b        w(v)_c = tower([start] v₁ … v_M NAME_c . [end])

v is trained with cross-entropy through the frozen text tower (coop_context.py); the image features
come from the cache. What is saved are v and the classifier weights it leads to, so that predicting
needs no tower.
"""

from typing import Any

from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.optimisation import trained_with

GENERIC, BY_CLASS = "context", "contexts"


def logits(xp, arrays, setting, features, head):
    """The zero-shot formula with other weights."""
    return cosine_logits(xp, features, head._replace(weights=arrays["weights"]))


def finish(arrays, setting, task):
    """The context and what the tower makes of it."""
    from clip_adapter.adapters.methods.networks.coop_context import compiled_weights

    context = arrays[BY_CLASS if setting["class_specific"] else GENERIC]
    weights = compiled_weights(context, setting["position"], task.extra["tower"])
    return {**arrays, "weights": weights}


def prepare(config, arrays):
    """What of a text tower CoOp needs, for all classes of its file."""
    from clip_adapter.adapters.methods.networks import coop_context

    return coop_context.prepare(config, arrays)


def for_classes(arrays, setting, task, head):
    """The weights of other classes, whose names the task's tower has; a context of each class's own
    says nothing of others."""
    return None if setting["class_specific"] else finish(arrays, setting, task)


_SELECTS: dict[str, Any] = {"static": True, "single": True}

COOP = Method(
    name="coop",
    source="arXiv 2109.01134",
    hyper={
        # The official code's default; a phrase is as long as its words have tokens.
        "initialisation": Hyper(
            "random",
            "Where the context starts: N(0, 0.02²), or the embeddings of these words.",
            words=("random", "a photo of a", "this is a photo of a", "a picture of a"),
            **_SELECTS,
        ),
        "context_length": Hyper(
            16,
            "Context vectors.",
            low=1,
            high=1024,
            when={"initialisation": ("random",)},
            **_SELECTS,
        ),
        "class_specific": Hyper(False, "Give each class a context of its own.", **_SELECTS),
        "position": Hyper(
            "end",
            "Where the class name stands among the context.",
            words=("end", "middle", "front"),
            **_SELECTS,
        ),
        # CoOp's rn50.yaml; 50 epochs are its ones for one shot and for ImageNet, 200 for 8 and 16.
        **trained_with(
            optimizer="sgd",
            learning_rate=2e-3,
            weight_decay=5e-4,
            epochs=50,
            batch_size=32,
            warmup="constant",
            drop_last=True,
        ),
    },
    logits=logits,
    shapes={GENERIC: "M E", BY_CLASS: "C M E", "weights": "C D"},
    network="clip_adapter.adapters.methods.networks.coop_context:LearnedContext",
    finish=finish,
    needs=("tower",),
    prepare=prepare,
    uses_views=True,
    for_classes=for_classes,
)
