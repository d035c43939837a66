"""Join the parts of a cache that several processes wrote."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clip_adapter.cache import layout
from clip_adapter.cache.duplicates import in_several_splits
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.tally import Tally, tally
from clip_adapter.cache.workplace import Workplace
from clip_adapter.cache.writer import (
    HASHES,
    SKIPPED,
    SKIPPED_LABELS,
    SKIPPED_STAMPS,
    CacheWriter,
    Part,
)

# What has to be the same in all parts beside the arguments, and what of the data set's record not.
SHARED = ("backbone", "preprocess", "templates", "logit_scale", "logit_bias")
OF_THE_MACHINE = ("device", "torch_version")
ROWS_AT_A_TIME = 1024
# Keeps `extract` from going on with what a killed merge left.
MERGING = {"shard": "merge"}


@dataclass(frozen=True)
class _PartFile:
    path: Path
    file: h5py.File
    part: Part

    def attribute(self, name: str) -> Any:
        value = self.file.attrs[name]
        return json.loads(value) if isinstance(value, str) else value

    @property
    def dataset(self) -> dict[str, Any]:
        stored = self.attribute("dataset")
        return {key: value for key, value in stored.items() if key not in OF_THE_MACHINE}


@dataclass(frozen=True)
class Merged:
    """What there is to say about joined parts. several: see `in_several_splits`."""

    class_names: list[str]
    tallies: dict[str, Tally]
    several: dict[str, Any] | None


def part_of(path: Path) -> tuple[dict[str, Any], Part, int]:
    """What the `extract` that wrote a part was asked for, which part it is, and how many images
    it lists as skipped.

    Raises UserError for a file that is no part.
    """
    with ExitStack() as stack:
        opened = _open(path, stack)
        with _reading(path):
            return opened.attribute("arguments"), opened.part, layout.count_skipped(opened.file)


def merge_parts(paths: Sequence[Path], out: Path) -> Merged:
    """Copy the parts into one cache, equal dataset for dataset to that of an undivided run.

    paths: all parts of one cache, in any order. What an interrupted run left for `out` goes.

    Raises UserError for files that are no parts or damaged, parts that do not belong together,
    and parts that are missing.
    """
    with ExitStack() as stack:
        parts = [_open(path, stack) for path in paths]
        parts.sort(key=lambda part: part.part.index)
        _check_together(parts)
        first = parts[0]
        views = max(map(_views, parts))
        place = Workplace(out, MERGING)
        with CacheWriter(place, first.attribute("arguments"), views=views, restart=True) as writer:
            _copy_text(first, writer)
            for split in first.part.rows:
                for part in parts:
                    _copy_images(part, split, writer)
            dataset = first.attribute("dataset")
            class_names = list(writer.listed(layout.TEXT, "class_names"))
            merged = Merged(class_names, tally(writer), in_several_splits(writer))
            if merged.several:
                dataset["in_several_splits"] = merged.several
            writer.finish(
                templates=first.attribute("templates"),
                backbone=first.attribute("backbone"),
                preprocess=first.attribute("preprocess"),
                dataset=dataset,
                logit_scale=first.attribute("logit_scale"),
                logit_bias=first.attribute("logit_bias"),
            )
    return merged


def _open(path: Path, stack: ExitStack) -> _PartFile:
    if not path.exists():
        raise UserError(f"There is no part at {path}; `extract --shard` makes one.")
    with _reading(path):
        file = stack.enter_context(h5py.File(path, "r"))
        if file.attrs.get("format") != layout.PART_FORMAT:
            raise UserError(f"{path} is no part of a cache; `extract --shard` makes one.")
        if file.attrs["format_version"] != layout.FORMAT_VERSION:
            raise UserError(f"{path} is of another version of the format; extract it again.")
        opened = _PartFile(path, file, Part(**json.loads(file.attrs["part"])))
        for name in ("arguments", *SHARED, "dataset"):
            opened.attribute(name)
    return opened


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what h5py raises on damaged files into a sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged or no part of a cache; extract it again.") from error


def _check_together(parts: Sequence[_PartFile]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if differing := _differing(first, part):
            raise UserError(
                f"{part.path} and {first.path} do not belong together: {', '.join(differing)} "
                "differ; extract all parts with the same arguments."
            )
    for one, other in pairwise(parts):
        if one.part.index == other.part.index:
            raise UserError(
                f"{one.path} and {other.path} are both part {one.part.index} of {one.part.of}; "
                "name every part once."
            )
    present = {part.part.index for part in parts}
    missing = [str(i) for i in range(1, first.part.of + 1) if i not in present]
    if missing:
        raise UserError(
            f"Not all {first.part.of} parts are there; name part {', '.join(missing)} as well."
        )
    for split in first.part.rows:
        ranges = [part.part.rows[split] for part in parts]
        joints = [0, *(stop for _, stop, _ in ranges)]
        if [start for start, _, _ in ranges] != joints[:-1] or joints[-1] != ranges[0][2]:
            raise UserError(
                f"The parts do not meet in the {split} split; extract all of them with the same "
                "--batch-size."
            )
    for part in parts:
        _check_count(part)


def _check_count(part: _PartFile) -> None:
    """Every image that the part was to encode is there or listed as skipped."""
    for split, (start, stop, _) in part.part.rows.items():
        with _reading(part.path):
            group = part.file.get(f"images/{split}", {})
            found = sum(len(group[name]) for name in ("labels", SKIPPED) if name in group)
        if found != stop - start:
            raise UserError(
                f"{part.path} accounts for {found} of its {stop - start} {split} images; "
                "extract it again."
            )


def _differing(first: _PartFile, part: _PartFile) -> list[str]:
    """What parts of one cache have in common and these two have not."""
    one, other = first.attribute("arguments"), part.attribute("arguments")
    differing = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    differing |= {name for name in SHARED if part.attribute(name) != first.attribute(name)}
    if part.dataset != first.dataset:
        differing.add("dataset")
    if part.part.of != first.part.of:
        differing.add("number of parts")
    return sorted(differing)


def _views(part: _PartFile) -> int:
    train = part.file.get("images/train/features")
    return 1 if train is None else train.shape[0]


def _copy_text(part: _PartFile, writer: CacheWriter) -> None:
    with _reading(part.path):
        group = part.file[layout.TEXT]
        features = group["features"][...]
        names = group["class_names"].asstr()[...].tolist()
        prompts = group["prompts"].asstr()[...].tolist() if "prompts" in group else None
    writer.append_text(features, names, prompts)


def _copy_images(part: _PartFile, split: str, writer: CacheWriter) -> None:
    """A bounded number of images at a time; a part too small for a split has none of it."""
    group = part.file.get(f"images/{split}")
    if group is None:
        return
    with _reading(part.path):
        rows = group["labels"].shape[0]
        skipped = group[SKIPPED].asstr()[...].tolist() if SKIPPED in group else []
        skipped_labels = group[SKIPPED_LABELS][...].tolist() if SKIPPED_LABELS in group else []
        skipped_stamps = group[SKIPPED_STAMPS][...] if SKIPPED_STAMPS in group else None
    for start in range(0, max(1, rows), ROWS_AT_A_TIME):
        chosen = slice(start, start + ROWS_AT_A_TIME)
        with _reading(part.path):
            features = group["features"][:, chosen].transpose(1, 0, 2)
            labels, ids = group["labels"][chosen], group["ids"].asstr()[chosen].tolist()
            hashes = {name: group[name][chosen] for name in HASHES if name in group}
        if skipped_stamps is not None:
            hashes[SKIPPED_STAMPS] = skipped_stamps
        writer.append_images(
            split, features, labels, ids, skipped, skipped_labels=skipped_labels, **hashes
        )
        skipped, skipped_labels, skipped_stamps = [], [], np.zeros(0, np.uint64)
