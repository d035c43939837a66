"""`inspect`: what is in a cache or an adapter, on one screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.schema import HASHES, UNLABELLED
from clip_adapter.cache.stored_file import other_content
from clip_adapter.errors import UserError
from clip_adapter.files import is_there
from clip_adapter.pipelines.console.argument_types import Positional
from clip_adapter.pipelines.console.running import run_command
from clip_adapter.pipelines.saved.adapter_file import (
    ARRAYS_FILE,
    INFO_FILE,
    SavedAdapter,
    load_adapter,
)
from clip_adapter.pipelines.saved.stored_decisions import stated
from clip_adapter.words import counted, printable, shortened, size, some

FIRST_CLASSES = 5
FIRST_TEMPLATES = 2

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class InspectConfig:
    """Say what is in a feature cache or a fitted adapter, on one screen.

    Attributes:
        file: Feature cache, run folder, adapter.json or adapter.safetensors.
        method: MODULE:NAME of the adapter's method, where that is one of your own.
    """

    file: Positional[Path]
    method: str | None = None


def inspect(config: InspectConfig) -> Facts:
    """(name, value) pairs that describe the file, in reading order.

    A cache is read whole and held against every hash that it states. Raises UserError for a file
    that is missing or neither a cache nor an adapter, or that `FeatureCache` or `load_adapter`
    refuses.
    """
    path = config.file
    if not is_there(path):
        raise UserError(f"{path} does not exist; name a feature cache or a run folder.")
    if path.is_dir() or path.name in (INFO_FILE, ARRAYS_FILE):
        return _adapter_facts(path, load_adapter(path, config.method))
    if not h5py.is_hdf5(path):
        other = other_content(path)
        raise UserError(
            f"{path} is {f'{other}, ' if other else ''}neither a feature cache nor an adapter (a "
            f"run folder, {INFO_FILE} or {ARRAYS_FILE}){'' if other else ', or it is damaged'}."
        )
    with FeatureCache(path) as cache:
        cache.verify()
        return _cache_facts(cache)


def _cache_facts(cache: FeatureCache) -> Facts:
    metadata = cache.metadata
    dtype = cache.dtype_of("text/features")
    facts = [
        ("file", f"{cache.path}, {size(cache.path.stat().st_size)}"),
        ("what", f"feature cache, format version {metadata.format_version}"),
        ("made by", f"{metadata.writer}, {metadata.created_at}"),
        ("content", f"SHA-256 {cache.content_sha256}, {_verified(cache)}"),
    ]
    facts += [(f"images/{split}", _split_words(cache, split)) for split in cache.all_splits]
    facts += [
        ("text", f"{len(cache.class_names)} classes × {len(cache.templates)} templates, {dtype}"),
        *_origin_facts(cache.class_names, cache.templates, cache.backbone, cache.preprocess),
        *_second_facts(cache.backbone2),
        ("data set", _words(cache.dataset)),
        ("logits", _logit_words(cache.logit_scale, cache.logit_bias)),
    ]
    return facts


def _verified(cache: FeatureCache) -> str:
    """What `verify` could hold the features against."""
    by_row = all(cache.has_dataset(f"images/{s}/features{HASHES}") for s in cache.all_splits)
    stated = cache.metadata.content_sha256 is not None
    kinds = [kind for kind, there in (("as a whole", stated), ("row by row", by_row)) if there]
    return f"verified {' and '.join(kinds)}" if kinds else "computed: the file states none"


def _split_words(cache: FeatureCache, split: str) -> str:
    views, rows, dim = cache.shape(split)
    groups = cache.groups(split)
    grouped = f" in {counted(len(set(groups)), 'group')}" if groups else ""
    if split == UNLABELLED:
        return f"{rows} images{grouped}, width {dim}"
    counts = np.bincount(cache.labels(split), minlength=len(cache.class_names))
    each = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()}–{counts.max()}"
    one = ", all of one class" if len(counts) > 1 == np.count_nonzero(counts) else ""
    absent = [cache.class_names[label] for label in np.flatnonzero(counts == 0).tolist()]
    if absent and not one:
        one = f" (none of {some(absent)})"
    views_words = f", {views} views" if views > 1 else ""
    return f"{rows} images{grouped}, {each} per class{one}, width {dim}{views_words}"


def _adapter_facts(path: Path, adapter: SavedAdapter) -> Facts:
    folder = path if path.is_dir() else path.parent
    info = adapter.info
    total = sum((folder / name).stat().st_size for name in (INFO_FILE, ARRAYS_FILE))
    numbers = sum(array.size for array in adapter.arrays.values())
    return [
        ("file", f"{folder}, {size(total)}"),
        ("what", f"adapter of {info.method}, {numbers} fitted numbers"),
        ("setting", _words(info.setting) or "none"),
        *_ratio_facts(adapter),
        ("fitted", _words(info.fitted)),
        *([("decisions", _words(stated(adapter.decisions)))] if adapter.decisions else []),
        *_origin_facts(info.class_names, info.templates, info.backbone, info.preprocess),
        *_second_facts(info.backbone2),
        ("data set", _words(info.dataset)),
        ("cache", f"content SHA-256 {info.cache_sha256}"),
        ("logits", _logit_words(info.logit_scale, info.logit_bias)),
    ]


def _ratio_facts(adapter: SavedAdapter) -> Facts:
    """What was learned beside the setting, as far as it does not depend on an image."""
    describe = adapter.method.describe
    if describe is None:
        return []
    no_images = np.zeros((0, adapter.weights.shape[1]), np.float32)
    described = describe(np, adapter.arrays, adapter.info.setting, no_images, adapter.head)
    found = {name: np.asarray(values) for name, values in described.items()}
    return [(f"learned {name}", _spread(values)) for name, values in found.items() if values.size]


def _spread(values: np.ndarray) -> str:
    varies = f" ± {values.std():.3f}" if values.size > 1 else ""
    return f"{values.mean():.3f}{varies}"


def _origin_facts(
    class_names: Sequence[str],
    templates: Sequence[str],
    backbone: Mapping[str, Any],
    preprocess: Mapping[str, Any],
) -> Facts:
    return [
        ("classes", _first(class_names, FIRST_CLASSES)),
        ("templates", _first(templates, FIRST_TEMPLATES)),
        ("backbone", _words(backbone)),
        ("preprocess", _words(preprocess)),
    ]


def _second_facts(backbone2: Mapping[str, Any] | None) -> Facts:
    return [] if backbone2 is None else [("second encoder", _words(backbone2))]


def _first(values: Sequence[str], count: int) -> str:
    """The first few values and how many there are."""
    shown = ", ".join(shortened(value) for value in values[:count])
    return f"{len(values)}: {shown}{', …' if len(values) > count else ''}"


def _words(document: Mapping[str, Any]) -> str:
    """A JSON object in words: `name value, name value`, nested names joined with a point."""
    return ", ".join(f"{name} {value}" for name, value in _flat(document))


def _flat(document: Mapping[str, Any], prefix: str = "") -> Facts:
    nested = (
        _flat(value, f"{prefix}{name}.")
        if isinstance(value, dict)
        else [(prefix + name, f"{value:.6g}" if type(value) is float else shortened(str(value)))]
        for name, value in document.items()
        if value is not None
    )
    return list(chain.from_iterable(nested))


def _logit_words(scale: float, bias: float) -> str:
    return f"scale {scale:g}" + (f", bias {bias:g}" if bias else "")


def print_facts(config: InspectConfig) -> None:
    """Run `inspect` and print what it finds."""
    facts = inspect(config)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:{width}}  {printable(value)}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `clip-adapter inspect`."""
    run_command(InspectConfig, print_facts, "clip-adapter inspect", arguments)
