"""The trained methods as their papers' code trains them: eager PyTorch loops on cached features.

Each does one whole fit with the method's own hyper-parameters (the defaults of its record), and
returns its accuracy on the validation images. Features lie in memory and are indexed by batch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, normalize


@dataclass(frozen=True)
class Support:
    """features (S, D), labels (S,), text (C, P, D), un-normalised; weights (C, D), unit rows;
    validation features and labels."""

    features: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    text: torch.Tensor
    validation_features: torch.Tensor
    validation_labels: torch.Tensor
    logit_scale: float


Logits = Callable[[torch.Tensor], torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def accuracy(support: Support, logits: Logits) -> float:
    with torch.inference_mode():
        right = logits(support.validation_features).argmax(1) == support.validation_labels
    return right.float().mean().item()


def cosine_logits(support: Support, features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return support.logit_scale * normalize(features) @ normalize(weights).T


def batches(support: Support, size: int, *, drop_last: bool = False) -> Iterable[torch.Tensor]:
    cut = torch.randperm(len(support.labels)).split(size)
    return cut[:-1] if drop_last and len(cut) > 1 and len(cut[-1]) < size else cut


def train(
    support: Support,
    optimizer: torch.optim.Optimizer,
    loss_of: Loss,
    rate: Callable[[int, int], float],
    *,
    epochs: int,
    batch_size: int,
    drop_last: bool = False,
) -> None:
    """rate(epoch, step) → the learning rate; steps are counted over all epochs."""
    step = 0
    for epoch in range(epochs):
        for rows in batches(support, batch_size, drop_last=drop_last):
            optimizer.param_groups[0]["lr"] = rate(epoch, step)
            loss = loss_of(support.features[rows], support.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def constant_then_cosine(peak: float, epochs: int) -> Callable[[int, int], float]:
    def rate(epoch: int, step: int) -> float:
        return peak * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2 if epoch else 1e-5

    return rate


def taskres(support: Support) -> float:
    base = support.text.mean(1)
    residual = torch.nn.Parameter(torch.zeros_like(base))

    def logits(features: torch.Tensor) -> torch.Tensor:
        return cosine_logits(support, features, base + 0.5 * residual)

    train(
        support,
        torch.optim.Adam([residual], weight_decay=5e-4),
        lambda features, labels: cross_entropy(logits(features), labels),
        constant_then_cosine(2e-3, 200),
        epochs=200,
        batch_size=256,
        drop_last=True,
    )
    return accuracy(support, logits)


def zs_lp(support: Support, *, held: bool = False) -> float:
    base = support.text.mean(1)
    weights = torch.nn.Parameter(base.clone())

    def logits(features: torch.Tensor) -> torch.Tensor:
        return cosine_logits(support, features, weights)

    with torch.no_grad():
        own = torch.nn.functional.one_hot(support.labels, len(base)).float()
        trust = (logits(support.features).softmax(1) * own).sum(0) / own.sum(0)

    def loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = cross_entropy(logits(features), labels)
        return value + (trust * (weights - base).pow(2).sum(1)).mean() if held else value

    train(
        support,
        torch.optim.SGD([weights], momentum=0.9),
        loss,
        constant_then_cosine(0.1, 300),
        epochs=300,
        batch_size=256,
        drop_last=True,
    )
    return accuracy(support, logits)


def clap(support: Support) -> float:
    return zs_lp(support, held=True)


def rla(support: Support) -> float:
    identity = torch.eye(support.features.shape[1])
    matrix = torch.nn.Parameter(identity.clone())
    strength = len(support.weights) / len(support.labels)

    def logits(features: torch.Tensor) -> torch.Tensor:
        return cosine_logits(support, features @ matrix.T, support.weights)

    def loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = cross_entropy(logits(features), labels)
        return value + strength * torch.nn.functional.mse_loss(matrix, identity, reduction="sum")

    train(
        support,
        torch.optim.Adam([matrix], eps=1e-4),
        loss,
        lambda epoch, step: 1e-3 * (1 + math.cos(math.pi * step / 300)) / 2,
        epochs=300,
        batch_size=len(support.labels),
    )
    return accuracy(support, logits)


def cross_modal(support: Support) -> float:
    weights = torch.nn.Parameter(support.weights.clone())
    classes, prompts, dim = support.text.shape
    texts = support.text.reshape(-1, dim)
    of_text = torch.arange(classes).repeat_interleave(prompts)
    total = 200 * math.ceil(len(support.labels) / 16)

    def logits(features: torch.Tensor) -> torch.Tensor:
        return support.logit_scale * normalize(features) @ weights.T

    def loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        drawn = torch.randint(len(texts), (len(labels),))
        both = torch.cat([features, texts[drawn]])
        return cross_entropy(logits(both), torch.cat([labels, of_text[drawn]]))

    def rate(epoch: int, step: int) -> float:
        warm = min(100, total // 10)
        if step < warm:
            return 1e-3 * (step + 1) / warm
        return 1e-3 * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2

    train(
        support,
        torch.optim.AdamW([weights], weight_decay=1e-2),
        loss,
        rate,
        epochs=200,
        batch_size=16,
    )
    return accuracy(support, logits)


def lp_plus_plus(support: Support) -> float:
    features, text = normalize(support.features), support.weights
    own = torch.nn.functional.one_hot(support.labels, len(text)).float()
    cosines = features @ text.T
    weights = torch.nn.Parameter(own.T @ features)
    bias = torch.nn.Parameter(torch.zeros(len(text)))
    alpha = torch.full((len(text),), 250 * (own * cosines).sum().item() / len(features))
    alpha.requires_grad_()
    largest = torch.linalg.eigvalsh(features.T @ features)[-1].item()
    blend_step = len(features) / (4 * cosines.pow(2).sum(0).max())
    optimizer = torch.optim.SGD([weights, bias], 4 * len(features) / largest, momentum=0.9)

    def logits(unit: torch.Tensor) -> torch.Tensor:
        return unit @ weights.T + bias + alpha * (unit @ text.T)

    for epoch in range(300):
        optimizer.zero_grad()
        alpha.grad = None
        cross_entropy(logits(features), support.labels).backward()
        optimizer.step()
        if epoch % 10 == 9:
            alpha.data -= blend_step * alpha.grad
    return accuracy(support, lambda rows: logits(normalize(rows)))


TRAINED: dict[str, Callable[[Support], float]] = {
    "taskres": taskres,
    "lp++": lp_plus_plus,
    "clap": clap,
    "zs-lp": zs_lp,
    "rla": rla,
    "cross-modal": cross_modal,
}
