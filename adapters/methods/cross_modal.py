"""Cross-modal linear probe (Lin et al., CVPR 2023, arXiv 2301.06267): prompts are samples.

    logits = scale · unit(f) · Wᵀ + bias                    W: C × D, from the zero-shot weights
    loss   = cross-entropy of a batch that is half images and half texts

The text feature of every prompt is one more sample of its class, and each step draws at random from
all C × P that there are. W is not normalised.
"""

from clip_adapter.adapters.formulas import mean_cross_entropy, unit
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.optimisation import trained_with


def fit(xp, task, setting):
    """W at the start."""
    return {"weights": task.head.weights}


def logits(xp, arrays, setting, features, head):
    """scale · unit(f) · Wᵀ + bias."""
    return head.logit_scale * unit(xp, features) @ arrays["weights"].T + head.logit_bias


def drawn_texts(task, batch):
    """As many texts as the batch has rows, of which as many count, each class alike."""
    import jax

    classes, prompts, dim = task.head.text.shape
    drawn = jax.random.randint(batch.key, batch.labels.shape, 0, classes * prompts)
    texts = task.head.text.reshape(-1, dim)[drawn]
    return batch._replace(features=texts, labels=drawn // prompts, counts=batch.counts > 0)


def half_and_half(xp, classify, arrays, batch, setting, task):
    """Mean cross-entropy over the images and the texts of a step."""
    halves = (batch, drawn_texts(task, batch))
    return sum(mean_cross_entropy(xp, classify(half.features), half) for half in halves) / 2


CROSS_MODAL = Method(
    name="cross-modal",
    source="arXiv 2301.06267",
    # The official code's grid, at its larger batch: 16 images and 16 texts. It runs 12,800 steps
    # whatever the number of images, and keeps the best of them on validation data.
    hyper=trained_with(
        learning_rate=1e-3,
        learning_rates=(1e-3, 1e-4),
        weight_decay=1e-2,
        weight_decays=(0.0, 1e-2, 1e-4),
        epochs=200,
        batch_size=16,
    ),
    logits=logits,
    shapes={"weights": "C D"},
    fit=fit,
    trained=("weights",),
    loss=half_and_half,
    needs=("text",),
    uses_views=True,
)
