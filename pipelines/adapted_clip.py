"""A fitted adapter inside its CLIP as one PyTorch module, for deployment without JAX."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from clip_adapter.cache.errors import UserError
from clip_adapter.extract.backbone import Backbone, load_backbone
from clip_adapter.extract.images import read_rgb
from clip_adapter.extract.preprocess import refuse_strips
from clip_adapter.pipelines.adapter_file import AdapterInfo, SavedAdapter, load_adapter
from clip_adapter.pipelines.adapter_layout import branches

# As in adapters/classifier.py: keeps the direction of a zero vector finite.
TINY = 1e-12

Arrays = Mapping[str, npt.NDArray[Any]]


class AdaptedClip(nn.Module):
    """images (B, 3, H, W) → logits (B, C): an open_clip model with a fitted adapter inside.

    Every method that `fit` saves is supported. The logits are those of the Flax modules within
    1e-5 of the logit scale. The module is in evaluation mode and nothing in it asks for gradients;
    `.to(device)`, `state_dict` and `torch.export` work as for any other.

    class_names: C strings, the columns of the logits.
    """

    def __init__(self, backbone: Backbone, adapter: SavedAdapter) -> None:
        """Raises UserError where the adapter was fitted for another backbone or preprocessing."""
        super().__init__()
        _check_same(backbone, adapter.info)
        self.clip = backbone.model
        self.head = make_head(adapter)
        self._transform = backbone.preprocess
        self._preprocess_config = backbone.preprocess_config
        self.class_names = tuple(adapter.info.class_names)
        self.requires_grad_(False).eval()

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        *,
        device: str | torch.device = "cpu",
        pretrained: str | None = None,
    ) -> Self:
        """Load an adapter and the backbone that it was fitted for.

        run: what `load_adapter` takes: a run folder or the path of one of the adapter's files.
        pretrained: where the backbone's weights lie, for weights that were given as a local file
            or folder when the features were extracted; by default what the adapter names.

        Raises UserError where either cannot be had, or the weights are not the ones of the fit.
        """
        adapter = load_adapter(Path(run))
        return cls(_recorded_backbone(adapter.info, pretrained), adapter).to(device)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """What the encoder takes, (3, H, W) float32 on the CPU, of a picture of any mode.

        Raises BadImage for one that `extract` would not take either.
        """
        picture = read_rgb(image.copy)
        refuse_strips(picture, self._preprocess_config)
        return self._transform(picture)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of preprocessed images (B, 3, H, W)."""
        return self.head(self.clip.encode_image(images))


def make_head(adapter: SavedAdapter) -> nn.Module:
    """The module image features (B, D) → logits (B, C) of an adapter that `load_adapter` read."""
    if adapter.info.method == "linear-probe":
        return LinearHead(adapter)
    return CosineHead(adapter)


class LinearHead(nn.Module):
    """f K + b, the linear probe."""

    def __init__(self, adapter: SavedAdapter) -> None:
        super().__init__()
        self.linear = _linear(adapter.arrays["kernel"])
        self.linear.bias = nn.Parameter(torch.tensor(adapter.arrays["bias"]))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features.to(self.linear.weight.dtype))


class CosineHead(nn.Module):
    """scale · unit(f*) · unit(W*)ᵀ + bias with f* and W* from the adapters that there are.

    W* does not depend on the image, so that it is computed once, here.
    """

    def __init__(self, adapter: SavedAdapter) -> None:
        super().__init__()
        info = adapter.info
        adapted = branches(info.setting) if info.method == "clip-adapter" else ()
        text = ResidualAdapter(adapter.arrays, "text") if "text" in adapted else nn.Identity()
        self.image = (
            ResidualAdapter(adapter.arrays, "image") if "image" in adapted else nn.Identity()
        )
        self.logit_scale = info.logit_scale
        self.logit_bias = info.logit_bias
        self.classifier: torch.Tensor
        with torch.no_grad():
            weights = _unit(text(torch.tensor(adapter.weights)))
        self.register_buffer("classifier", weights)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        adapted = self.image(features.to(self.classifier.dtype))
        return self.logit_scale * (_unit(adapted) @ self.classifier.T) + self.logit_bias


