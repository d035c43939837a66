"""TaskRes (Yu et al., CVPR 2023, arXiv 2211.10277, section 3.2): a residual on the classifier.

    logits = scale · unit(f) · unit(t + α X)ᵀ + bias        X: C × D, from zero

t are the mean text features of each class, un-normalised: how far a step turns the classifier
depends on their length, and so is the encoder's. The "enhanced base", whose text projection was
trained before on the same data, is not part of this.
"""

from clip_adapter.adapters.formulas import cosine_logits, mean_text
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.optimisation import trained_with


def fit(xp, task, setting):
    """t and X at the start."""
    text = mean_text(xp, task.head)
    return {"text": text, "residual": xp.zeros_like(text)}


def logits(xp, arrays, setting, features, head):
    """scale · unit(f) · unit(t + α X)ᵀ + bias."""
    weights = arrays["text"] + setting["alpha"] * arrays["residual"]
    return cosine_logits(xp, features, head._replace(weights=weights))


TASK_RES = Method(
    name="taskres",
    source="arXiv 2211.10277",
    hyper={
        # The paper takes 1 for Oxford Flowers and 0.5 for its ten other data sets.
        "alpha": Hyper(0.5, "Weight of the residual.", (0.5, 1.0), low=0),
        # The official code: 100 epochs up to four shots, 200 from eight; Dassl's weight decay.
        **trained_with(
            optimizer="adam",
            learning_rate=2e-3,
            weight_decay=5e-4,
            epochs=200,
            warmup="constant",
            drop_last=True,
        ),
    },
    logits=logits,
    shapes={"text": "C D", "residual": "C D"},
    fit=fit,
    trained=("residual",),
    needs=("text",),
    uses_views=True,
)
