"""Any fitted method as a PyTorch module on features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from clip_adapter.adapters.method import Head
from clip_adapter.adapters.registry import find_method

if TYPE_CHECKING:
    from clip_adapter.pipelines.saved.adapter_file import SavedAdapter


class FittedHead(nn.Module):
    """Image features (B, D) → logits (B, C), by the formula that was fitted.

    The arrays are buffers: `.to(device)`, `state_dict` and `torch.export` work as for any module.
    """

    def __init__(self, adapter: SavedAdapter) -> None:
        super().__init__()
        info = adapter.info
        self._logits = find_method(info.method).logits
        self._setting = dict(info.setting)
        self._names = tuple(adapter.arrays)
        self._logit_scale, self._logit_bias = info.logit_scale, info.logit_bias
        self.weights: torch.Tensor
        self.register_buffer("weights", torch.tensor(np.asarray(adapter.weights)))
        for name in self._names:
            self.register_buffer(_buffer(name), torch.tensor(np.asarray(adapter.arrays[name])))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        arrays = {name: self.get_buffer(_buffer(name)) for name in self._names}
        head = Head(self.weights, self._logit_scale, self._logit_bias)
        rows = features.to(self.weights.dtype)
        return self._logits(torch, arrays, self._setting, rows, head)


def _buffer(name: str) -> str:
    """A module's buffer may have no dots or slashes in its name."""
    return "fitted_" + name.replace("/", "_")
