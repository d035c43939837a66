"""A fitted adapter on disk: `adapter.json`, which says what it is, and `adapter.safetensors`.

Neither file can execute anything. The JSON carries the SHA-256 of the arrays and of its own
content, so that a change to either file is noticed.
"""

import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from clip_adapter import files
from clip_adapter.adapters.decisions import Decisions, probabilities
from clip_adapter.adapters.method import Head, Method
from clip_adapter.adapters.registry import find_method
from clip_adapter.adapters.stata import Refinement, refined_logits
from clip_adapter.cache.metadata import Backbone2
from clip_adapter.cache.schema import LARGEST_BIAS, LARGEST_SCALE, SMALLEST_SCALE
from clip_adapter.errors import Contradiction, UserError
from clip_adapter.pipelines.saved.adapter_check import INFO_FILE, WEIGHTS, checked_arrays
from clip_adapter.pipelines.saved.arrays_file import read_tensors, with_labels
from clip_adapter.pipelines.saved.stored_decisions import (
    DECISIONS,
    PLACE,
    arrays_of,
    checked_decisions,
    stated,
)
from clip_adapter.records import Rule, between, from_document

FORMAT = "clip-adapter"
FORMAT_VERSION = 2
# Of a file with decisions: readers of version 2 would call their arrays foreign.
DECIDING_VERSION = 3
ARRAYS_FILE = "adapter.safetensors"
# Before the names of what was fitted, which may be called as what else is there.
FITTED = "fitted/"
# Before the names of what images without labels made of it, where some have refined it.
REFINED = "refinement/"
# Hashes of the images that fitted or chose it; files of before they were kept have none.
SEEN = "seen"
DOCUMENT_MAX = 1 << 25  # bytes: the names of 21,000 classes take 1 << 19
ARRAYS_SHA256 = "safetensors_sha256"
OWN_SHA256 = "sha256"


NOT_EMPTY = Rule("that is not empty", bool)


