"""The text tower beside a feature cache: CLIP's frozen text transformer as arrays.

A safetensors file whose tensors have the names and shapes of Flax (`array_shapes`), float32, and
whose header carries the configuration as JSON. With it the text side can be differentiated without
PyTorch and without a tokenizer.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clip_adapter import files
from clip_adapter.errors import Contradiction, UserError
from clip_adapter.records import Rule, between, from_document, from_json

FORMAT = "clip-text-tower"
FORMAT_VERSION = 1
SUFFIX = ".text_tower.safetensors"
TOKEN_EMBEDDING = "token_embedding/embedding"
LARGEST = (1 << 24) - 1  # of any number in the configuration
Count = Annotated[int, between(1, LARGEST)]
Token = Annotated[int, between(0, LARGEST)]
Tokens = tuple[Token, ...]


@dataclass(frozen=True)
class TextTowerConfig:
    """What the arrays do not say.

    embed_dim: D, the width of the features. activation: `gelu` is the exact one, `quick_gelu`
        x · sigmoid(1.702 x). epsilon: of the layer normalisations. projection: of the pooled token.
    pooling: the token whose output is the feature: `argmax` the largest id, `eos` the first that is
        end_id, `last` the last place. Attention is causal.
    start_id, end_id, pad_id: what the tokenizer puts around a text and behind it.
    sentences: for each class of the cache the token ids of `NAME.`, without start and end.
    name_lengths: how many of these are the name's, before the full stop (CoOp counts the tokens of
        the bare name; where a name ends in punctuation the two may have become one token).
    phrases: token ids of texts from which learned context may start.
    weights_sha256: of the backbone, as in the cache.
    """

    width: Count
    heads: Count
    layers: Count
    mlp_width: Count
    context_length: Count
    vocab_size: Count
    embed_dim: Count
    activation: Literal["gelu", "quick_gelu"]
    epsilon: Annotated[float, Rule("between 0 and 1", lambda value: 0 < value < 1)]
    pooling: Literal["argmax", "eos", "last"]
    projection: Literal["none", "linear", "linear_with_bias"]
    start_id: Token
    end_id: Token
    pad_id: Token
    sentences: tuple[Tokens, ...]
    name_lengths: Tokens
    phrases: Mapping[str, Tokens]
    weights_sha256: str


class TextTower(NamedTuple):
    """config; arrays: float32, by the names of `array_shapes`."""

    config: TextTowerConfig
    arrays: Mapping[str, npt.NDArray[np.float32]]


def tower_path(cache: Path) -> Path:
    """Where the tower of a cache is: `features.text_tower.safetensors` beside `features.h5`."""
    return cache.with_suffix(SUFFIX)


def array_shapes(config: TextTowerConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape. Those of the blocks have the layers as their first axis."""
    width, heads, layers, mlp = config.width, config.heads, config.layers, config.mlp_width
    head = width // heads
    shapes: dict[str, tuple[int, ...]] = {
        TOKEN_EMBEDDING: (config.vocab_size, width),
        "positional_embedding": (config.context_length, width),
        "ln_final/scale": (width,),
        "ln_final/bias": (width,),
        "blocks/attention/out/kernel": (layers, heads, head, width),
        "blocks/attention/out/bias": (layers, width),
        "blocks/c_fc/kernel": (layers, width, mlp),
        "blocks/c_fc/bias": (layers, mlp),
        "blocks/c_proj/kernel": (layers, mlp, width),
        "blocks/c_proj/bias": (layers, width),
    }
    for part in ("query", "key", "value"):
        shapes[f"blocks/attention/{part}/kernel"] = (layers, width, heads, head)
        shapes[f"blocks/attention/{part}/bias"] = (layers, heads, head)
    for norm in ("ln_1", "ln_2"):
        shapes[f"blocks/{norm}/scale"] = shapes[f"blocks/{norm}/bias"] = (layers, width)
    if config.projection != "none":
        shapes["text_projection/kernel"] = (width, config.embed_dim)
    if config.projection == "linear_with_bias":
        shapes["text_projection/bias"] = (config.embed_dim,)
    return shapes


