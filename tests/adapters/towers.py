"""Text towers of open_clip's, small ones, and CoOp's prompts through its modules in float64."""

from collections.abc import Sequence
from typing import Any

import open_clip
import torch

from clip_adapter.extract.backbones.loading import BPE_FILE, Backbone, load_backbone
from clip_adapter.extract.backbones.names import GLYPH_CLIP_FOLDER

NAMES = ("three", "zig-zagged (dog)", "one_two", "potholed", "a b c")
TEXT = {"context_length": 24, "vocab_size": 4514, "width": 32, "heads": 4, "layers": 2}
VISION = {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}


def backbone(*, custom_text: bool = False, quick_gelu: bool = False, **text: Any) -> Backbone:
    """A random model with the tokenizer of glyph-clip; no bias is 0 and no scale 1."""
    torch.manual_seed(0)
    make = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = make(24, VISION, {**TEXT, **text}, quick_gelu=quick_gelu).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape)
    merges = str(GLYPH_CLIP_FOLDER / BPE_FILE)
    return Backbone(
        model,
        preprocess=lambda image: torch.empty(0),
        tokenizer=open_clip.SimpleTokenizer(bpe_path=merges, context_length=24),
        identity={"name": "random", "weights_sha256": "0" * 64},
        preprocess_config={},
        logit_scale=100.0,
        logit_bias=0.0,
    )


def named(kind: str) -> Backbone:
    if kind == "glyph-clip":
        return load_backbone("glyph-clip")
    return backbone(quick_gelu=kind == "quick_gelu")


def coop_features(
    backbone: Backbone, names: Sequence[str], context: torch.Tensor, position: str
) -> torch.Tensor:
    """(C, D) float64: open_clip's modules on [start] … [end] with `context`, (M, E) or (C, M, E),
    put in the place of M placeholders."""
    model: Any = backbone.model
    count = context.shape[-2]
    texts = [" ".join(["x"] * count + [name.replace("_", " ") + "."]) for name in names]
    tokens = backbone.tokenizer(texts)
    embedded = model.token_embedding(tokens)
    rows = []
    for index, name in enumerate(names):
        own = context if context.ndim == 2 else context[index]
        length = int((backbone.tokenizer(name.replace("_", " ")) != 0).sum()) - 2
        start, word, rest = embedded[index].split(
            [1 + count, length, len(tokens[0]) - 1 - count - length]
        )
        half = {"end": count, "middle": count // 2, "front": 0}[position]
        rows.append(torch.cat([start[:1], own[:half], word, own[half:], rest]))
    x = torch.stack(rows) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    end = (
        tokens.argmax(dim=1) if model.text_pool_type == "argmax" else torch.full((len(names),), -1)
    )
    return x[torch.arange(len(names)), end] @ model.text_projection
