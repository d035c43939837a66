"""A fitted adapter inside its CLIP as one PyTorch module, for deployment without JAX."""

import reprlib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import nn

from clip_adapter.adapters.method import Head
from clip_adapter.adapters.stata import Refinement, refined_logits
from clip_adapter.errors import UserError
from clip_adapter.extract.backbones import second
from clip_adapter.extract.backbones.loading import Backbone, load_backbone
from clip_adapter.extract.backbones.names import GLYPH_CLIP, is_published
from clip_adapter.extract.encoding.images import read_rgb
from clip_adapter.extract.encoding.preprocess import refuse_strips
from clip_adapter.extract.encoding.projection import take_projection
from clip_adapter.pipelines.saved.adapter_check import (
    check_same_backbone,
    check_same_second,
    check_same_width,
    feature_width,
)
from clip_adapter.pipelines.saved.adapter_file import AdapterInfo, SavedAdapter, load_adapter
from clip_adapter.words import quoted

OTHER_WEIGHTS = "give the right ones with --pretrained, or extract and fit again"
OTHER_SECOND = "give the right ones with --also and --also-pretrained, or extract and fit again"


class FittedHead(nn.Module):
    """Image features (B, D) → logits (B, C), by the formula that was fitted.

    The arrays are buffers: `.to(device)`, `state_dict` and `torch.export` work as for any module.

    Examples:
        >>> import torch
        >>> from clip_adapter import FittedHead, load_adapter
        >>> FittedHead(load_adapter("runs/first"))(torch.ones(2, 128)).shape
        torch.Size([2, 10])
    """

    def __init__(self, adapter: SavedAdapter) -> None:
        super().__init__()
        info = adapter.info
        self._logits = adapter.method.logits
        self._setting = dict(info.setting)
        self._names = tuple(adapter.arrays)
        self._logit_scale, self._logit_bias = info.logit_scale, info.logit_bias
        self.weights: torch.Tensor
        self.register_buffer("weights", torch.tensor(np.asarray(adapter.weights)))
        for name in self._names:
            self.register_buffer(_buffer(name), torch.tensor(np.asarray(adapter.arrays[name])))
        refining = adapter.refinement._asdict() if adapter.refinement else {}
        self._refining = [f"refinement_{name}" for name in refining]
        for name, array in zip(self._refining, refining.values(), strict=True):
            self.register_buffer(name, torch.tensor(np.asarray(array)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        arrays = {name: self.get_buffer(_buffer(name)) for name in self._names}
        head = Head(self.weights, self._logit_scale, self._logit_bias)
        rows = features.to(self.weights.dtype)
        logits = self._logits(torch, arrays, self._setting, rows, head)
        if not self._refining:
            return logits
        return refined_logits(
            torch, Refinement(*map(self.get_buffer, self._refining)), logits, rows
        )


def _buffer(name: str) -> str:
    """A module's buffer may have no dots or slashes in its name."""
    return "fitted_" + name.replace("/", "_")


class AdaptedClip(nn.Module):
    """images (B, 3, H, W) → logits (B, C): an open_clip model with a fitted adapter inside.

    Every method that `fit` saves is supported. The logits are those of the training side within
    1e-5 of the logit scale. An adapter of two encoders takes the images as `preprocess2` gives them
    beside those of `preprocess`: model(images, images2). The module is in evaluation mode and
    nothing in it asks for gradients; `.to(device)`, `state_dict` and `torch.export` work as for any
    other.

    class_names: C strings, the columns of the logits.

    Examples:
        >>> from PIL import Image
        >>> from clip_adapter import AdaptedClip
        >>> model = AdaptedClip.from_run("runs/first")
        >>> images = model.preprocess(Image.new("RGB", (40, 30)))[None]
        >>> model(images).shape
        torch.Size([1, 10])
    """

    def __init__(
        self, backbone: Backbone, adapter: SavedAdapter, backbone2: Backbone | None = None
    ) -> None:
        """Raises UserError where the adapter was fitted for other backbones or preprocessing."""
        super().__init__()
        check_same_backbone(
            backbone.identity, backbone.preprocess_config, adapter.info, OTHER_WEIGHTS
        )
        check_same_second(stated(backbone2), adapter.info, OTHER_SECOND)
        self.clip = backbone.model
        width = backbone.identity["embed_dim"]
        method = adapter.method
        if "projection" in method.needs:  # the adapter has one in its place
            self.clip = deepcopy(backbone.model)
            width = len(take_projection(self.clip.visual, backbone.identity["name"]).weights)
        self.second = backbone2.model if backbone2 and adapter.info.backbone2 else None
        if backbone2 and self.second is not None:
            width += backbone2.identity["embed_dim"]
            self._transform2 = backbone2.preprocess
            self._preprocess2_config = backbone2.preprocess_config
        wanted = feature_width(method, adapter.arrays, adapter.head)
        check_same_width(width, wanted, backbone.identity["name"])
        self.head = FittedHead(adapter)
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
        backbone: str | None = None,
        pretrained: str | None = None,
        also: str | None = None,
        also_pretrained: str | None = None,
    ) -> Self:
        """Load an adapter and the backbone that it was fitted for.

        run: what `load_adapter` takes: a run folder or the path of one of the adapter's files.
        backbone: as `load_backbone` takes it; by default what the adapter names.
        pretrained: where the backbone's weights lie, for weights that were given as a local file
            or folder when the features were extracted; by default what the adapter names.
        also, also_pretrained: the same of the second encoder, where the adapter takes one.

        An adapter may come from anywhere: a backbone that it names is loaded only if it is
        glyph-clip or a model and tag of open_clip's.

        Raises UserError for another one, where adapter or backbone cannot be had, and where the
        weights are not the ones of the fit.
        """
        adapter = load_adapter(run)
        first = find_backbone(adapter.info, backbone, pretrained)
        return cls(first, adapter, find_second(adapter.info, also, also_pretrained)).to(device)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """What the encoder takes, (3, H, W) float32 on the CPU, of a picture of any mode.

        The picture is taken as it is: of one decoded at a smaller size, as `predict` does for an
        adapter of images that were decoded fast, after image.draft(None, (2 * W, 2 * H)).

        Raises BadImage for one that `extract` would not take either.
        """
        picture = read_rgb(image.copy)
        refuse_strips(picture, self._preprocess_config)
        return self._transform(picture)

    def preprocess2(self, image: Image.Image) -> torch.Tensor:
        """The same for the second encoder of an adapter that takes one."""
        picture = read_rgb(image.copy)
        refuse_strips(picture, self._preprocess2_config)
        return self._transform2(picture)

    def forward(self, images: torch.Tensor, images2: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, C) of preprocessed images (B, 3, H, W), and of the same by `preprocess2` for
        an adapter of two encoders. Raises TypeError for one set of images too few or too many."""
        features = self.clip.encode_image(images)
        if (images2 is None) != (self.second is None):
            raise TypeError(f"the adapter takes {1 if self.second is None else 2} sets of images")
        if self.second is not None:
            features = torch.cat([features, self.second.encode_image(images2)], dim=1)
        return self.head(features)


def stated(backbone: Backbone | None) -> dict[str, Any] | None:
    """What a cache says of a second encoder."""
    if backbone is None:
        return None
    return {**backbone.identity, "preprocess": backbone.preprocess_config}


def find_second(info: AdapterInfo, also: str | None, pretrained: str | None) -> Backbone | None:
    """The second encoder as the caller names it, or the adapter where that is published; None for
    an adapter that takes none.

    Raises UserError where it is not, where it cannot be had, and for one that is not taken.
    """
    if info.backbone2 is None:
        if also is not None or pretrained is not None:
            raise UserError("The adapter takes one encoder; leave --also and its weights out.")
        return None
    loaded = second.load_second(*_second_named(info.backbone2, also, pretrained))
    return loaded.decoding(info.backbone2.get("preprocess", {}).get("decode"))


def _second_named(
    stated: Mapping[str, Any], also: str | None, pretrained: str | None
) -> tuple[str, str | None]:
    name, weights = str(stated.get("name")), str(stated.get("pretrained"))
    if also is not None:
        return also, pretrained
    if pretrained is not None and (second.is_of_timm(name) or ":" not in name):
        return name, pretrained
    if pretrained is None and second.is_published(name, weights):
        return name, None if name == GLYPH_CLIP or second.is_of_timm(name) else weights
    raise UserError(
        f"The adapter takes {quoted(name)} with the weights {quoted(weights)} as well, which is no "
        "model and tag of timm's or open_clip's; name it with --also, and with --also-pretrained "
        "where its weights lie."
    )


def find_backbone(info: AdapterInfo, backbone: str | None, pretrained: str | None) -> Backbone:
    """What the caller names; what the adapter names only where that is published. It decodes files
    as those were decoded that the adapter was fitted on.

    Raises UserError where it is not, and where it cannot be had.
    """
    loaded = load_backbone(*_backbone_named(info, backbone, pretrained))
    return loaded.decoding(info.preprocess.get("decode"))


def _backbone_named(
    info: AdapterInfo, backbone: str | None, pretrained: str | None
) -> tuple[str, str | None]:
    if backbone is not None:
        return backbone, pretrained
    name, weights = info.backbone.get("name"), info.backbone.get("pretrained")
    if not isinstance(name, str) or not isinstance(weights, str):
        raise UserError(
            f"The adapter does not say which backbone it was fitted for, only "
            f"{reprlib.repr(info.backbone)}; it can be used on features, not on images."
        )
    if pretrained is not None:
        if ":" in name and Path(pretrained).is_dir():
            # `local-dir:FOLDER` and `hf-hub:ORG/NAME` hold configuration and weights together.
            return f"local-dir:{pretrained}", None
        if ":" not in name:
            return name, pretrained
    elif is_published(name, weights):
        return name, None if name == GLYPH_CLIP else weights
    raise UserError(
        f"The adapter was fitted for {quoted(name)} with the weights {quoted(weights)}, which is "
        "no model and tag of open_clip's; name the backbone with --backbone, and with "
        "--pretrained where its weights lie."
    )