def encode_text_tower(tower: TextTower) -> bytes:
    """The content of the file, the same bytes for the same tower."""
    # One entry: safetensors writes several in any order.
    header = {FORMAT: json.dumps({"format_version": FORMAT_VERSION, **asdict(tower.config)})}
    tensors = {name: np.ascontiguousarray(array) for name, array in tower.arrays.items()}
    return save(tensors, header)


def write_text_tower(path: Path, content: bytes) -> None:
    """Write what `encode_text_tower` gives, whole or not at all.

    Raises UserError where it cannot be written.
    """
    try:
        files.write_bytes(path, content)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error


def read_text_tower(path: Path, sha256: str | None = None) -> TextTower:
    """Read a tower; what it returns is complete, finite and of the shapes that it states.

    sha256: of the file, where the cache states one.
    Raises UserError for a file that is missing, foreign, newer, damaged or another one.
    """
    if not files.is_there(path):
        raise UserError(
            f"There is no text tower at {path}; `extract --with-text-tower` makes one, and it "
            "goes wherever the cache goes."
        )
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
        if digest != sha256:
            raise UserError(
                f"{path} is not the text tower that the cache was written with; "
                "extract again with --with-text-tower."
            )
        with safe_open(path, framework="np") as tensors:
            config = _config(path, tensors.metadata() or {})
            shapes = array_shapes(config)
            _check_names(path, tensors, shapes)
            return TextTower(config, {name: tensors.get_tensor(name) for name in shapes})
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise _unusable(path, "it is damaged or no safetensors file") from error


def _config(path: Path, header: Mapping[str, str]) -> TextTowerConfig:
    if FORMAT not in header:
        raise UserError(f"{path} is no text tower; `extract --with-text-tower` makes one.")
    try:
        stated = from_json(dict[str, Any], header[FORMAT], "its configuration")
        version = stated.pop("format_version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise UserError(
                f"{path} has another format version than {FORMAT_VERSION}, which this program "
                "reads; update clip-adapter or extract again with --with-text-tower."
            )
        config = from_document(TextTowerConfig, stated, "its configuration")
    except Contradiction as error:
        raise _unusable(path, str(error)) from error
    except UserError:
        raise
    except ValueError as error:
        raise _unusable(path, "its configuration is not JSON") from error
    _check_consistent(path, config)
    return config


def _check_consistent(path: Path, config: TextTowerConfig) -> None:
    """Raises UserError where what each value allows does not go together."""
    if config.width % config.heads:
        raise _unusable(path, "its heads do not divide its width")
    if config.projection == "none" and config.embed_dim != config.width:
        raise _unusable(path, "its features are of another width than its tokens")
    used = [config.start_id, config.end_id, config.pad_id]
    for tokens in (*config.sentences, *config.phrases.values()):
        used += tokens
    if max(used) >= config.vocab_size:
        raise _unusable(path, "it names tokens outside its vocabulary")
    lengths = [len(sentence) for sentence in config.sentences]
    if len(lengths) != len(config.name_lengths) or any(
        name > whole for name, whole in zip(config.name_lengths, lengths, strict=True)
    ):
        raise _unusable(path, "its class names and their lengths disagree")


def _check_names(path: Path, tensors: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the tensors are those of `shapes`, float32 and finite."""
    present = set(tensors.keys())
    if differing := sorted(present ^ shapes.keys()):
        raise _unusable(path, f"it lacks {differing[0]!r}, or has it for no reason")
    for name, shape in shapes.items():
        part = tensors.get_slice(name)
        if tuple(part.get_shape()) != shape or part.get_dtype() != "F32":
            raise _unusable(path, f"{name} is not {shape} float32")
        if not np.isfinite(tensors.get_tensor(name)).all():
            raise _unusable(path, f"{name} holds values that are not finite")


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be used: {reason}; extract again with --with-text-tower.")