@dataclass(frozen=True)
class AdapterInfo:
    """What adapter.json states.

    setting: the hyper-parameters of `method`. backbone, preprocess, dataset: as in the cache.
    cache_sha256: the cache's content hash. fitted: shots, seed, selection rule and what it saw.
    backbone2: as in the cache, of an adapter that takes features of a second encoder, too.
    """

    method: str
    setting: dict[str, Any]
    class_names: Annotated[list[str], NOT_EMPTY]
    templates: Annotated[list[str], NOT_EMPTY]
    logit_scale: Annotated[float, between(SMALLEST_SCALE, LARGEST_SCALE)]
    logit_bias: Annotated[float, between(-LARGEST_BIAS, LARGEST_BIAS)]
    backbone: dict[str, Any]
    preprocess: dict[str, Any]
    dataset: dict[str, Any]
    cache_sha256: str
    fitted: dict[str, Any]
    backbone2: Backbone2 | None = None

    def document(self) -> dict[str, Any]:
        """As adapter.json states it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class SavedAdapter:
    """info; arrays: what was fitted, float32; weights: (C, D) float32, the zero-shot classifier
    weights. seen: `image_hashes` of what fitted, chose or refined it, in any order; None where the
    file does not say. refinement: None where no images without labels refined it. decisions: None
    where no images were held out to judge it, and in files of before there were any."""

    info: AdapterInfo
    arrays: Mapping[str, npt.NDArray[Any]]
    weights: npt.NDArray[np.float32]
    seen: npt.NDArray[np.uint64] | None = None
    refinement: Refinement | None = None
    decisions: Decisions | None = None

    @property
    def method(self) -> Method:
        return find_method(self.info.method)

    @property
    def head(self) -> Head:
        scale, bias = np.float32(self.info.logit_scale), np.float32(self.info.logit_bias)
        return Head(self.weights, scale, bias)

    def logits(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(N, C) of features as the method takes them: (N, D), or (N, F) of what comes before the
        backbone's projection, or (N, D + E) with those of the second encoder behind."""
        logits = self.method.logits(np, self.arrays, self.info.setting, features, self.head)
        if self.refinement:
            logits = refined_logits(np, self.refinement, logits, features)
        return np.asarray(logits, np.float32)

    def probabilities(self, logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """(N, C) of logits (N, C): their softmax at the temperature that is known, else at 1."""
        return probabilities(logits, self.decisions.temperature if self.decisions else 1.0)

    def has_seen(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """(N,): whether it was fitted or chosen on the images of which these are `image_hashes`."""
        if self.seen is None:
            return np.zeros(len(hashes), np.bool_)
        known: npt.NDArray[np.bool_] = np.isin(hashes, self.seen)
        return np.any(known, axis=1)


def image_hashes(
    features: npt.NDArray[np.float32], digests: npt.NDArray[np.uint64] | None
) -> npt.NDArray[np.uint64]:
    """(N, 1 or 2): by which N images are known again, also in another cache or in a folder.

    features: (N, D), of view 0. digests: (N,), of the pixels that were encoded, where they are
    known; another device or number type makes other features of the same pixels.
    """
    from clip_adapter.cache.hdf5 import row_hashes  # h5py, which predicting does without

    found = [row_hashes(features), *([] if digests is None else [digests])]
    return np.stack(found, axis=1)


def save_adapter(folder: Path, adapter: SavedAdapter) -> None:
    """Write the two files into `folder`, the JSON last: an adapter without it is none."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {FITTED + name: array for name, array in adapter.arrays.items()}
    tensors[WEIGHTS] = adapter.weights
    if adapter.refinement:
        tensors |= {REFINED + name: own for name, own in adapter.refinement._asdict().items()}
    if adapter.decisions:
        tensors |= arrays_of(adapter.decisions)
    if adapter.seen is not None:
        tensors[SEEN] = adapter.seen
    content = save({name: np.asarray(array, order="C") for name, array in tensors.items()})
    files.write_bytes(folder / ARRAYS_FILE, content)
    document = {
        "format": FORMAT,
        "format_version": DECIDING_VERSION if adapter.decisions else FORMAT_VERSION,
        ARRAYS_SHA256: hashlib.sha256(content).hexdigest(),
        **adapter.info.document(),
    }
    if adapter.decisions:
        document[DECISIONS] = stated(adapter.decisions)
    document = json.loads(json.dumps(document))
    document[OWN_SHA256] = document_sha256(document)
    files.write_text(folder / INFO_FILE, json.dumps(document, indent=1))


def document_sha256(document: Mapping[str, Any]) -> str:
    """SHA-256 of the document without its own hash, as JSON with sorted keys."""
    content = {name: value for name, value in document.items() if name != OWN_SHA256}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def know_method(name: str | None) -> None:
    """Import `MODULE:NAME`, so that its method is known by the name that adapters state.

    Nothing but the user's own word imports a module: an adapter that names one is refused.
    Raises UserError where there is no such method.
    """
    if name is None:
        return
    try:
        find_method(name)
    except LookupError as error:
        raise UserError(f"--method: {error}.").with_notes_of(error) from None


def load_adapter(run: str | Path, method: str | None = None) -> SavedAdapter:
    """Read an adapter from its folder (or the path of one of its two files).

    method: MODULE:NAME of its method, where that is one of the user's own.

    Whatever it returns can be used: types, ranges, names, shapes and values are checked against
    each other. Raises UserError for files that are missing, foreign, newer, damaged or changed.

    Examples:
        >>> from clip_adapter import FeatureCache, load_adapter
        >>> adapter = load_adapter("runs/first")
        >>> adapter.info.method, adapter.weights.shape
        ('clip-adapter', (10, 128))
        >>> with FeatureCache("features.h5") as cache:
        ...     features = cache.features("test", range(3))[0]
        >>> adapter.logits(features).shape
        (3, 10)
    """
    know_method(method)
    run = Path(run)
    if run.name in (INFO_FILE, ARRAYS_FILE):
        run = run.parent
    document = _read_document(run / INFO_FILE)
    info = _checked_info(run / INFO_FILE, document)
    path = run / ARRAYS_FILE
    tensors = read_tensors(path, document[ARRAYS_SHA256])
    weights, seen = tensors.pop(WEIGHTS, None), tensors.pop(SEEN, None)
    if seen is not None and (seen.ndim != 1 or seen.dtype != np.uint64):
        raise UserError(f"{path}: {SEEN} holds no hashes of images; fit the adapter again.")
    refining = {name: tensors.pop(name) for name in [*tensors] if name.startswith(REFINED)}
    decides = document["format_version"] == DECIDING_VERSION
    deciding = {
        name: tensors.pop(name) for name in [*tensors] if decides and name.startswith(PLACE)
    }
    arrays = {name.removeprefix(FITTED): tensor for name, tensor in tensors.items()}
    if len(arrays) < len(tensors):
        raise UserError(f"{path} holds two arrays of one name; fit the adapter again.")
    if "labels" in _method(info.method).shapes:
        arrays = with_labels(arrays, len(info.class_names))
    named = {name.removeprefix(REFINED): own for name, own in refining.items()}
    weights, refinement = checked_arrays(path, info, _method(info.method), weights, arrays, named)
    decisions = checked_decisions(path, document, deciding, weights) if decides else None
    return SavedAdapter(info, arrays, weights, seen, refinement, decisions)


def adapter_sha256(run: Path) -> str:
    """Of its adapter.json, which carries the arrays' own. run: as `load_adapter` takes it."""
    folder = run.parent if run.name in (INFO_FILE, ARRAYS_FILE) else run
    return hashlib.sha256(files.read_bytes(folder / INFO_FILE, DOCUMENT_MAX)).hexdigest()


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = files.parse_json(files.read_text(path, DOCUMENT_MAX))
    except (FileNotFoundError, NotADirectoryError):
        within = path.parent / "adapters"  # of a run where nothing chose, or that was interrupted
        where = f"; name one of those in {within}" if within.is_dir() else ""
        raise UserError(f"There is no adapter at {path.parent} (no {INFO_FILE}){where}.") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON; fit the adapter again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} does not describe an adapter of clip-adapter.")
    version = document.get("format_version")
    if type(version) is not int or version not in (FORMAT_VERSION, DECIDING_VERSION):
        raise UserError(
            f"{path} has format version {reprlib.repr(version)}, this program reads versions "
            f"{FORMAT_VERSION} and {DECIDING_VERSION}; update clip-adapter or fit the adapter "
            "again."
        )
    names = [field.name for field in fields(AdapterInfo) if field.default is MISSING]
    names += [ARRAYS_SHA256, OWN_SHA256]
    names += [DECISIONS] * (version == DECIDING_VERSION)
    missing = [name for name in names if name not in document]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; fit the adapter again.")
    if document[OWN_SHA256] != document_sha256(document):
        raise UserError(f"{path} was changed after it was written; fit the adapter again.")
    return document


def _checked_info(path: Path, document: Mapping[str, Any]) -> AdapterInfo:
    names = [field.name for field in fields(AdapterInfo)]
    stated = {name: document[name] for name in names if name in document}
    try:
        info = from_document(AdapterInfo, stated)
    except Contradiction as error:
        raise UserError(f"{path}: {error}.") from None
    try:
        setting = _method(info.method).checked(info.setting)
    except ValueError as error:
        raise UserError(f"{path} describes no adapter that can be used: {error}.") from error
    return replace(info, setting=setting)


def _method(name: str) -> Method:
    # A file may name what is installed, and have nothing imported that the user did not name.
    if ":" in name:
        raise ValueError(f"{name!r:.80} is no name of a method")
    try:
        return find_method(name)
    except LookupError as error:
        raise ValueError(str(error)) from None
