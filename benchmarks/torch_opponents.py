"""PyTorch doing the same work: strong ways to train CLIP-Adapters on cached features.

All keep the features in memory and index them by batch, use AdamW, a warm-up and cosine schedule,
and evaluate the validation set once, after the last epoch, as ours does by default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from synthetic import LOGIT_SCALE, SyntheticTask
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy, normalize


@dataclass(frozen=True)
class Setting:
    alpha: float
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Work:
    """epochs and steps of a run; the support set divides evenly into batches."""

    epochs: int
    batch_size: int


class Tensors:
    """The task on a device. On a GPU matrix products are in TF32, as ours are there."""

    def __init__(self, task: SyntheticTask, device: str) -> None:
        torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
        self.features = torch.tensor(task.features, device=device)
        self.labels = torch.tensor(task.labels, device=device).long()
        self.validation_features = torch.tensor(task.validation_features, device=device)
        self.validation_labels = torch.tensor(task.validation_labels, device=device).long()
        self.weights = torch.tensor(task.weights, device=device)


def adapter(dim: int, reduction: int = 4) -> nn.Module:
    hidden = dim // reduction
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False),
        nn.ReLU(),
        nn.Linear(hidden, dim, bias=False),
        nn.ReLU(),
    )


def blended_logits(
    output: torch.Tensor, features: torch.Tensor, weights: torch.Tensor, alpha: float
) -> torch.Tensor:
    blended = alpha * output + (1 - alpha) * features
    return LOGIT_SCALE * normalize(blended, dim=-1) @ weights.T


def rate_factor(step: int, total: int) -> float:
    warm = min(100, total // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def train_eager(tensors: Tensors, setting: Setting, work: Work, *, compiled: bool = False) -> float:
    """One run; returns its validation accuracy. Fused AdamW; `compiled`: torch.compile."""
    torch.manual_seed(0)
    model = adapter(tensors.features.shape[1]).to(tensors.features.device)
    loss_of = _compiled_loss() if compiled else _loss
    optimizer = torch.optim.AdamW(
        model.parameters(), setting.learning_rate, weight_decay=setting.weight_decay, fused=True
    )
    count = len(tensors.labels)
    total = work.epochs * (count // work.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, total))
    for _ in range(work.epochs):
        order = torch.randperm(count, device=tensors.features.device)
        for rows in order.split(work.batch_size):
            loss = loss_of(
                model,
                tensors.features[rows],
                tensors.labels[rows],
                tensors.weights,
                setting.alpha,
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        features = tensors.validation_features
        logits = blended_logits(model(features), features, tensors.weights, setting.alpha)
        cross_entropy(logits, tensors.validation_labels).item()
        return (logits.argmax(1) == tensors.validation_labels).float().mean().item()


def _loss(
    model: nn.Module,
    features: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    return cross_entropy(blended_logits(model(features), features, weights, alpha), labels)


_COMPILED: list[Callable[..., torch.Tensor]] = []


def _compiled_loss() -> Callable[..., torch.Tensor]:
    """One compiled function for all settings: alpha goes in as a tensor, so nothing recompiles."""
    if not _COMPILED:
        inner = torch.compile(_loss)

        def loss(model, features, labels, weights, alpha):  # type: ignore[no-untyped-def]
            return inner(model, features, labels, weights, torch.tensor(alpha))

        _COMPILED.append(loss)
    return _COMPILED[0]


def train_ensemble(tensors: Tensors, settings: list[Setting], work: Work) -> list[float]:
    """All settings at once with torch.func: stacked parameters, vmap over grad, AdamW by hand."""
    torch.manual_seed(0)
    device = tensors.features.device
    model = adapter(tensors.features.shape[1]).to(device)
    stacked, _ = stack_module_state([model] * len(settings))
    parameters = {name: value.detach().clone() for name, value in stacked.items()}
    first = {name: torch.zeros_like(value) for name, value in parameters.items()}
    second = {name: torch.zeros_like(value) for name, value in parameters.items()}
    columns = [[getattr(s, name) for s in settings] for name in Setting.__dataclass_fields__]
    alpha, rate, decay = (torch.tensor(column, device=device) for column in columns)

    def output(parameters, features):  # type: ignore[no-untyped-def]
        return functional_call(model, parameters, (features,))

    def loss(parameters, alpha, features, labels):  # type: ignore[no-untyped-def]
        logits = blended_logits(output(parameters, features), features, tensors.weights, alpha)
        return cross_entropy(logits, labels)

    gradients_of = vmap(grad(loss), in_dims=(0, 0, None, None))
    count = len(tensors.labels)
    total = work.epochs * (count // work.batch_size)
    step = 0
    for _ in range(work.epochs):
        order = torch.randperm(count, device=device)
        for rows in order.split(work.batch_size):
            with torch.no_grad():
                gradients = gradients_of(
                    parameters, alpha, tensors.features[rows], tensors.labels[rows]
                )
                now = rate * rate_factor(step, total)
                step += 1
                for name, value in parameters.items():
                    shape = (-1, *([1] * (value.dim() - 1)))
                    first[name].lerp_(gradients[name], 0.1)
                    second[name].mul_(0.999).addcmul_(gradients[name], gradients[name], value=0.001)
                    deviation = (second[name] / (1 - 0.999**step)).sqrt_().add_(1e-8)
                    value.mul_(1 - (now * decay).view(shape))
                    value.sub_((now / (1 - 0.9**step)).view(shape) * first[name].div(deviation))
    with torch.inference_mode():
        features = tensors.validation_features
        outputs = vmap(output, in_dims=(0, None))(parameters, features)
        logits = blended_logits(outputs, features, tensors.weights, alpha.view(-1, 1, 1))
        right = logits.argmax(2) == tensors.validation_labels
        return right.float().mean(1).tolist()
