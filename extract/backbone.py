"""Frozen CLIP backbones through open_clip, by name and weights."""

import difflib
import hashlib
import json
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image

from clip_adapter.cache.errors import UserError
from clip_adapter.extract.device import Precision
from clip_adapter.extract.torchscript_archive import (
    UnsafeArchive,
    is_torchscript,
    read_weights,
)

GLYPH_CLIP = "glyph-clip"
GLYPH_CLIP_FOLDER = Path(__file__).parent / "glyph_clip"
QUICKGELU = "-quickgelu"
BPE_FILE = "bpe_merges.txt.gz"
SCHEMAS = ("local-dir:", "hf-hub:")
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# In OpenAI's archives beside the weights: numbers of the architecture, and the causal mask.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
# How images were prepared in training, which is published with the tag and not in the weights.
PREPARATION = ("mean", "std", "interpolation", "resize_mode")


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


@dataclass(frozen=True)
class _Recipe:
    """How open_clip is asked: architecture or schema, weights (tag or file), activation.

    With a schema the model's own configuration holds weights and activation. `preparation`: the
    preprocessing that belongs to weights from a file, as far as it is known. `assumption`: see
    Backbone.
    """

    model_name: str
    weights: str | None
    quick_gelu: bool
    preparation: Mapping[str, Any] = field(default_factory=dict)
    assumption: str | None = None


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
    cannot be had or do not fit.
    """
    recipe = _resolve(name, pretrained)
    try:
        model = _create(recipe)
        tokenizer = _tokenizer(recipe.model_name)
    except Exception as error:  # a damaged file or folder makes open_clip raise almost anything
        raise UserError(_loading_failed(name, recipe, error)) from error
    model.eval().requires_grad_(False)
    config = dict(model.visual.preprocess_cfg)
    bias = getattr(model, "logit_bias", None)
    return Backbone(
        model=model if precision == "fp32" else _in_precision(model, recipe, precision),
        preprocess=image_transform_v2(PreprocessCfg(**config), is_train=False),
        tokenizer=tokenizer,
        identity={
            "name": name,
            "pretrained": _public_label(pretrained) or recipe.weights or name,
            "weights_sha256": weights_sha256(model.state_dict()),
            "open_clip_version": open_clip.__version__,
            "embed_dim": _embed_dim(model, tokenizer),
            "image_size": config["size"],
            "quick_gelu": any(isinstance(module, QuickGELU) for module in model.modules()),
        },
        preprocess_config=config,
        logit_scale=model.logit_scale.exp().item(),
        logit_bias=0.0 if bias is None else bias.item(),
        dtype=DTYPES[precision],
        assumption=recipe.assumption,
    )


def _create(recipe: _Recipe) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    if recipe.weights is None or not is_torchscript(Path(recipe.weights)):
        return open_clip.create_model(
            recipe.model_name,
            pretrained=recipe.weights,
            force_quick_gelu=recipe.quick_gelu,
            force_preprocess_cfg=dict(recipe.preparation),
            require_pretrained=True,
        )
    model = _create_empty(recipe, "fp32")
    weights = read_weights(Path(recipe.weights))
    for key in [key for key in weights if key.rpartition(".")[2] in NO_WEIGHTS]:
        del weights[key]
    model.load_state_dict(weights)
    return model


def _in_precision(
    model: open_clip.CLIP | open_clip.CustomTextCLIP, recipe: _Recipe, precision: Precision
) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    """The model in another precision. Its layers differ from those of float32, so it is built
    anew rather than converted."""
    other = _create_empty(recipe, precision)
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(False)


def _create_empty(recipe: _Recipe, precision: Precision) -> Any:
    """The model without its weights, which the caller fills in."""
    with _silent_open_clip():
        return open_clip.create_model(
            recipe.model_name,
            load_weights=False,
            pretrained_text=False,
            precision=precision,
            force_quick_gelu=recipe.quick_gelu,
            force_preprocess_cfg=dict(recipe.preparation),
        )


@contextmanager
def _silent_open_clip() -> Iterator[None]:
    """Without its warning that a model has no weights."""
    root = logging.getLogger()
    root.addFilter(_is_error)
    try:
        yield
    finally:
        root.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over all tensors by name: name, dtype, shape and bytes.

    It identifies the weights themselves, whatever file format they came in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _resolve(name: str, pretrained: str | None) -> _Recipe:
    if name == GLYPH_CLIP or name.startswith(SCHEMAS):
        if pretrained is not None:
            raise UserError(f"--backbone {name} brings its own weights; leave --pretrained out.")
        own = f"local-dir:{GLYPH_CLIP_FOLDER}" if name == GLYPH_CLIP else name
        return _Recipe(own, None, quick_gelu=False)
    if open_clip.get_model_config(name) is None:
        known = [GLYPH_CLIP, *open_clip.list_models()]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UserError(
            f"Unknown backbone {name!r}; near matches: {', '.join(near) or 'none'} "
            "(any open_clip name, local-dir:FOLDER or hf-hub:ORG/NAME works)."
        )
    architecture = _without_quickgelu(name)
    tags = sorted(
        {*list_pretrained_tags_by_model(architecture), *list_pretrained_tags_by_model(name)}
    )
    if pretrained is None:
        if "openai" not in tags:
            raise UserError(
                f"Name the weights of {name} with --pretrained: a local file or one of "
                f"{', '.join(tags) or '(open_clip has no tags for it)'}."
            )
        pretrained = "openai"
    if pretrained in tags:
        return _Recipe(architecture, pretrained, _tag_says_quick_gelu(architecture, pretrained))
    path = Path(pretrained)
    if path.is_dir():
        return _Recipe(f"local-dir:{path}", None, quick_gelu=False)
    if path.is_file():
        return _recipe_of_file(name, architecture, tags, path)
    raise UserError(
        f"--pretrained {pretrained!r} is neither a file nor a folder nor a tag of {name}; "
        f"its tags: {', '.join(tags) or 'none'}."
    )


def _recipe_of_file(name: str, architecture: str, tags: list[str], path: Path) -> _Recipe:
    """What is known about a file of weights: by its hash, by its form, by the architecture."""
    tag = _tag_of_file(architecture, tags, path)
    assumption = None
    if tag is not None:
        quick_gelu = _tag_says_quick_gelu(architecture, tag)
    else:
        quick_gelu = name.endswith(QUICKGELU) or is_torchscript(path)
        if not quick_gelu and open_clip.get_model_config(name + QUICKGELU) is not None:
            assumption = (
                f"{path.name} is not known by its hash and taken to use GELU; if it was trained "
                f"with QuickGELU, as OpenAI's models were, name the backbone {name}{QUICKGELU}."
            )
    published = [
        {key: config[key] for key in PREPARATION if key in config}
        for config in (_tag_config(architecture, t) for t in ([tag] if tag else tags))
    ]
    agreed = published[0] if published and all(p == published[0] for p in published) else {}
    return _Recipe(architecture, str(path), quick_gelu, agreed, assumption)


def _without_quickgelu(name: str) -> str:
    """The plain architecture of a `…-quickgelu` name, where open_clip has it."""
    plain = name.removesuffix(QUICKGELU)
    return plain if open_clip.get_model_config(plain) is not None else name


def _tag_config(architecture: str, tag: str) -> dict[str, Any]:
    return get_pretrained_cfg(architecture, tag) or get_pretrained_cfg(
        architecture + QUICKGELU, tag
    )


def _tag_says_quick_gelu(architecture: str, tag: str) -> bool:
    return bool(_tag_config(architecture, tag).get("quick_gelu", False))


def _tag_of_file(architecture: str, tags: list[str], path: Path) -> str | None:
    """The tag whose published SHA-256 (or its first digits) is the file's."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    for tag in tags:
        url = _tag_config(architecture, tag).get("url", "")
        published = re.findall(r"[0-9a-f]{8,64}(?=[/.])", url)
        if any(found.startswith(digits) for digits in published):
            return tag
    return None


