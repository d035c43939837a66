"""LP++ (Huang et al., CVPR 2024, arXiv 2404.02285, section 4): a linear probe blended with the
text, whose starts and step sizes come from the data.

    logits = unit(f) · (w_c + α_c t_c) + b_c                t: the zero-shot weights; no logit scale

w and b take a step of gradient descent with momentum on all images every epoch, α one every tenth.
The steps follow from bounds on the curvature of the loss,

    4 N / λ_max(FᵀF)        and        N / (4 max_c Σ_i (f_i · t_c)²)        for N images F,

and α starts at 250 times the mean cosine of an image and its own class' text, w_c at the sum of the
class' features. As in the official code, the gradients of α are summed over all epochs so far (it
never clears them: with the paper's gradient where α stands, α hardly moves and accuracy is 1 to 7
points lower), and the epoch is kept that does best on validation, where there is some.
"""

from clip_adapter.adapters.formulas import one_hot, unit
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.optimisation import FULL_BATCH, run_for

MOMENTUM = 0.9
EPOCHS_PER_BLEND_STEP = 10
FIRST_BLEND = 250


def fit(xp, task, setting):
    """w, α and b at the start."""
    rows, text = unit(xp, task.features[0]), unit(xp, task.head.weights)
    own = one_hot(xp, task.labels, len(text), rows)
    cosine = xp.sum(own * (rows @ text.T)) / len(rows)
    nothing = xp.zeros_like(text[:, 0])
    return {"weights": own.T @ rows, "alpha": FIRST_BLEND * cosine + nothing, "bias": nothing}


def logits(xp, arrays, setting, features, head):
    """unit(f) · (w_c + α_c unit(t_c)) + b_c."""
    blended = arrays["weights"] + arrays["alpha"][:, None] * unit(xp, head.weights)
    return unit(xp, features) @ blended.T + arrays["bias"]


def step_sizes(task):
    """(of w and b, of α)."""
    import jax.numpy as jnp

    rows, text = unit(jnp, task.features[0]), unit(jnp, task.head.weights)
    count, dim = rows.shape
    if task.class_weights is not None:  # the loss is Σ w ℓ / N: a row counts as w of its squares
        rows = rows * jnp.sqrt(task.class_weights[task.labels])[:, None]
    # FᵀF and FFᵀ have the same largest eigenvalue.
    gram = rows @ rows.T if count < dim else rows.T @ rows
    cosines = rows @ text.T
    return (
        4 * count / jnp.linalg.eigvalsh(gram)[-1],
        count / (4 * jnp.max(jnp.sum(cosines**2, axis=0))),
    )


def optimizer(setting, task, steps):
    """The alternating steps; they are measured once, and lie in the optimiser's state."""
    import jax
    import jax.numpy as jnp
    import optax

    def init(trained):
        probe, blend = step_sizes(task)
        sizes = {"weights": probe, "bias": probe, "alpha": blend}
        momentum = jax.tree.map(jnp.zeros_like, trained)
        return {"sizes": sizes, "momentum": momentum, "count": jnp.int32(0)}

    def update(gradient, state, trained=None):
        count = state["count"] + 1
        turn = jnp.where(count % (EPOCHS_PER_BLEND_STEP * steps) == 0, 1.0, 0.0)
        momentum = {name: g + MOMENTUM * state["momentum"][name] for name, g in gradient.items()}
        momentum["alpha"] = gradient["alpha"] + state["momentum"]["alpha"]
        steps_of = momentum | {"alpha": turn * momentum["alpha"]}
        moves = {name: -state["sizes"][name] * step for name, step in steps_of.items()}
        return moves, {**state, "momentum": momentum, "count": count}

    return optax.GradientTransformation(init, update)


LP_PLUS_PLUS = Method(
    name="lp++",
    source="arXiv 2404.02285",
    hyper=run_for(epochs=300, batch_size=FULL_BATCH, epoch="best", evaluate_every=1),
    logits=logits,
    shapes={"weights": "C D", "alpha": "C", "bias": "C"},
    fit=fit,
    trained=("weights", "alpha", "bias"),
    optimizer=optimizer,
)
