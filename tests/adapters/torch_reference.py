"""CLIP-Adapter written again from the paper's formulas, in float64 PyTorch.

Parameters are a dict of tensors by the names that a saved adapter has: `image/bottleneck/down/
kernel` (D, D/r), `image/bottleneck/up/kernel` (D/r, D), `image/ratio/logit`, and so on.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Parameters = Mapping[str, torch.Tensor]


def tensor(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor(array) for name, array in arrays.items()}


def normalised(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def ratio(
    parameters: Parameters, setting: Mapping[str, Any], side: str, x: torch.Tensor
) -> torch.Tensor | float:
    kind = setting[{"image": "alpha", "text": "beta"}[side]]
    if not isinstance(kind, str):
        return kind
    logit = parameters[f"{side}/ratio/logit"]
    if kind == "learned":
        return torch.sigmoid(logit)
    hidden = torch.relu(normalised(x) @ parameters[f"{side}/ratio/hidden/kernel"])
    return torch.sigmoid(hidden @ parameters[f"{side}/ratio/direction"] + logit)


def blended(
    parameters: Parameters, setting: Mapping[str, Any], side: str, x: torch.Tensor
) -> torch.Tensor:
    """ρ·A(x) + (1 − ρ)·x, A(x) = ReLU(ReLU(x W1) W2)."""
    down = parameters[f"{side}/bottleneck/down/kernel"]
    up = parameters[f"{side}/bottleneck/up/kernel"]
    share = ratio(parameters, setting, side, x)
    return share * torch.relu(torch.relu(x @ down) @ up) + (1 - share) * x


def logits(
    parameters: Parameters,
    setting: Mapping[str, Any],
    features: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    bias: float,
) -> torch.Tensor:
    if setting["branch"] != "text":
        features = blended(parameters, setting, "image", features)
    if setting["branch"] != "image":
        weights = blended(parameters, setting, "text", weights)
    return scale * normalised(features) @ normalised(weights).T + bias


def warmed_up_cosine(step: int, total: int) -> float:
    """A rise over a tenth of the steps, at most 100, then half a cosine to zero."""
    warm = min(100, total // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