def _tokenizer(model_name: str) -> Callable[..., torch.Tensor]:
    """open_clip's tokenizer for the model; a local folder may bring its own merges."""
    folder = Path(model_name.removeprefix("local-dir:"))
    merges = folder / BPE_FILE
    if not (model_name.startswith("local-dir:") and merges.is_file()):
        return open_clip.get_tokenizer(model_name)
    config = json.loads((folder / "open_clip_config.json").read_text())
    context_length = config["model_cfg"]["text_cfg"]["context_length"]
    return open_clip.SimpleTokenizer(bpe_path=str(merges), context_length=context_length)


@torch.inference_mode()
def _embed_dim(model: open_clip.CLIP, tokenizer: Callable[..., torch.Tensor]) -> int:
    return model.encode_text(tokenizer([""])).shape[-1]


def _public_label(pretrained: str | None) -> str | None:
    """A tag as it is, a path by its last part: folders of one machine mean nothing elsewhere."""
    return Path(pretrained).name if pretrained and Path(pretrained).exists() else pretrained


def _loading_failed(name: str, recipe: _Recipe, error: Exception) -> str:
    weights = Path(recipe.weights or "")
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"{weights.name or name} is damaged or holds Python code beside the weights, which is "
            "not run; give a .safetensors file or a saved state dict."
        )
    if isinstance(error, UnsafeArchive):
        return f"{weights.name} is a TorchScript archive that cannot be used: {error}."
    if isinstance(error, RuntimeError | OSError | ValueError | ImportError):
        reason = " ".join(str(error).split())[:200]
    else:
        reason = f"that holds no weights that open_clip can read ({error!r:.80})"
    if recipe.weights and not Path(recipe.weights).exists():
        return (
            f"The weights {recipe.weights!r} of {name} could not be downloaded ({reason}); "
            "on a machine without a network give a local file with --pretrained."
        )
    source = f" from {weights.name}" if weights.name else ""
    return f"The backbone {name} could not be loaded{source}: {reason}"
