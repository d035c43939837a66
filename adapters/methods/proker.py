"""ProKeR (Bendou et al., arXiv 2501.11175): kernel ridge regression on what zero-shot CLIP leaves.

    k(x, y) = exp(−β (1 − x·y))         A = (K_SS / λ + I)⁻¹ (Y − S Wᵀ)
    logits(x) = x·Wᵀ + k(x, S) A

in cosines: x, the support rows S (all views beside each other) and W are unit vectors, Y is
one-hot. As in the official code, neither the logit scale nor its bias takes part, and A is λ times
the ridge solution (K_SS + λ I)⁻¹ (Y − S Wᵀ): a small λ fits closely and changes little. The
logits' softmax is nearly even, and says nothing about confidence.

With a second encoder, whose unit features x₂ are counted from the mean of the training images', the
kernel is k(x, S) + ρ k(x₂, S₂), at the same β.

One eigendecomposition of K_SS serves every λ. Where the support set is too large for that the
kernel is approximated by orthogonal random Fourier features (Yu et al., arXiv 1610.09072).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.formulas import unit
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Array, Arrays, Method, Setting, Task
from clip_adapter.adapters.methods.kernels import (
    SECOND,
    both_parts,
    decomposed,
    geometric,
    left_out_fit,
    residuals,
    second_rows,
)
from clip_adapter.adapters.methods.kernels import finish as without_unused

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MOST_ROWS = 4096
"""Support rows, views included, up to which the kernel is exact."""
RANDOM_FEATURES = 4096
RATE = 2e10
"""Validation images × support rows × classes for which a point is scored in a CPU second."""
TRANSFERRED = {
    1: {"beta": 3.0, "ridge": 0.05},
    2: {"beta": 2.6, "ridge": 0.05},
    4: {"beta": 1.5, "ridge": 0.05},
    8: {"beta": 1.66, "ridge": 0.07},
    16: {"beta": 1.7, "ridge": 0.1},
}
"""By shots: what the authors found on ImageNet and use where there is no validation data."""


def fit(xp, task, setting):
    """points (S, D) and phases (F,) of the kernel's features, and β; A = vectors · duals. Of a
    second encoder, second_points (S, E) and its centre (E,).

    The features of the exact kernel are the support rows', without phases. Only the duals depend on
    λ: in a search, k(x, S) · vectors (S, S) is computed once for all of them.
    """
    beta, ridge = (transferred(task, name, setting[name]) for name in ("beta", "ridge"))
    rows, _, residual = residuals(xp, task)
    kernel, mapped = kernel_of(xp, task, beta, rows, setting)
    is_exact = not kernel["phases"].shape[0]
    values, vectors = decomposed(xp, mapped if is_exact else mapped.T @ mapped)
    right = residual if is_exact else mapped.T @ residual
    shrunk = 1 / (values / ridge + 1)
    return {
        **kernel,
        "vectors": vectors,
        "duals": shrunk[:, None] * (vectors.T @ right),
    }


def kernel_of(
    xp: Any, task: Task, beta: Float[Array, ""], rows: Float[Array, "N D"], setting: Setting
) -> tuple[dict[str, Array], Array]:
    """What the kernel is made of, and the rows' features by it: (N, N) where it is exact."""
    second = second_rows(xp, task)
    points, phases = [rows, second][: 1 + (second is not None)], xp.zeros_like(rows[0, :0])
    sharpness = xp.asarray(beta, dtype=rows.dtype)
    if len(rows) > MOST_ROWS:
        drawn = [
            random_frequencies(xp, task.seed + own, part.shape[1], RANDOM_FEATURES // len(points))
            for own, part in enumerate(points)
        ]
        points, phases = [own * xp.sqrt(sharpness) for own, _ in drawn], drawn[0][1]
    kernel = {"points": points[0], "phases": phases, "beta": sharpness}
    if second is not None:
        kernel |= {"second_points": points[1], "centre": task.extra["centre"]}
    return kernel, mapped_rows(xp, kernel, setting, rows, second)


def mapped_rows(
    xp: Any,
    kernel: Arrays,
    setting: Setting,
    rows: Float[Array, "N D"],
    second: Float[Array, "N E"] | None,
) -> Float[Array, "N S"]:
    """The features of rows by both kernels, as of a single one."""
    phases, beta = kernel["phases"], kernel["beta"]
    first = kernel_features(xp, kernel["points"], phases, beta, rows)
    if second is None:
        return first
    other = kernel_features(xp, kernel["second_points"], phases, beta, second)
    weight = xp.asarray(setting["second"], dtype=other.dtype)
    if phases.shape[0]:
        return xp.concatenate([first, xp.sqrt(weight) * other], axis=1)
    return first + weight * other


def left_out(xp, task, setting, rounds):
    beta, ridge = (transferred(task, name, setting[name]) for name in ("beta", "ridge"))
    rows, known, residual = residuals(xp, task)
    kernel, mapped = kernel_of(xp, task, beta, rows, setting)
    approximate = mapped if kernel["phases"].shape[0] else None
    gram = mapped if approximate is None else mapped.T @ mapped
    values, vectors = decomposed(xp, gram)
    fitted = left_out_fit(xp, values, vectors, ridge, residual, rounds, approximate)
    return known[: len(fitted)] + ridge * fitted


def finish(arrays, setting, task):
    """The same with A as duals (S, C), without the vectors."""
    duals = arrays["vectors"] @ arrays["duals"]
    saved = {name: arrays[name] for name in arrays if name != "vectors"} | {"duals": duals}
    return without_unused(saved, setting, task)


def transferred(task: Task, name: str, value: Any) -> Any:
    """The value, or in place of the word the authors' for the nearest number of shots."""
    if not isinstance(value, str):
        return value
    shots = max(1.0, task.features.shape[1] / len(task.head.weights))
    return TRANSFERRED[min(TRANSFERRED, key=lambda known: abs(math.log(known / shots)))][name]


def random_frequencies(
    xp: Any, seed: Int[Array, ""], dim: int, count: int
) -> tuple[Float[Array, "F D"], Float[Array, " F"]]:
    """Frequencies (F, D) for β = 1 and phases (F,): each frequency's cosine and sine.

    Rows of D × D blocks are orthogonal and as long as Gaussian vectors.
    """
    import jax
    import jax.numpy as jnp

    pairs = count // 2
    blocks = -(-pairs // dim)
    directions, lengths = jax.random.split(jax.random.key(seed))
    orthogonal, _ = jnp.linalg.qr(jax.random.normal(directions, (blocks, dim, dim)))
    long = jnp.linalg.norm(jax.random.normal(lengths, (blocks, dim, dim)), axis=-1, keepdims=True)
    frequencies = (long * orthogonal).reshape(-1, dim)[:pairs]
    phases = jnp.repeat(jnp.array([0, -jnp.pi / 2], jnp.float32), pairs)
    return xp.asarray(jnp.concatenate([frequencies] * 2)), xp.asarray(phases)


def kernel_features(
    xp: Any,
    points: Float[Array, "S D"],
    phases: Float[Array, " F"],
    beta: Float[Array, ""],
    rows: Float[Array, "N D"],
) -> Float[Array, "N S"]:
    """k(x, S); or, where there are phases, random features whose products are near k(x, y)."""
    products = rows @ points.T
    if phases.shape[0]:
        # cos and sin of √β ω·x: of unit vectors, exp(−β (1 − x·y)) = exp(−½ ‖√β x − √β y‖²).
        return xp.cos(products + phases) * (2 / phases.shape[0]) ** 0.5
    return xp.exp(-beta * (1 - products))


def logits(xp, arrays, setting, features, head):
    """unit(f) · unit(W)ᵀ + k(unit(f), S) A."""
    rows, second = both_parts(xp, features, head, arrays)
    kernel = mapped_rows(xp, arrays, setting, rows, second)
    if "vectors" in arrays:
        kernel = kernel @ arrays["vectors"]
    return rows @ unit(xp, head.weights).T + kernel @ arrays["duals"]


def note(task):
    """A sentence where the kernel is approximated, and one where a search takes long."""
    rows = task.features.shape[0] * task.features.shape[1]
    found = []
    if rows > MOST_ROWS:
        found.append(
            f"ProKeR: {rows:,} support rows are more than {MOST_ROWS:,}, so {RANDOM_FEATURES:,} "
            "random Fourier features approximate its kernel."
        )
    work = len(task.validation_labels) * min(rows, RANDOM_FEATURES) * len(task.head.weights)
    searched = [hyper for hyper in PROKER.hyper.values() if not hyper.needs or task.extra]
    points = math.prod(len(hyper.tried) for hyper in searched)
    if (minutes := points * work / RATE / 60) > 1:
        found.append(
            f"ProKeR: searching its whole grid of {points:,} points takes about {minutes:.0f} CPU "
            "minutes on this many classes and images; with fewer values of beta as much less."
        )
    return " ".join(found)


WORDS = ("transferred",)
PROKER = Method(
    name="proker",
    source="arXiv 2501.11175",
    hyper={
        # The costlier ones first: one eigendecomposition for each β and ρ.
        "beta": Hyper(
            "transferred",
            "Sharpness of the kernel; `transferred` takes the authors' for the number of shots.",
            geometric(0.1, 20, 20),
            low=0,
            words=WORDS,
        ),
        "second": SECOND,
        "ridge": Hyper(
            "transferred",
            "λ, how closely the support set is followed; `transferred` as for beta.",
            geometric(1e-3, 10, 100),
            above=0,
            words=WORDS,
            flag="lambda",
        ),
    },
    logits=logits,
    shapes={
        "points": "S D",
        "phases": "F",
        "duals": "A C",  # of approximations of two kernels twice as many
        "beta": "",
        "second_points": "S E",
        "centre": "E",
    },
    fit=fit,
    finish=finish,
    left_out=left_out,
    note=note,
    uses_views=True,
)
