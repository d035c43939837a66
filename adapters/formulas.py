"""The zero-shot CLIP classifier, and the few functions that the methods' formulas share.

`xp` is numpy, jax.numpy or torch. The three spell `@ exp log sqrt tanh where amax` and
`sum(axis=, keepdims=)` alike, and the formulas use no more than that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.method import Array, Batch, Head

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Added to squared norms. An adapter may return the zero vector (all its ReLUs closed, α = 1), whose
# direction is undefined; this keeps value and gradient finite, and is below half a unit in the last
# place of a float32 square of 1e-6, the smallest norm that a feature of the format can have.
TINY = 1e-20

# The mean length of text features: 8.9 for OpenAI's ViT-B/32 over the names of ImageNet's classes
# (from 6.3 to 13.6). Rows whose lengths are so near to 1 were normalised.
TEXT_LENGTH = 9.0
NORMALISED = 1e-3


def norm(xp: Any, x: Float[Array, "*N D"]) -> Float[Array, "*N 1"]:
    """‖x‖ along the last axis."""
    return xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) + TINY)


def unit(xp: Any, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """x / ‖x‖ along the last axis.

    Examples:
        >>> import numpy as np
        >>> from clip_adapter import unit
        >>> unit(np, np.array([[3.0, 4.0]])).tolist()
        [[0.6, 0.8]]
    """
    return x / norm(xp, x)


def relu(xp: Any, x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """max(x, 0) with gradient 0 at 0."""
    # JAX's maximum has gradient ½ there; where(x > 0, x, 0) would turn NaN into 0 and so hide that
    # a run diverged.
    return xp.where(x <= 0, 0, x)


def sigmoid(xp: Any, x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """1 / (1 + exp(−x))."""
    return (1 + xp.tanh(x / 2)) / 2


def log_softmax(xp: Any, logits: Float[Array, "N C"]) -> Float[Array, "N C"]:
    """Logarithms of the softmax along the classes."""
    shifted = logits - xp.amax(logits, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def one_hot(xp: Any, labels: Int[Array, " N"], classes: int, like: Array) -> Float[Array, "N C"]:
    """1 in the column of each row's label, else 0, in the dtype of `like`.

    Examples:
        >>> import numpy as np
        >>> from clip_adapter import one_hot
        >>> one_hot(np, np.array([2, 0]), 3, np.zeros(1)).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    return xp.asarray(labels[:, None] == xp.arange(classes)[None], dtype=like.dtype)


def sum_by_class(
    xp: Any, rows: Float[Array, "S N"], labels: Float[Array, " S"], classes: int
) -> Float[Array, "C N"]:
    """The sum of each class's rows; labels: their classes, whole numbers in any type.

    A product with one-hot labels is S · C · N multiplications for these S · N additions: at 1,000
    classes of 16 rows it took ten times as long, on a CPU.
    """
    own = xp.asarray(labels, dtype=xp.int32)
    if hasattr(rows, "index_add"):  # PyTorch
        return rows.new_zeros((classes, rows.shape[1])).index_add(0, own.long(), rows)  # for ONNX
    sums = xp.zeros((classes, rows.shape[1]), dtype=rows.dtype)
    if hasattr(sums, "at"):  # JAX
        return sums.at[own].add(rows)
    xp.add.at(sums, own, rows)
    return sums


def classifier_weights(xp: Any, text: Float[Array, "C P D"]) -> Float[Array, "C D"]:
    """Prompt-ensembled classifier weights W (CLIP, arXiv 2103.00020, section 3.1.4).

    W_c = unit(mean_p unit(t_cp)): each template's feature normalised, averaged over templates,
    normalised again.
    """
    return unit(xp, xp.mean(unit(xp, text), axis=1))


def ensemble_length(xp: Any, text: Float[Array, "C P D"]) -> Float[Array, " C"]:
    """‖mean_p unit(t_cp)‖: 1 where all prompts of a class agree, 0 where they cancel, so that there
    is no W_c."""
    return norm(xp, xp.mean(unit(xp, text), axis=1))[:, 0]


def mean_text(xp: Any, head: Head) -> Float[Array, "C D"]:
    """t_c = mean_p t_cp, un-normalised: the prototypes that TaskRes and CLAP start from.

    How far a step turns them depends on their length. Where somebody has normalised the rows, that
    is lost, and they get the usual one: at length 1 the same steps go nine times as far.
    """
    normalised = xp.amax(xp.abs(norm(xp, head.text) - 1)) < NORMALISED
    return xp.mean(head.text, axis=1) * xp.where(normalised, TEXT_LENGTH, 1.0)


def mean_of_own_class(
    xp: Any, values: Float[Array, "N C"], labels: Int[Array, " N"], missing: float
) -> Float[Array, " C"]:
    """For each class, the mean of its column over the rows that have its label; `missing` where
    there are none."""
    own = one_hot(xp, labels, values.shape[1], values)
    counts = xp.sum(own, axis=0)
    return xp.where(
        counts > 0, xp.sum(values * own, axis=0) / xp.where(counts > 0, counts, 1), missing
    )


def cosine_logits(xp: Any, features: Float[Array, "N D"], head: Head) -> Float[Array, "N C"]:
    """scale · unit(f) · unit(W)ᵀ + bias, for un-normalised features f and the head's weights W.

    Examples:
        >>> import numpy as np
        >>> from clip_adapter import cosine_logits, load_adapter
        >>> adapter = load_adapter("runs/first")
        >>> cosine_logits(np, np.ones((2, 128), np.float32), adapter.head).shape
        (2, 10)
    """
    # Dividing the (N, C) products by ‖f‖ instead of the (N, D) features spares a pass over them
    # forward and another one backward: 5 % of a training step at D = 1024 and C = 64 on a CPU.
    products = features @ unit(xp, head.weights).T
    return (head.logit_scale / norm(xp, features)) * products + head.logit_bias


def cross_entropy(
    xp: Any, logits: Float[Array, "N C"], labels: Int[Array, " N"]
) -> Float[Array, " N"]:
    """−log softmax(logits)[label] per row. Not for PyTorch, which has no take_along_axis."""
    return -xp.take_along_axis(log_softmax(xp, logits), labels[:, None], axis=1)[:, 0]


def balanced_weights(xp: Any, labels: Int[Array, " S"], classes: int) -> Float[Array, " C"]:
    """N / (K n_c) for the K classes that have some of the N images, n_c each; 1 for the others: by
    it every class counts alike in a loss, and an image 1 on average (King and Zeng, Political
    Analysis 9, 2001; scikit-learn's `class_weight="balanced"`)."""
    counts = xp.bincount(labels, minlength=classes)
    there = counts > 0
    return xp.where(there, len(labels) / (xp.sum(there) * xp.maximum(counts, 1)), 1.0)


def mean_cross_entropy(xp: Any, logits: Float[Array, "B C"], batch: Batch) -> Float[Array, ""]:
    """Mean cross-entropy over the rows of a batch, as much as they count."""
    return xp.sum(cross_entropy(xp, logits, batch.labels) * batch.counts) / xp.sum(batch.counts)
