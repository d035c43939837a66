"""What has changed in a data set since its cache was made."""

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from clip_adapter.cache.content import Content
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.rows import StoredRows
from clip_adapter.cache.schema import UNLABELLED
from clip_adapter.errors import UserError
from clip_adapter.extract.config import ALSO, ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset, provenance_of
from clip_adapter.extract.datasets.source import NO_LABEL, ImageDataset
from clip_adapter.extract.known import Known, KnownRows, rows_sha256, stamps
from clip_adapter.extract.like import OF_CLASSES
from clip_adapter.listener import Listener
from clip_adapter.words import counted, some

# Arguments that --update may change: they decide which rows and prompts there are, how the rows are
# labelled, what else is told of the text and by which second encoder, but not what the features of
# an image are. (With a projection they may be rounded otherwise than without.)
UPDATABLE = (
    "templates",
    "descriptions",
    "like",
    "classes",
    "prompt_control",
    "views",
    "columns",
    "group",
    "val",
    "test",
    "split_seed",
    "with_text_tower",
    *ALSO,
    "also_weights",
)


def find_changes(config: ExtractConfig, listener: Listener) -> str | None:
    """How the data set that a finished cache was made of has changed since, as a clause; None where
    it has not.

    Of a data set that cannot be listed without downloads, provenance alone is compared.
    Raises UserError for one that cannot be had any more.
    """
    options = config.source_options(listener)
    with FeatureCache(config.out) as cache:
        provenance = provenance_of(config.dataset, options)
        if provenance is not None:
            earlier = {key: cache.dataset.get(key) for key in provenance}
            return None if earlier == provenance else "its source is of another version"
        return _changes(cache, open_dataset(config.dataset, options), config.workers)


def _changes(cache: FeatureCache, dataset: ImageDataset, workers: int) -> str | None:
    now, then = _current(dataset), _cached(cache)
    new, gone = now.keys() - then.keys(), then.keys() - now.keys()
    moved = {name for _, name in new} & {name for _, name in gone}
    both = now.keys() & then.keys()
    relabelled = sum(now[key] != then[key] for key in both)
    changed = _changed(cache, dataset, both, workers)
    groups = _groups_of({name: (one.ids, one.groups) for name, one in dataset.splits.items()})
    then_of = {name: (cache.ids(name), cache.groups(name)) for name in cache.all_splits}
    regrouped = sum(groups[key] != own for key, own in _groups_of(then_of).items() if key in both)
    counts = (
        (sum(name not in moved for _, name in new), "new"),
        (sum(name not in moved for _, name in gone), "gone"),
        (changed, "changed"),
        (len(moved), "moved to another split"),
        (relabelled, "moved to another class"),
        (regrouped, "moved to another group"),
    )
    parts = [f"{counted(count, 'image')} {what}" for count, what in counts if count]
    for what, names in (
        ("new", set(dataset.class_names) - set(cache.class_names)),
        ("gone", set(cache.class_names) - set(dataset.class_names)),
    ):
        if names:
            noun = "class" if len(names) == 1 else "classes"
            parts.append(f"{noun} {some(sorted(names))} {what}")
    if not parts and not _same_order(cache, dataset):
        parts.append("images in another order")
    return ", ".join(parts) or None


ClassNames = dict[tuple[str, str], str | None]


def _current(dataset: ImageDataset) -> ClassNames:
    """(split, id) → class name, None for images without a label."""
    return {
        (split, name): None if label == NO_LABEL else dataset.class_names[label]
        for split, rows in dataset.splits.items()
        for name, label in zip(rows.ids, rows.labels.tolist(), strict=True)
    }


def _groups_of(
    splits: Mapping[str, tuple[Sequence[str], Sequence[str] | None]],
) -> ClassNames:
    """(split, id) → group, None for images without one. splits: ids, and the group of each."""
    return {
        (split, name): group
        for split, (ids, groups) in splits.items()
        for name, group in zip(ids, groups or repeat(None, len(ids)), strict=True)
    }