class ResidualAdapter(nn.Module):
    """ρ·A(x) + (1 − ρ)·x, A(x) = ReLU(ReLU(x W1) W2): (N, D) → (N, D)."""

    def __init__(self, arrays: Arrays, branch: str) -> None:
        super().__init__()
        self.down = _linear(arrays[f"{branch}/bottleneck/down/kernel"])
        self.up = _linear(arrays[f"{branch}/bottleneck/up/kernel"])
        self.ratio = _ratio(
            {
                name.removeprefix(f"{branch}/ratio/"): array
                for name, array in arrays.items()
                if name.startswith(f"{branch}/ratio/")
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ratio = self.ratio(x)
        return ratio * F.relu(self.up(F.relu(self.down(x)))) + (1 - ratio) * x


class ConstantRatio(nn.Module):
    """The same ρ for every row: a fixed one, or a learned one after its sigmoid."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value: torch.Tensor
        self.register_buffer("value", value)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.value


class HyperNetwork(nn.Module):
    """A ρ per row, sigmoid(v · ReLU(V unit(x)) + λ): (N, D) → (N, 1)."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.hidden = _linear(arrays["hidden/kernel"])
        self.direction = _linear(arrays["direction"])
        self.direction.bias = nn.Parameter(torch.tensor(arrays["logit"]).reshape(1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.direction(F.relu(self.hidden(_unit(rows)))))


def _ratio(arrays: Arrays) -> nn.Module:
    if "value" in arrays:
        return ConstantRatio(torch.tensor(arrays["value"]))
    if "direction" in arrays:
        return HyperNetwork(arrays)
    return ConstantRatio(torch.sigmoid(torch.tensor(arrays["logit"])))


def _linear(kernel: npt.NDArray[np.float32]) -> nn.Linear:
    """x K without a bias; Flax keeps K as (inputs, outputs), PyTorch its transpose."""
    inputs, outputs = kernel.shape
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight = nn.Parameter(torch.tensor(kernel.T))
    return layer


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(torch.sum(x * x, dim=-1, keepdim=True) + TINY)


def _recorded_backbone(info: AdapterInfo, pretrained: str | None) -> Backbone:
    """The backbone that the adapter names, its weights from `pretrained` where that is given."""
    name, weights = info.backbone.get("name"), info.backbone.get("pretrained")
    if not isinstance(name, str) or not isinstance(weights, str):
        raise UserError(
            f"The adapter does not say which backbone it was fitted for, only "
            f"{reprlib.repr(info.backbone)}; it can be used on features, not on images."
        )
    if pretrained is None:
        return load_backbone(name, None if weights == name else weights)
    if ":" in name and Path(pretrained).is_dir():
        # `local-dir:FOLDER` and `hf-hub:ORG/NAME` hold configuration and weights together.
        return load_backbone(f"local-dir:{pretrained}")
    return load_backbone(name, pretrained)


def _check_same(backbone: Backbone, info: AdapterInfo) -> None:
    name = backbone.identity["name"]
    found, wanted = backbone.identity["weights_sha256"], info.backbone.get("weights_sha256")
    if found != wanted:
        raise UserError(
            f"The adapter was fitted for other weights of {info.backbone.get('name')} (SHA-256 "
            f"{reprlib.repr(wanted)}) than those of {name} here ({reprlib.repr(found)}); "
            "give the right ones with --pretrained, or extract and fit again."
        )
    # What is compared has been through JSON on the adapter's side.
    for key, value in json.loads(json.dumps(backbone.preprocess_config)).items():
        if info.preprocess.get(key) != value:
            raise UserError(
                f"The adapter was fitted on images preprocessed with {key} "
                f"{reprlib.repr(info.preprocess.get(key))}, {name} here uses "
                f"{reprlib.repr(value)}; extract and fit again."
            )
