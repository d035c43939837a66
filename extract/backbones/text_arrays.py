"""CLIP's text transformer out of open_clip, as arrays under their Flax names."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer
from torch import nn

from clip_adapter.cache.text_tower import TOKEN_EMBEDDING, TextTower, TextTowerConfig, array_shapes
from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.loading import Backbone
from clip_adapter.extract.text.prompts import prompts

PHRASES = ("a photo of a", "this is a photo of a", "a picture of a")
"""Texts from which learned context may start: CoOp's own first. Another one needs a tokenizer,
which fitting does not have."""

Tokenizer = Callable[..., torch.Tensor]
Arrays = dict[str, npt.NDArray[np.float32]]


def take_text_tower(backbone: Backbone, class_names: Sequence[str]) -> TextTower:
    """The tower and what the tokenizer says about the classes.

    backbone: in float32, in which the tower is stored.
    Raises UserError for a text encoder that is none of CLIP's causal transformers.
    """
    model = backbone.model
    text: Any = model if isinstance(model, CLIP) else getattr(model, "text", None)
    if not isinstance(text, CLIP | TextTransformer):
        raise _refused(backbone, "is no transformer of open_clip's own")
    if getattr(text, "cls_emb", None) is not None:
        raise _refused(backbone, "appends a class token, as CoCa does")
    if text.attn_mask is None:
        raise _refused(backbone, "reads its tokens without a causal mask")
    prefix = "text_" if isinstance(text, CLIP) else ""
    pooling = getattr(text, f"{prefix}pool_type")
    if pooling not in ("argmax", "eos", "last"):
        raise _refused(backbone, f"pools its tokens by {pooling!r}")
    start, end, pad = _special(backbone)
    if pooling == "eos" and getattr(text, f"{prefix}eos_id") != end:
        raise _refused(backbone, "waits for another end of the text than its tokenizer writes")
    blocks = list(text.transformer.resblocks)
    norms = [text.ln_final, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))]
    if not all(map(_is_plain, blocks)) or len({norm.eps for norm in norms}) > 1:
        raise _refused(backbone, "has blocks of its own kind")
    sentences, name_lengths = _named(backbone.tokenizer, class_names)
    arrays = {
        TOKEN_EMBEDDING: _array(text.token_embedding.weight),
        "positional_embedding": _array(text.positional_embedding),
        **_stacked("ln_final", [text.ln_final]),
        **_of_blocks(blocks),
        **_of_projection(text.text_projection),
    }
    vocab_size, width = arrays[TOKEN_EMBEDDING].shape
    kernel = arrays.get("text_projection/kernel")
    bias = "text_projection/bias" in arrays
    config = TextTowerConfig(
        width=width,
        heads=blocks[0].attn.num_heads,
        layers=len(blocks),
        mlp_width=blocks[0].mlp.c_fc.out_features,
        context_length=len(arrays["positional_embedding"]),
        vocab_size=vocab_size,
        embed_dim=width if kernel is None else kernel.shape[1],
        activation=_activation(blocks[0]) or "gelu",
        epsilon=text.ln_final.eps,
        pooling=pooling,
        projection="none" if kernel is None else "linear_with_bias" if bias else "linear",
        start_id=start,
        end_id=end,
        pad_id=pad,
        sentences=sentences,
        name_lengths=name_lengths,
        phrases={phrase: _bare(backbone.tokenizer, [phrase])[0] for phrase in PHRASES},
        weights_sha256=backbone.identity["weights_sha256"],
    )
    shapes = array_shapes(config)  # Flax has an axis of its own for the heads
    return TextTower(config, {name: arrays[name].reshape(shapes[name]) for name in arrays})


def _refused(backbone: Backbone, reason: str) -> UserError:
    return UserError(
        f"The text encoder of {backbone.identity['name']} {reason}, so that no learned context can "
        "be put into it here; leave out --with-text-tower."
    )


def _special(backbone: Backbone) -> tuple[int, int, int]:
    """The ids that stand before a text, behind it, and behind that.

    Raises UserError for a tokenizer that does not mark where a text starts and ends.
    """
    tokenizer = backbone.tokenizer
    (empty, word) = tokenizer(["", "a"]).tolist()
    start, end, pad = empty[:3]
    marks = len({start, end, pad}) == 3 and set(empty[2:]) == {pad}
    if not marks or word[0] != start or word.count(end) != 1:
        raise _refused(backbone, "has a tokenizer that does not mark where a text starts and ends")
    return start, end, pad


def _bare(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The token ids of texts, whole, without what marks start and end."""
    # No token is less than a byte, and lower case may be longer than upper case.
    length = 2 + 2 * max(len(text.encode()) for text in texts)
    rows = tokenizer(["", *texts], length).tolist()
    end = rows[0][1]
    return [tuple(row[1 : row.index(end)]) for row in rows[1:]]


