"""The last linear map of an image encoder, taken apart from what comes before it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from clip_adapter.errors import UserError


@dataclass(frozen=True)
class SplitEncoder:
    """An image encoder in two: image features = pooled(pixels) @ weights + bias.

    pooled: normalised pixels (B, 3, height, width) → (B, F). weights: (F, D). bias: (D,) or None.
    """

    pooled: Callable[[torch.Tensor], torch.Tensor]
    weights: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, pooled: torch.Tensor) -> torch.Tensor:
        features = pooled @ self.weights
        return features if self.bias is None else features + self.bias

    def arrays(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """weights and bias on the host, as the encoder multiplied with them."""
        weights = self.weights.detach().float().cpu().numpy()
        return weights, None if self.bias is None else self.bias.detach().float().cpu().numpy()


def take_projection(visual: Any, name: str) -> SplitEncoder:
    """Take the last linear map out of an image encoder, which then ends before it.

    name: of the backbone, for the sentence.
    Raises UserError for an encoder that does not end in one.
    """
    if isinstance(visual, VisionTransformer) and visual.proj is not None:
        if not visual.output_tokens:
            weights = visual.proj
            visual.proj = None
            return SplitEncoder(visual, weights, None)
    elif isinstance(visual, ModifiedResNet):
        last = visual.attnpool.c_proj
        visual.attnpool = _Pool(visual.attnpool)
        return SplitEncoder(visual, last.weight.T, last.bias)
    elif isinstance(visual, TimmModel) and set(visual.head._modules) == {"drop", "proj"}:
        last = visual.head.proj
        visual.head = nn.Sequential()
        return SplitEncoder(visual, last.weight.T, last.bias)
    raise UserError(
        f"The image encoder of {name} does not end in a linear projection that could be taken out "
        "of it; leave out --with-projection."
    )


class _Pool(nn.Module):
    """Attention pooling of CLIP's ResNets without its output projection, and for the one place that
    is used: (B, F, h, w) → (B, F)."""

    def __init__(self, pool: AttentionPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + self.pool.positional_embedding.to(x.dtype)
        query, key, value = (
            layer(places).unflatten(2, (self.pool.num_heads, -1)).transpose(1, 2)
            for layer, places in (
                (self.pool.q_proj, x[:, :1]),
                (self.pool.k_proj, x),
                (self.pool.v_proj, x),
            )
        )
        return F.scaled_dot_product_attention(query, key, value).flatten(1)
