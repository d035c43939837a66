"""Models small enough for tests, under the names and tags of real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import load_backbone

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
RESNET: dict[str, Any] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
VIT_CONFIG: dict[str, Any] = {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT}
CONFIGS: dict[str, dict[str, Any]] = {
    "RN50": {"embed_dim": 8, "vision_cfg": RESNET, "text_cfg": TEXT},
    "ViT-B-32": VIT_CONFIG,
    "ViT-L-14": VIT_CONFIG,
}
CONFIGS |= {f"{name}-quickgelu": config | {"quick_gelu": True} for name, config in CONFIGS.items()}


def register(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the tiny architectures in the place of the real ones for the length of a test."""
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    folder.mkdir()
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def random_model(name: str, *, quick_gelu: bool = False, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return open_clip.create_model(name, force_quick_gelu=quick_gelu).eval()


def with_weights_of(model: torch.nn.Module, name: str, *, quick_gelu: bool) -> torch.nn.Module:
    other = random_model(name, quick_gelu=quick_gelu, seed=1)
    other.load_state_dict(model.state_dict())
    return other


class Attack:
    """What an attacker pickles: a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._what = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._what


def refused(name: str, weights: Path | str | None, words: str) -> None:
    """The backbone is, in one sentence with these words."""
    with pytest.raises(UserError, match=words) as caught:
        load_backbone(name, None if weights is None else str(weights))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
