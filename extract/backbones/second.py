"""A second frozen encoder of the same images: a model of timm's, or the image tower of a CLIP."""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import (
    DTYPES,
    Backbone,
    public_label,
    silent_loaders,
    weights_sha256,
)
from clip_adapter.extract.backbones.loading import load_backbone as load_clip
from clip_adapter.extract.backbones.names import is_published as is_published_clip
from clip_adapter.extract.backbones.weights import read_state
from clip_adapter.extract.encoding.device import Precision
from clip_adapter.extract.encoding.preprocess import evaluation
from clip_adapter.files import is_file
from clip_adapter.words import near, quoted, shortened

TIMM = "timm:"
# As torch.hub has them, with the side and the crop of their published evaluation.
DINO = {
    f"dinov2_vit{size[0]}14": f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large")
}
DINO_SIDE, DINO_CROP = 224, 0.875


def load_second(
    name: str, pretrained: str | None = None, precision: Precision = "fp32"
) -> Backbone:
    """Load a second encoder on the CPU; of a model of timm only the images' part is of use.

    name: `dinov2_vits14` (`b`, `l`), `timm:NAME[.TAG]`, or what `load_backbone` takes.
    pretrained: a local file of weights for a model of timm, by default those that timm publishes;
        else as `load_backbone` takes it.

    Raises UserError for unknown names and weights that cannot be had or do not fit; nothing that
    comes with weights is run.
    """
    own = _name_in_timm(name)
    if own is None:
        return load_clip(name, pretrained, precision)
    if not timm.is_model(own.partition(".")[0]):
        raise UserError(f"Unknown model {quoted(name)}; {near(own, timm.list_models())}.")
    how: dict[str, Any] = {"img_size": DINO_SIDE} if name in DINO else {}
    try:
        with silent_loaders():
            model: Any = timm.create_model(own, pretrained=pretrained is None, num_classes=0, **how)
            if pretrained is not None:
                _load_file(model, pretrained)
            config = _preprocessing(model, dino=name in DINO)
            with torch.inference_mode():
                width = model.eval()(torch.zeros(1, 3, *config["size"])).shape[-1]
            sha256 = weights_sha256(model.state_dict())
    except UserError:
        raise
    except Exception as error:  # a damaged file makes PyTorch raise almost anything
        reason = shortened(" ".join(str(error).split()), 200)
        advice = "; without a network give a local file" if pretrained is None else ""
        raise UserError(f"The weights of {name} cannot be had ({reason}){advice}.") from error
    return Backbone(
        model=_Images(model.to(DTYPES[precision])).requires_grad_(False).eval(),
        preprocess=evaluation(config),
        tokenizer=_no_text,
        identity={
            "name": name,
            "pretrained": public_label(pretrained) or model.pretrained_cfg.get("tag", ""),
            "weights_sha256": sha256,
            "timm_version": timm.__version__,
            "embed_dim": width,
            "image_size": config["size"],
        },
        preprocess_config=config,
        logit_scale=1.0,
        logit_bias=0.0,
        dtype=DTYPES[precision],
    )


def _name_in_timm(name: str) -> str | None:
    return DINO.get(name) or (name.removeprefix(TIMM) if name.startswith(TIMM) else None)


class _Images(nn.Module):
    """A model of timm's under the name by which a CLIP encodes images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.visual = model

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)


def _no_text(*_: Any) -> torch.Tensor:
    raise TypeError("a model of timm's reads no text")


def _load_file(model: Any, path: str) -> None:
    """Weights of a local file, all of which the model must have but for its classifier."""
    if not is_file(Path(path)):
        raise UserError(f"--also-pretrained {quoted(path)} is no file.")
    state = read_state(path)
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state = adapt(state, model) if adapt else state
    named = model.pretrained_cfg.get("classifier") or ()
    heads = (named,) if isinstance(named, str) else tuple(named)
    kept = {n: t for n, t in state.items() if not n.startswith(tuple(f"{h}." for h in heads))}
    model.load_state_dict(kept)


def _preprocessing(model: nn.Module, *, dino: bool) -> dict[str, Any]:
    """timm's evaluation preprocessing in the words of open_clip's, and its own `crop_pct`."""
    own = timm.data.resolve_model_data_config(model)
    size = [DINO_SIDE] * 2 if dino else list(own["input_size"][1:])
    return {
        "size": size,
        "mode": "RGB",
        "mean": list(own["mean"]),
        "std": list(own["std"]),
        "interpolation": own["interpolation"],
        "resize_mode": "shortest",
        "crop_pct": DINO_CROP if dino else own["crop_pct"],
        "crop_mode": own["crop_mode"],
    }


def is_of_timm(name: str) -> bool:
    """Whether it is a model of timm's."""
    own = _name_in_timm(name)
    return own is not None and timm.is_model(own.partition(".")[0])


def is_published(name: str, pretrained: str) -> bool:
    """Whether a received file may have it loaded: a model and tag of timm's or of open_clip's."""
    own = _name_in_timm(name)
    if own is None:
        return is_published_clip(name, pretrained)
    model, _, tag = own.partition(".")
    return timm.is_model(model) and f"{model}.{tag or pretrained}" in timm.list_pretrained(model)
