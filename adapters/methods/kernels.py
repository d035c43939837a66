"""What closed forms on a support set share: its rows, ridge regression through one
eigendecomposition for every λ, and what either says of images that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.formulas import one_hot, unit
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Array, Arrays, Head, Rounds, Setting, Task

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SECOND = Hyper(
    0.0,
    "Weight of the second encoder's features; 0 does without that encoder.",
    (0.0, 0.1, 0.3, 1.0, 3.0, 10.0),
    low=0,
    needs="second",
    least_shots=4,
)
"""The row of methods that take features of a second encoder. Fewer images than these cannot tell
what it is worth."""


def support_rows(xp: Any, task: Task) -> tuple[Float[Array, "N D"], Int[Array, " N"]]:
    """Unit support features, all views beside each other (the first views first), and labels."""
    views, support, dim = task.features.shape
    rows, _ = both_parts(xp, task.features.reshape(views * support, dim), task.head, {})
    return rows, xp.concatenate([task.labels] * views)


def second_rows(xp: Any, task: Task) -> Float[Array, "N E"] | None:
    """The same rows by the second encoder, where there is one."""
    rows = task.features.reshape(-1, task.features.shape[2])
    return both_parts(xp, rows, task.head, task.extra)[1]


def both_parts(
    xp: Any, features: Float[Array, "*N D+E"], head: Head, fitted: Arrays
) -> tuple[Float[Array, "*N D"], Float[Array, "*N E"] | None]:
    """unit(f) and unit(f₂ − m) of rows [f, f₂], m the `centre` of what is fitted; None for the
    second where nothing has one."""
    width = head.weights.shape[1]
    first = unit(xp, features[..., :width])
    if "centre" not in fitted:
        return first, None
    return first, unit(xp, features[..., width:] - fitted["centre"])


def finish(arrays: Arrays, setting: Setting, task: Task) -> Arrays:
    """What was fitted, without what is of a second encoder where that has no weight: such an
    adapter needs one encoder."""
    if setting.get("second"):
        return arrays
    return {n: a for n, a in arrays.items() if n != "centre" and not n.startswith("second")}


def residuals(
    xp: Any, task: Task, prior: Float[Array, ""] | float = 1
) -> tuple[Float[Array, "N D"], Float[Array, "N C"], Float[Array, "N C"]]:
    """(support rows X, what the prior says of them, Y less that): c X Tᵀ for unit weights T and
    one-hot labels Y."""
    rows, labels = support_rows(xp, task)
    known = prior * (rows @ unit(xp, task.head.weights).T)
    return rows, known, one_hot(xp, labels, len(task.head.weights), rows) - known


def decomposed(
    xp: Any, gram: Float[Array, "F F"]
) -> tuple[Float[Array, " F"], Float[Array, "F F"]]:
    """Eigenvalues and eigenvectors of a matrix that has no negative ones."""
    values, vectors = one_by_one(xp, "eigh")(gram)
    # Those that are zero but for rounding may be negative.
    return xp.where(values > 0, values, 0), vectors


def left_out_fit(
    xp: Any,
    values: Float[Array, " F"],
    vectors: Float[Array, "F F"],
    strength: Float[Array, ""],
    residual: Float[Array, "N C"],
    rounds: Rounds,
    mapped: Float[Array, "N F"] | None = None,
) -> Float[Array, "S C"]:
    """What ridge regression of the residuals R says of each image where its round was not fitted,
    of view 0.

    values, vectors: of the kernel matrix of the rows; or of ΦᵀΦ, with Φ = `mapped`. With the hat
    matrix H of all rows, a round B is left with e_B = ((I − H)_BB)⁻¹ ((I − H) R)_B by a fit without
    it, which so gives R − e.
    """
    # I − H = rest·I + basis diag(weights) basisᵀ
    if mapped is None:
        rest, basis, weights = 0, vectors, strength / (values + strength)
    else:
        rest, basis, weights = 1, mapped @ vectors, -1 / (values + strength)
    images, members = len(rounds.of_image), rounds.members
    views = range(len(residual) // images)
    rows = xp.concatenate([members + view * images for view in views], axis=1)
    counts = xp.concatenate([members >= 0 for _ in views], axis=1)
    left = rest * residual + basis @ (weights[:, None] * (basis.T @ residual))
    own = basis[rows]
    identity = xp.eye(rows.shape[1], dtype=residual.dtype)
    blocks = rest * identity + (own * weights) @ xp.swapaxes(own, 1, 2)
    # Rows that only fill a round up stand for themselves.
    blocks = xp.where(counts[:, :, None] & counts[:, None], blocks, identity)
    wanted = xp.where(counts[:, :, None], left[rows], 0)
    solve = one_by_one(xp, "solve")
    errors = each_round(xp, lambda number: solve(blocks[number], wanted[number]), rounds)
    return residual[:images] - errors[rounds.of_image, rounds.place]


def one_by_one(xp: Any, name: str) -> Callable[..., Any]:
    """A function of `xp.linalg`, for one matrix, that takes them one after the other where JAX maps
    it over several.

    Of several at once each is a piece of work for XLA's threads, as many as there are cores, and
    the thread that asked waits until all are done: where as many ask as there are threads, none is
    left to do any, and the program waits for ever (seen on 2 cores with jaxlib 0.10.2).
    """
    function = getattr(xp.linalg, name)
    if xp.__name__ == "numpy":
        return function
    from jax.custom_batching import sequential_vmap

    return sequential_vmap(lambda *arrays: function(*arrays))  # without what it takes by default


def each_round(xp: Any, function: Callable[[Any], Array], rounds: Rounds) -> Float[Array, "R ..."]:
    """`function` of the number of each round, one after the other."""
    count = len(rounds.members)
    if xp.__name__ == "numpy":
        return xp.stack([function(number) for number in range(count)])
    import jax

    return jax.lax.map(function, xp.arange(count))


def by_refits(
    xp: Any,
    task: Task,
    rounds: Rounds,
    classify: Callable[[Float[Array, "N 1"], Int[Array, " B"]], Float[Array, "B C"]],
) -> Float[Array, "S C"]:
    """What a fit without each image's round says of it, of view 0.

    classify(kept, images) → logits of these by a fit of the support rows where `kept` is 1 and not
    0.
    """
    of_row = xp.concatenate([rounds.of_image] * len(task.features))[:, None]

    def of_round(number: Any) -> Array:
        kept = xp.asarray(of_row != number, dtype=task.features.dtype)
        return classify(kept, rounds.members[number])

    return each_round(xp, of_round, rounds)[rounds.of_image, rounds.place]


def geometric(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` values from low to high in equal ratios."""
    return tuple(low * (high / low) ** (step / (count - 1)) for step in range(count))
