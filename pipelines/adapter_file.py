"""A fitted adapter on disk: `adapter.json`, which says what it is, and `adapter.safetensors`.

Neither file can execute anything; the JSON carries the SHA-256 of the arrays.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clip_adapter.cache import atomic
from clip_adapter.cache.errors import UserError

FORMAT = "clip-adapter"
FORMAT_VERSION = 1
WEIGHTS = "weights"


@dataclass(frozen=True)
class AdapterInfo:
    """What adapter.json states.

    setting: the hyper-parameters of `method`. backbone, preprocess, dataset: as in the cache.
    cache_sha256: the cache's content hash. fitted: shots, seed, selection rule and what it saw.
    """

    method: str
    setting: dict[str, Any]
    class_names: list[str]
    templates: list[str]
    logit_scale: float
    logit_bias: float
    backbone: dict[str, Any]
    preprocess: dict[str, Any]
    dataset: dict[str, Any]
    cache_sha256: str
    fitted: dict[str, Any]


@dataclass(frozen=True)
class SavedAdapter:
    """info; arrays: what was fitted; weights: (C, D), the zero-shot classifier weights."""

    info: AdapterInfo
    arrays: Mapping[str, npt.NDArray[Any]]
    weights: npt.NDArray[np.float32]


def save_adapter(folder: Path, adapter: SavedAdapter) -> None:
    """Write the two files into `folder`, the JSON last: an adapter without it is none."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**adapter.arrays, WEIGHTS: adapter.weights}
    content = save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    temporary = folder / "adapter.safetensors.new"
    temporary.write_bytes(content)
    temporary.replace(folder / "adapter.safetensors")
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "safetensors_sha256": hashlib.sha256(content).hexdigest(),
        **asdict(adapter.info),
    }
    atomic.write_text(folder / "adapter.json", json.dumps(document, indent=1))


def load_adapter(run: Path) -> SavedAdapter:
    """Read an adapter from its folder (or the path of one of its two files).

    Raises UserError for files that are missing, foreign, newer, damaged or changed.
    """
    folder = run.parent if run.is_file() else run
    info, stated_sha256 = _read_info(folder / "adapter.json")
    path = folder / "adapter.safetensors"
    try:
        content = path.read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged; fit the adapter again.") from error
    if hashlib.sha256(content).hexdigest() != stated_sha256:
        raise UserError(f"{path} was changed after adapter.json was written; fit it again.")
    weights = tensors.pop(WEIGHTS, None)
    if weights is None or weights.ndim != 2 or len(weights) != len(info.class_names):
        raise UserError(f"{path} does not hold the classifier weights of its classes.")
    return SavedAdapter(info, tensors, weights)


def _read_info(path: Path) -> tuple[AdapterInfo, str]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no adapter at {path.parent} (no adapter.json).") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON; fit the adapter again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} does not describe an adapter of clip-adapter.")
    if document.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {document.get('format_version')}, this program reads "
            f"version {FORMAT_VERSION}; update clip-adapter."
        )
    names = [field.name for field in fields(AdapterInfo)]
    missing = [name for name in [*names, "safetensors_sha256"] if name not in document]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; fit the adapter again.")
    return AdapterInfo(**{name: document[name] for name in names}), document["safetensors_sha256"]