def _cached(cache: FeatureCache) -> ClassNames:
    """The same of a cache, with the images that were skipped."""
    class_names: ClassNames = {}
    for split in cache.all_splits:
        names = cache.ids(split) + cache.skipped_ids(split)
        if split == UNLABELLED:
            class_names |= {(split, name): None for name in names}
            continue
        labels = cache.labels(split).tolist() + cache.skipped_labels(split)
        class_names |= {
            (split, name): cache.class_names[label]
            for name, label in zip(names, labels, strict=True)
        }
    return class_names


def _changed(
    cache: FeatureCache, dataset: ImageDataset, both: Collection[tuple[str, str]], workers: int
) -> int:
    """How many images have other content, or, of skipped ones, another size or time."""
    known = Known(
        {
            name: KnownRows(split, stamps(split, dataset.provenance), {}, range(len(split.ids)))
            for name, split in dataset.splits.items()
        }
    )
    for name in cache.all_splits:
        if cache.hashes(name, "stamps") is None or cache.hashes(name, "contents") is None:
            return 0  # nothing says so
        known.look_in(StoredRows(cache, name), cache.ids(name))
        skipped = cache.hashes(name, "skipped_stamps")
        if skipped is not None:
            known.skip(cache.skipped_ids(name), skipped, even_unknown=True)
    known.settle(workers)
    return sum(
        (name, split.split.ids[row]) in both
        for name, split in known.splits.items()
        for row in split.missing.tolist()
    )


def _same_order(cache: FeatureCache, dataset: ImageDataset) -> bool:
    if list(cache.class_names) != list(dataset.class_names):
        return False
    for part, split in dataset.splits.items():
        skipped = set(cache.skipped_ids(part))
        if [name for name in split.ids if name not in skipped] != cache.ids(part):
            return False
    return True


def refuse_other_rows(config: ExtractConfig, rows: Any, listener: Listener) -> None:
    """Raises UserError where the source of a part, whose rows have this hash, has changed."""
    options = config.source_options(listener)
    if provenance_of(config.dataset, options) is not None:
        return
    if rows_sha256(open_dataset(config.dataset, options).splits) != rows:
        raise UserError(
            f"{config.out} was made of other images than {config.dataset} has now; --force makes "
            "the part again (and the others have to be made again too)."
        )


def refuse_other_features(
    cache: FeatureCache,
    weights: str,
    preprocess: Mapping[str, Any],
    precision: object,
    consequence: str = "so --update can keep nothing of it; --force starts again",
) -> None:
    """Raises UserError where the features of a cache are not such as are computed now.

    consequence: of that, as a clause.
    """
    differing = [
        what
        for what, then, now in (
            ("weights", cache.backbone.get("weights_sha256"), weights),
            ("preprocessing", cache.preprocess, json.loads(json.dumps(preprocess))),
            ("precision", cache.arguments.get("precision"), precision),
        )
        if then != now
    ]
    if differing:
        raise UserError(
            f"{cache.path} was made with other {' and '.join(differing)}, {consequence}."
        )


def text_of(path: Path, weights: str, preprocess: Mapping[str, Any]) -> Content:
    """What a cache has of its classes, for images that are encoded as its own are.

    Raises UserError where they would have other features: of other weights or preprocessing.
    """
    with FeatureCache(path) as cache:
        precision = cache.arguments.get("precision")  # rounds, and changes nothing else
        remedy = "so its prompts do not fit; name the right ones with --backbone and --pretrained"
        refuse_other_features(cache, weights, preprocess, precision, remedy)
        return {name: cache.values_of(name) for name in OF_CLASSES if cache.has_dataset(name)}


def refuse_changed(config: ExtractConfig, listener: Listener) -> None:
    """Raises UserError where the source of a finished cache has changed."""
    if changes := find_changes(config, listener):
        raise UserError(
            f"{config.out} was made of other images than {config.dataset} has now: {changes}; "
            "--update encodes what is new or changed and keeps the rest (--force starts again)."
        )
