"""From the names that a person gives to what open_clip is asked for."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from clip_adapter.errors import UserError
from clip_adapter.extract.backbones.weights import is_torchscript
from clip_adapter.files import LFS_ADVICE, is_file, is_folder, is_lfs_pointer
from clip_adapter.words import near, quoted

GLYPH_CLIP = "glyph-clip"
GLYPH_CLIP_FOLDER = Path(__file__).parents[1] / "glyph_clip"
LOCAL = "local-dir:"
HUB = "hf-hub:"
QUICKGELU = "-quickgelu"
# How images were prepared in training, which is published with the tag and not in the weights.
PREPARATION = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Request:
    """How open_clip is asked: architecture or schema, weights (tag or file), activation.

    With a schema the model's own configuration holds weights and activation. `preparation`: the
    preprocessing that belongs to weights from a file, as far as it is known. `assumption`: a
    sentence on what the weights do not say and was taken for granted.
    """

    model_name: str
    weights: str | None
    quick_gelu: bool
    preparation: Mapping[str, Any] = field(default_factory=dict)
    assumption: str | None = None


def resolve(name: str, pretrained: str | None) -> Request:
    """How open_clip is asked for a backbone, by the names that `load_backbone` takes.

    Raises UserError for unknown names, with the near matches, and unknown tags.
    """
    if name == GLYPH_CLIP or name.startswith((LOCAL, HUB)):
        if pretrained is not None:
            raise UserError(f"--backbone {name} brings its own weights; leave --pretrained out.")
        own = f"{LOCAL}{GLYPH_CLIP_FOLDER}" if name == GLYPH_CLIP else name
        return Request(own, None, quick_gelu=False)
    if open_clip.get_model_config(name) is None:
        known = [GLYPH_CLIP, *open_clip.list_models()]
        raise UserError(
            f"Unknown backbone {quoted(name)}; {near(name, known)} "
            "(any open_clip name, local-dir:FOLDER or hf-hub:ORG/NAME works)."
        )
    architecture = _without_quickgelu(name)
    tags = _tags(name, architecture)
    if pretrained is None:
        if "openai" not in tags:
            raise UserError(
                f"Name the weights of {name} with --pretrained: a local file or one of "
                f"{', '.join(tags) or '(open_clip has no tags for it)'}."
            )
        pretrained = "openai"
    if pretrained in tags:
        return Request(
            architecture, pretrained, _tag_config(architecture, pretrained)["quick_gelu"]
        )
    path = Path(os.path.expanduser(pretrained))  # noqa: PTH111 - which raises nothing
    if is_folder(path):
        return Request(f"{LOCAL}{path}", None, quick_gelu=False)
    if is_file(path):
        if is_lfs_pointer(path):
            raise UserError(f"{path} {LFS_ADVICE}.")
        return _request_of_file(name, architecture, tags, path)
    raise UserError(
        f"--pretrained {quoted(pretrained)} is neither a file nor a folder nor a tag of {name}; "
        f"its tags: {', '.join(tags) or 'none'}."
    )


def _request_of_file(name: str, architecture: str, tags: list[str], path: Path) -> Request:
    """What is known about a file of weights: by its hash, by its form, by the architecture."""
    tag = _tag_of_file(architecture, tags, path)
    assumption = None
    if tag is not None:
        quick_gelu = _tag_config(architecture, tag)["quick_gelu"]
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
    return Request(architecture, str(path), quick_gelu, agreed, assumption)


def _without_quickgelu(name: str) -> str:
    """The plain architecture of a `…-quickgelu` name, where open_clip has it."""
    plain = name.removesuffix(QUICKGELU)
    return plain if open_clip.get_model_config(plain) is not None else name


def _tag_config(architecture: str, tag: str) -> dict[str, Any]:
    """What open_clip knows of a tag, and whether it says QuickGELU."""
    config = get_pretrained_cfg(architecture, tag) or get_pretrained_cfg(
        architecture + QUICKGELU, tag
    )
    return {"quick_gelu": False, **config}


def _tag_of_file(architecture: str, tags: list[str], path: Path) -> str | None:
    """The tag whose published SHA-256 (or its first digits) is the file's."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    for tag in tags:
        url = _tag_config(architecture, tag).get("url", "")
        published = re.findall(r"[0-9a-f]{8,64}(?=[/.])", url)
        if any(digest.startswith(digits) for digits in published):
            return tag
    return None


def is_published(name: str, pretrained: str) -> bool:
    """Whether it is glyph-clip, or a model of open_clip's with weights that it has a tag for.

    These are the only backbones that a received file may name: all others would be loaded from
    where the file says.
    """
    if name == GLYPH_CLIP:
        return pretrained == GLYPH_CLIP
    known = name in open_clip.list_models()
    return known and pretrained in _tags(name, _without_quickgelu(name))


def _tags(name: str, architecture: str) -> list[str]:
    """The tags of a name, and those of the plain architecture where it is another one."""
    return sorted(
        {*list_pretrained_tags_by_model(architecture), *list_pretrained_tags_by_model(name)}
    )
