"""What a cache says of itself, and whether that is what FORMAT.md asks for."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, TypedDict

from clip_adapter import files
from clip_adapter.cache import schema
from clip_adapter.errors import Contradiction
from clip_adapter.records import Rule, between, from_document

MOST_PARTS = 999_999
Count = Annotated[int, between(1, 2**31 - 1)]
Place = Annotated[int, between(0, 2**48)]
Sha256 = Annotated[str, Rule("that is a SHA-256", re.compile("[0-9a-f]{64}").fullmatch)]


class Backbone(TypedDict):
    """The encoder; whatever else is stated is kept."""

    name: str
    pretrained: str
    weights_sha256: Sha256
    embed_dim: Count
    image_size: Count | Annotated[list[Count], Rule("of two", lambda size: len(size) == 2)]
    quick_gelu: bool


class Backbone2(TypedDict):
    """The second encoder, with its own evaluation preprocessing; whatever else is stated is
    kept."""

    name: str
    pretrained: str
    weights_sha256: Sha256
    embed_dim: Count
    image_size: Count | Annotated[list[Count], Rule("of two", lambda size: len(size) == 2)]
    preprocess: dict[str, Any]


class DataSet(TypedDict):
    """The data set; whatever else is stated is kept."""

    name: str
    source: str
    splits: dict[str, str]


@dataclass(frozen=True)
class Part:
    """Which part of a cache a file holds.

    index: from 1 to `of`; the first one has the text features. rows: for each split of the data
    set the first row of the part, the row behind its last, and how many rows the split has.
    """

    index: Count
    of: Annotated[int, between(1, MOST_PARTS)]
    rows: Mapping[str, tuple[Place, Place, Place]]

    def __post_init__(self) -> None:
        ordered = all(start <= stop <= total for start, stop, total in self.rows.values())
        if self.index > self.of or not ordered or not self.rows.keys() <= set(schema.ALL_SPLITS):
            raise Contradiction("part is not a part of a cache")


@dataclass(frozen=True)
class Metadata:
    """The names and meanings are those of FORMAT.md. part, templates: of a part of a cache only."""

    created_at: str
    writer: str
    backbone: Backbone
    preprocess: dict[str, Any]
    dataset: DataSet
    logit_scale: Annotated[float, between(schema.SMALLEST_SCALE, schema.LARGEST_SCALE)]
    logit_bias: Annotated[float, between(-schema.LARGEST_BIAS, schema.LARGEST_BIAS)]
    datasets_sha256: dict[str, Sha256]
    arguments: dict[str, Any] = field(default_factory=dict)
    content_sha256: Sha256 | None = None
    part: Part | None = None
    templates: Annotated[list[str], Rule("that is not empty", bool)] | None = None
    backbone2: Backbone2 | None = None
    format_version: int = schema.FORMAT_VERSION

    def document(self) -> dict[str, Any]:
        """The JSON object that the file holds."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        name = schema.FORMAT if self.part is None else schema.PART_FORMAT
        return {"format": name, "complete": True, **own}


def encode(metadata: Metadata) -> tuple[bytes, str]:
    """The bytes of the metadata and their SHA-256.

    Raises ValueError or TypeError for what JSON cannot say.
    """
    text = json.dumps(metadata.document(), sort_keys=True, allow_nan=False).encode()
    return text, hashlib.sha256(text).hexdigest()


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object of Unicode strings and finite numbers. Raises Contradiction for others."""
    try:
        document = files.parse_json(text, parse_constant=_no_number)
        json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate could not be printed
    except (ValueError, RecursionError, TypeError) as error:
        raise Contradiction("is not a JSON object") from error
    if not isinstance(document, dict):
        raise Contradiction("is not a JSON object")
    return document


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse(document: Mapping[str, Any]) -> Metadata:
    """The metadata that a JSON object holds; names that the format does not know are left out.

    Raises Contradiction where something is missing or of another type.
    """
    if document.get("complete") is not True:
        raise Contradiction("it is incomplete (not marked as complete)")
    of_parts = {"part", "templates"}
    known = {item.name for item in fields(Metadata)}
    if document["format"] != schema.PART_FORMAT:
        known -= of_parts
    elif missing := sorted(of_parts - document.keys()):
        raise Contradiction(f"it lacks {', '.join(missing)}")
    stated = {name: value for name, value in document.items() if name in known}
    return from_document(Metadata, stated)
