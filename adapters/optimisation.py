"""How trained methods train: the part of a table that optimisers and schedules read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.hyper import LARGEST_COUNT, Hyper
from clip_adapter.adapters.method import Array, Setting

if TYPE_CHECKING:
    from jaxtyping import Float, Int

OPTIMIZERS = ("adamw", "adam", "sgd")
WARMUPS = ("linear", "constant", "none")
FULL_BATCH = LARGEST_COUNT
"""As a batch size: all images in one step."""


def run_for(
    *,
    epochs: int = 200,
    batch_size: int = 256,
    drop_last: bool = False,
    epoch: str = "last",
    evaluate_every: int = 5,
) -> dict[str, Hyper]:
    """The rows of a table that any training reads, with a method's own defaults."""
    count: dict[str, Any] = {"low": 1, "high": LARGEST_COUNT, "static": True, "single": True}
    choice: dict[str, Any] = {"static": True, "single": True}
    return {
        "epochs": Hyper(epochs, "Passes over the support set.", **count),
        "batch_size": Hyper(batch_size, "Images per step at most.", **count),
        "drop_last": Hyper(drop_last, "Leave out an epoch's incomplete last batch.", **choice),
        "epoch": Hyper(
            epoch,
            "The epoch that is kept: the last, or the best on the validation data.",
            words=("last", "best"),
            **choice,
        ),
        "evaluate_every": Hyper(
            evaluate_every, "Epochs between evaluations.", **count, when={"epoch": ("best",)}
        ),
    }


def trained_with(
    *,
    optimizer: str = "adamw",
    learning_rate: float = 1e-3,
    learning_rates: Sequence[float] = (),
    weight_decay: float = 1e-2,
    weight_decays: Sequence[float] = (),
    warmup: str = "linear",
    adam_epsilon: float = 1e-8,
    **run: Any,
) -> dict[str, Hyper]:
    """The same and those of the optimiser and its schedule.

    learning_rates, weight_decays: those to try where the user gives none. run: of `run_for`.

    Examples:
        >>> from clip_adapter import trained_with
        >>> trained_with(epochs=20, learning_rates=(1e-4, 1e-3))["learning_rate"].tried
        (0.0001, 0.001)
    """
    choice: dict[str, Any] = {"static": True, "single": True}
    return {
        "learning_rate": Hyper(
            learning_rate, "Peak learning rate.", tuple(learning_rates), above=0, flag="lr"
        ),
        "weight_decay": Hyper(
            weight_decay,
            "Weight decay: decoupled for adamw, else an L2 penalty.",
            tuple(weight_decays),
            low=0,
        ),
        **run_for(**run),
        "optimizer": Hyper(optimizer, "Optimiser.", words=OPTIMIZERS, **choice),
        "warmup": Hyper(
            warmup,
            "Start of the schedule: a tenth of the steps, one epoch at 1e-5, or none; a cosine "
            "follows.",
            words=WARMUPS,
            **choice,
        ),
        "adam_epsilon": Hyper(
            adam_epsilon,
            "What Adam adds to its denominator.",
            above=0,
            **choice,
            when={"optimizer": ("adamw", "adam")},
        ),
    }


def steps_and_batch(support: int, setting: Setting) -> tuple[int, int]:
    """Steps of an epoch and rows of a step, for S support images.

    The batches of an epoch are of equal size. drop_last leaves out a last batch that would be
    smaller than batch_size, as PyTorch's DataLoader does on request.
    """
    most = int(setting["batch_size"])
    if setting["drop_last"] and support >= most:
        return support // most, most
    steps = -(-support // most)
    return steps, -(-support // steps)


def evaluated_epochs(setting: Setting) -> list[int]:
    """The epochs (from 1) after which validation is evaluated on the way to the best one."""
    every, last = int(setting["evaluate_every"]), int(setting["epochs"])
    return [*range(every, last, every), last]


def optimizer(setting: Setting, steps: int, rate: str = "learning_rate") -> Any:
    """AdamW; Adam or SGD with momentum 0.9 and L2 decay (PyTorch's), under the schedule.

    steps: per epoch. rate: the hyper-parameter that holds the peak learning rate.
    Returns an optax transformation.
    """
    import optax

    def scheduled(step: Int[Array, ""]) -> Float[Array, ""]:
        return scheduled_rate(setting, steps, step, rate)

    kind, decay = setting["optimizer"], setting["weight_decay"]
    if kind == "adamw":
        return optax.adamw(scheduled, weight_decay=decay, eps=setting["adam_epsilon"])
    descent = (
        optax.sgd(scheduled, momentum=0.9)
        if kind == "sgd"
        else optax.adam(scheduled, eps=setting["adam_epsilon"])
    )
    return optax.chain(optax.add_decayed_weights(decay), descent)


def scheduled_rate(
    setting: Setting, steps: int, step: Int[Array, ""], rate: str = "learning_rate"
) -> Float[Array, ""]:
    """The learning rate of a step; steps: per epoch.

    warmup `linear`: up over the first tenth of the steps (at most 100), then half a cosine to zero.
    `none`: the cosine from the first step. `constant`: Dassl's ConstantWarmupScheduler over
    CosineAnnealingLR, stepped per epoch: 1e-5 for the first epoch; the cosine begins when that
    ends, and so stops one step short of zero.
    """
    import jax.numpy as jnp

    peak, epochs = setting[rate], int(setting["epochs"])
    if setting["warmup"] == "constant":
        epoch = step // steps
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * (epoch - 1) / epochs))
        return jnp.where(epoch < 1, 1e-5, jnp.asarray(peak) * cosine)
    total = epochs * steps
    warm = min(100, total // 10) if setting["warmup"] == "linear" else 0
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * (step - warm) / max(1, total - warm)))
    return jnp.asarray(peak) * jnp.where(step < warm, (step + 1) / max(1, warm), cosine)
