"""What a cache says of itself, and whether that is what FORMAT.md asks for."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from clip_adapter import files
from clip_adapter.cache import schema
from clip_adapter.errors import Contradiction
from clip_adapter.words import quoted

MOST_PARTS = 999_999
SCALE_WORDS = f"a positive number from {schema.SMALLEST_SCALE:g} to {schema.LARGEST_SCALE:g}"
BIAS_WORDS = f"a finite number from −{schema.LARGEST_BIAS:g} to {schema.LARGEST_BIAS:g}"


@dataclass(frozen=True)
class Part:
    """Which part of a cache a file holds.

    index: from 1 to `of`; the first one has the text features. rows: for each split of the data
    set the first row of the part, the row behind its last, and how many rows the split has.
    """

    index: int
    of: int
    rows: Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Metadata:
    """The names and meanings are those of FORMAT.md. part, templates: of a part of a cache only."""

    created_at: str
    writer: str
    backbone: dict[str, Any]
    preprocess: dict[str, Any]
    dataset: dict[str, Any]
    logit_scale: float
    logit_bias: float
    arguments: dict[str, Any] = field(default_factory=dict)
    content_sha256: str | None = None
    datasets_sha256: dict[str, str] = field(default_factory=dict)
    part: Part | None = None
    templates: list[str] | None = None
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
    """The metadata that a JSON object holds. Raises Contradiction where something is missing or of
    another type; names that the format does not know are left out."""
    if document.get("complete") is not True:
        raise Contradiction("it is incomplete (not marked as complete)")
    _check(document, "", _REQUIRED)
    _check(document, "", {name: fits for name, fits in _OPTIONAL.items() if name in document})
    _check(document["backbone"], "backbone.", _BACKBONE)
    _check(document["dataset"], "dataset.", _DATASET)
    known = {item.name for item in fields(Metadata)}
    stated = {name: value for name, value in document.items() if name in known}
    for name in ("logit_scale", "logit_bias"):
        stated[name] = float(stated[name])
    if document["format"] == schema.PART_FORMAT:
        _check(document, "", _OF_PARTS)
        part = document["part"]
        stated["part"] = Part(part["index"], part["of"], part["rows"])
    else:
        stated |= {"part": None, "templates": None}
    return Metadata(**stated)


def _check(stated: Mapping[str, Any], prefix: str, wanted: Mapping[str, tuple]) -> None:
    missing = [name for name in wanted if name not in stated]
    if missing:
        names = ", ".join(prefix + name for name in missing)
        raise Contradiction(f"it is incomplete ({names} missing in its metadata)")
    for name, (words, fits) in wanted.items():
        if not fits(stated[name]):
            raise Contradiction(f"{prefix}{name} is {quoted(stated[name])}, not {words}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_integer(value: object, least: int = 1, most: int = 2**31 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_bias(value: Any) -> bool:
    return _is_number(value) and abs(value) <= schema.LARGEST_BIAS


def is_scale(value: Any) -> bool:
    return _is_number(value) and schema.SMALLEST_SCALE <= value <= schema.LARGEST_SCALE


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_image_size(value: Any) -> bool:
    both = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(map(_is_integer, both))


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _are_sha256(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_sha256, value.values()))


def _are_origins(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_part(value: Any) -> bool:
    """Part `index` of `of`; rows: start, stop, total of splits."""
    if not isinstance(value, dict) or not isinstance(value.get("rows"), dict):
        return False
    index, of, rows = value.get("index"), value.get("of", 0), value["rows"]
    if not (_is_integer(of, 1, MOST_PARTS) and _is_integer(index, 1, of)):
        return False
    return rows.keys() <= set(schema.SPLITS) and all(map(_is_range, rows.values()))


def _is_range(value: Any) -> bool:
    counts = isinstance(value, list) and len(value) == 3
    return (
        counts
        and all(_is_integer(one, 0, 2**48) for one in value)
        and (value[0] <= value[1] <= value[2])
    )


_Checks = dict[str, tuple[str, Callable[[Any], bool]]]
_TEXT, _OBJECT = ("a string", _is_text), ("a JSON object", _is_object)
_REQUIRED: _Checks = {
    "created_at": _TEXT,
    "writer": _TEXT,
    "backbone": _OBJECT,
    "preprocess": _OBJECT,
    "dataset": _OBJECT,
    "logit_scale": (SCALE_WORDS, is_scale),
    "logit_bias": (BIAS_WORDS, is_bias),
    "datasets_sha256": ("an object of SHA-256 sums", _are_sha256),
}
_OPTIONAL: _Checks = {
    "arguments": _OBJECT,
    "content_sha256": ("a SHA-256", is_sha256),
}
_BACKBONE: _Checks = {
    "name": _TEXT,
    "pretrained": _TEXT,
    "weights_sha256": ("a SHA-256", is_sha256),
    "embed_dim": ("a positive integer", _is_integer),
    "image_size": ("one or two positive integers", _is_image_size),
    "quick_gelu": ("true or false", lambda value: isinstance(value, bool)),
}
_DATASET: _Checks = {
    "name": _TEXT,
    "source": _TEXT,
    "splits": ("an object of strings", _are_origins),
}
_OF_PARTS: _Checks = {
    "part": ("a part of a cache", _is_part),
    "templates": ("a list of strings", _are_texts),
}
