"""Frozen CLIP backbones through open_clip, by name and weights."""

import gzip
import hashlib
import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from open_clip import factory
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.config_check import CONFIG_FILE, check_config, read_config
from clip_adapter.extract.backbones.names import HUB, LOCAL, Request, resolve
from clip_adapter.extract.backbones.weights import UnsafeArchive, read_state
from clip_adapter.extract.encoding.device import Precision
from clip_adapter.words import shortened

BPE_FILE = "bpe_merges.txt.gz"
LARGEST_BPE = 2**26
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# Between which the multiplier of the cosines lies: models have 10 to 120.
SMALLEST_SCALE, LARGEST_SCALE = 1e-2, 1e4


@dataclass(frozen=True)
class Backbone:
    """A frozen open_clip model in evaluation mode and what belongs to it.

    preprocess: PIL image → (3, H, W) float32, the deterministic evaluation preprocessing.
    tokenizer: list of strings (and how many tokens, if not as many as usual) → (B, context) int64.
    identity: what the cache records; two backbones with one `weights_sha256` give one answer.
    logit_scale: the multiplier itself. logit_bias: 0 for models without one.
    dtype: what the model computes in and takes images as.
    assumption: a sentence on what the weights do not say and was taken for granted.
    """

    model: open_clip.CLIP | open_clip.CustomTextCLIP
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[..., torch.Tensor]
    identity: dict[str, Any]
    preprocess_config: dict[str, Any]
    logit_scale: float
    logit_bias: float
    dtype: torch.dtype = torch.float32
    assumption: str | None = None

    def decoding(self, how: object) -> "Backbone":
        """The same, and where `how` is fast for images that are decoded so, as its preprocessing
        then says."""
        if how != "fast":
            return self
        return replace(self, preprocess_config=self.preprocess_config | {"decode": how})


def load_backbone(
    name: str, pretrained: str | None = None, precision: Precision = "fp32"
) -> Backbone:
    """Load a backbone on the CPU.

    name: `glyph-clip`, an open_clip architecture, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
    pretrained: a tag of open_clip's or a local file or folder; by default `openai` where that
        exists. A tag fixes the activation: OpenAI's weights get QuickGELU, whatever the name says.
        So do TorchScript archives, the form in which OpenAI published them; they are read without
        being run.
    precision: fp16 and bf16 as open_clip means them: weights of matrix products and convolutions
        in that type, normalisation layers in float32. `weights_sha256` is the same in all three.

    Raises UserError for unknown names (with the near matches), unknown tags, and weights that
    cannot be had, do not fit, or hold a logit scale that is none. Nothing that comes with weights
    is run: see `weights` and `config_check`.
    """
    request = resolve(name, pretrained)
    try:
        with silent_loaders():
            config = _checked_config(request)
            tokenizer = _tokenizer(request.model_name, config)
            model = _create(request, pretrained=request.weights, require_pretrained=True)
            embed_dim = model.encode_text(tokenizer([""])).shape[-1]
            stated = dict(model.visual.preprocess_cfg)
            preprocess = image_transform_v2(PreprocessCfg(**stated), is_train=False)
    except Exception as error:  # a damaged file or folder makes open_clip raise almost anything
        raise UserError(_loading_failed(name, request, error)) from error
    bias = getattr(model, "logit_bias", None)
    logit_bias = 0.0 if bias is None else bias.item()
    _check_logits(model.logit_scale.item(), logit_bias, Path(request.weights or name).name)
    return Backbone(
        model=model if precision == "fp32" else _in_precision(model, request, precision),
        preprocess=preprocess,
        tokenizer=tokenizer,
        identity={
            "name": name,
            "pretrained": public_label(pretrained) or request.weights or name,
            "weights_sha256": weights_sha256(model.state_dict()),
            "open_clip_version": open_clip.__version__,
            "embed_dim": embed_dim,
            "image_size": stated["size"],
            "quick_gelu": any(isinstance(module, QuickGELU) for module in model.modules()),
        },
        preprocess_config=stated,
        logit_scale=model.logit_scale.exp().item(),
        logit_bias=logit_bias,
        dtype=DTYPES[precision],
        assumption=request.assumption,
    )