def _named(
    tokenizer: Tokenizer, class_names: Sequence[str]
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """The tokens of `NAME.` of each class, and how many are the name's (see TextTowerConfig)."""
    sentences = _bare(tokenizer, [prompts(name, ["{}."])[0] for name in class_names])
    names = _bare(tokenizer, [prompts(name, ["{}"])[0] for name in class_names])
    lengths = (
        min(len(name), len(sentence)) for name, sentence in zip(names, sentences, strict=True)
    )
    return tuple(sentences), tuple(lengths)


def _is_plain(block: nn.Module) -> bool:
    """Whether it is CLIP's block, without layer scales, other activations and the like."""
    return (
        isinstance(block, ResidualAttentionBlock)
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.ls_2, nn.Identity)
        and not hasattr(block, "ln_1_kv")
        and _activation(block) is not None
    )


def _activation(block: Any) -> Literal["gelu", "quick_gelu"] | None:
    activation = block.mlp.gelu
    if isinstance(activation, QuickGELU):
        return "quick_gelu"
    is_exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
    return "gelu" if is_exact else None


def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy()


def _stacked(name: str, layers: Sequence[Any]) -> Arrays:
    """Weights and biases of normalisations, or of linear maps: PyTorch multiplies with the
    transposed weight, Flax with the kernel."""
    weights = [_array(layer.weight) for layer in layers]
    part = "scale" if weights[0].ndim == 1 else "kernel"
    return {
        f"{name}/{part}": np.stack([weight.T for weight in weights]),
        f"{name}/bias": np.stack([_array(layer.bias) for layer in layers]),
    }


def _of_blocks(blocks: Sequence[Any]) -> Arrays:
    arrays = {
        **_stacked("blocks/ln_1", [block.ln_1 for block in blocks]),
        **_stacked("blocks/ln_2", [block.ln_2 for block in blocks]),
        **_stacked("blocks/c_fc", [block.mlp.c_fc for block in blocks]),
        **_stacked("blocks/c_proj", [block.mlp.c_proj for block in blocks]),
        **_stacked("blocks/attention/out", [block.attn.out_proj for block in blocks]),
    }
    for index, part in enumerate(("query", "key", "value")):
        thirds = [
            SimpleNamespace(
                weight=block.attn.in_proj_weight.chunk(3)[index],
                bias=block.attn.in_proj_bias.chunk(3)[index],
            )
            for block in blocks
        ]
        arrays |= _stacked(f"blocks/attention/{part}", thirds)
    return arrays


def _of_projection(projection: nn.Linear | torch.Tensor | None) -> Arrays:
    if projection is None:
        return {}
    if not isinstance(projection, nn.Linear):
        return {"text_projection/kernel": _array(projection)}
    arrays = {"text_projection/kernel": _array(projection.weight).T}
    if projection.bias is not None:
        arrays["text_projection/bias"] = _array(projection.bias)
    return arrays
