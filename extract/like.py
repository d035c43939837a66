"""What images without labels take of a cache: its classes and prompts, its backbone."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clip_adapter.errors import UserError
from clip_adapter.words import quoted

if TYPE_CHECKING:
    from clip_adapter.cache.reader import FeatureCache

Decode = Literal["full", "fast"]
OF_CLASSES = ("text/features", "text/class_names", "text/templates", "text/prompts")


def _opened(path: Path) -> "FeatureCache":
    from clip_adapter.cache.reader import FeatureCache  # imports h5py, which --help can do without

    return FeatureCache(path)


def class_names_of(path: Path) -> list[str]:
    with _opened(path) as cache:
        return cache.class_names


def text_sha256(path: Path) -> str:
    """Of its classes, their prompts and the features of these."""
    with _opened(path) as cache:
        stated = [[name, cache.metadata.datasets_sha256.get(name)] for name in OF_CLASSES]
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()


def has_projection(path: Path) -> bool:
    with _opened(path) as cache:
        return cache.has("projection")


def decode_of(path: Path, decode: Decode) -> Decode:
    """How its images were decoded. Raises UserError where `fast` is asked for and they were not."""
    with _opened(path) as cache:
        own: Decode = "fast" if cache.preprocess.get("decode") == "fast" else "full"
    if own != decode != "full":
        raise UserError(f"--like {path}: that was made without --decode {decode}; leave it out.")
    return own


def backbone_of(path: Path, pretrained: str | None) -> tuple[str, str | None]:
    """Its name and weights, as `load_backbone` takes them.

    pretrained: where the weights lie, if somebody said so.
    Raises UserError for weights that nobody names but the cache, and that open_clip does not know.
    """
    with _opened(path) as cache:
        name, weights = cache.backbone["name"], cache.backbone["pretrained"]
    if pretrained is not None:
        return name, pretrained
    from clip_adapter.extract.backbones.names import GLYPH_CLIP, is_published

    if not is_published(name, weights):
        raise UserError(
            f"{path} was made with {quoted(name)} and the weights {quoted(weights)}, which is no "
            "model and tag of open_clip's; name the backbone with --backbone, and with "
            "--pretrained where its weights lie."
        )
    return name, None if name == GLYPH_CLIP else weights