def _create(request: Request, **how: Any) -> Any:
    with silent_loaders(), patch.object(factory, "load_state_dict", read_state):
        model = open_clip.create_model(
            request.model_name,
            force_quick_gelu=request.quick_gelu,
            force_preprocess_cfg=dict(request.preparation),
            **how,
        )
    return model.eval().requires_grad_(False)


def _check_logits(logarithm: float, bias: float, weights: str) -> None:
    """Raises UserError unless the exponential of a logit scale and a logit bias can be ones."""
    if not math.log(SMALLEST_SCALE) <= logarithm <= math.log(LARGEST_SCALE):  # nor is NaN
        raise UserError(
            f"The logit scale in {weights} is {logarithm:g}, which cannot be: weights hold the "
            "logarithm of what multiplies the cosines (4.605 for 100); put that there."
        )
    if not math.isfinite(bias):
        raise UserError(f"The logit bias in {weights} is {bias:g}, which cannot be; mend it there.")


def _in_precision(
    model: open_clip.CLIP | open_clip.CustomTextCLIP, request: Request, precision: Precision
) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    """The model in another precision. Its layers differ from those of float32, so it is built
    anew rather than converted."""
    other = _create(request, load_weights=False, pretrained_text=False, precision=precision)
    other.load_state_dict(model.state_dict())
    return other


@contextmanager
def silent_loaders() -> Iterator[None]:
    """Without what open_clip and those it loads with log: they raise what matters, and without a
    network they warn of every attempt."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over all tensors by name: name, dtype, shape and bytes.

    It identifies the weights themselves, whatever file format they came in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checked_config(request: Request) -> dict[str, Any]:
    """The model's configuration: open_clip's own, or a checked one of a folder or a repository."""
    schema, _, place = request.model_name.partition(":")
    if not place and f"{schema}:" in (LOCAL, HUB):
        raise ValueError("no folder is named")
    if f"{schema}:" == LOCAL:
        return read_config(Path(place))["model_cfg"]
    if f"{schema}:" == HUB:
        return check_config(Path(download_pretrained_from_hf(place, CONFIG_FILE)))["model_cfg"]
    return open_clip.get_model_config(request.model_name)


def _tokenizer(model_name: str, config: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
    """open_clip's tokenizer for the model; a local folder may bring its own merges."""
    text = config["text_cfg"]
    if text.get("hf_tokenizer_name"):
        # The one of a call outdoes what a configuration says.
        return open_clip.get_tokenizer(model_name, trust_remote_code=False)
    merges = Path(model_name.removeprefix(LOCAL)) / BPE_FILE
    if not (model_name.startswith(LOCAL) and merges.is_file()):
        return open_clip.get_tokenizer(model_name)
    with gzip.open(merges) as file:
        if len(file.read(LARGEST_BPE + 1)) > LARGEST_BPE:
            raise ValueError(f"{BPE_FILE} is too large for a vocabulary")
    return open_clip.SimpleTokenizer(
        bpe_path=str(merges), context_length=text.get("context_length", 77)
    )


def public_label(pretrained: str | None) -> str | None:
    """A tag as it is, a path by its last part: folders of one machine mean nothing elsewhere."""
    return Path(pretrained).name if pretrained and Path(pretrained).exists() else pretrained


def _loading_failed(name: str, request: Request, error: Exception) -> str:
    weights = Path(request.weights or "")
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"{weights.name or name} is damaged or holds Python code beside the weights, which is "
            "not run; give a .safetensors file or a saved state dict."
        )
    if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
        return (
            f"The tokenizer of {name} needs the package transformers: "
            "pip install 'clip-adapter[transformers]'."
        )
    if isinstance(error, UnsafeArchive):
        return f"{weights.name} is a TorchScript archive that cannot be used: {error}."
    if isinstance(error, RuntimeError | OSError | ValueError | ImportError):
        reason = shortened(" ".join(str(error).split()), 300)
    else:
        reason = f"that holds no weights that open_clip can read ({error!r:.80})"
    if request.weights and not Path(request.weights).exists():
        return (
            f"The weights {request.weights!r} of {name} could not be downloaded ({reason}); "
            "on a machine without a network give a local file with --pretrained."
        )
    source = f" from {weights.name}" if weights.name else ""
    return f"The backbone {name} could not be loaded{source}: {reason}"
