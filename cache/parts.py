"""Join the parts of a cache that several processes wrote."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clip_adapter.cache import schema
from clip_adapter.cache.metadata import Part
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.cache.stored_file import StoredFile
from clip_adapter.cache.tally import Tally, in_several_splits, tally
from clip_adapter.cache.writer import CacheWriter
from clip_adapter.errors import UserError
from clip_adapter.words import printable

# What has to be the same in all parts beside the arguments, and what of the data set's record not.
SHARED = ("backbone", "preprocess", "templates", "logit_scale", "logit_bias")
OF_THE_MACHINE = ("device", "torch_version")
# Lists that all parts of a cache have or none, of images and of those that were skipped.
ALL_OR_NONE = {"N": ("digests", "stamps", "contents"), "S": ("skipped_labels", "skipped_stamps")}
ROWS_AT_A_TIME = 1024
MISSING_NAMED = 20
# Keeps `extract` from going on with what a killed merge left.
MERGING = {"shard": "merge"}


class PartFile(StoredFile):
    """A part of a cache, opened. Raises UserError for what is none, or contradicts FORMAT.md."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, schema.PART_FORMAT)
        assert self.metadata.part is not None
        self.part = self.metadata.part
        try:
            self._check_count()
        except UserError:
            self.close()
            raise

    def _broken(self, reason: object) -> UserError:
        return UserError(
            f"{self.path} is damaged or no part of a cache: {reason}; extract it again."
        )

    def _check_count(self) -> None:
        """Every image that the part was to encode is there or listed as skipped."""
        for split in self.splits:
            if split not in self.part.rows:
                raise self._broken(f"it has {split} images and states none")
        for split, (start, stop, _) in self.part.rows.items():
            found = sum(self.lengths.get(f"{letter} {split}", 0) for letter in "NS")
            if found != stop - start:
                raise UserError(
                    f"{self.path} accounts for {found} of its {stop - start} {split} images; "
                    "extract it again."
                )

    @property
    def skipped(self) -> int:
        return sum(self.lengths.get(f"S {split}", 0) for split in self.splits)

    def shared(self) -> dict[str, Any]:
        """What every part of one cache has to say the same of beside the arguments."""
        dataset = {
            key: value for key, value in self.metadata.dataset.items() if key not in OF_THE_MACHINE
        }
        stated = {name: getattr(self.metadata, name) for name in SHARED}
        return stated | {"dataset": dataset, "number of parts": self.part.of}


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
    with PartFile(path) as opened:
        return opened.metadata.arguments, opened.part, opened.skipped


def merge_parts(paths: Sequence[Path], out: Path) -> Merged:
    """Copy the parts into one cache, equal dataset for dataset to that of an undivided run.

    paths: all parts of one cache, in any order. What an interrupted run left for `out` goes.

    Raises UserError for files that are no parts or damaged, parts that do not belong together,
    and parts that are missing.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(PartFile(path)) for path in paths]
        parts.sort(key=lambda part: part.part.index)
        _check_together(parts)
        first, metadata = parts[0], parts[0].metadata
        views = max(part.lengths.get("V train", 1) for part in parts)
        place = StagingFolder(out, MERGING)
        with CacheWriter(place, metadata.arguments, views=views, restart=True) as writer:
            class_names = _copy_text(first, writer)
            for split in schema.SPLITS:
                for part in parts:
                    if split in part.splits:
                        _copy_images(part, split, len(class_names), writer)
            merged = Merged(class_names, tally(writer), in_several_splits(writer))
            dataset = dict(metadata.dataset)
            if merged.several:
                dataset["in_several_splits"] = merged.several
            assert metadata.templates is not None
            writer.finish(
                templates=metadata.templates,
                backbone=metadata.backbone,
                preprocess=metadata.preprocess,
                dataset=dataset,
                logit_scale=metadata.logit_scale,
                logit_bias=metadata.logit_bias,
                projection=_projection(first),
            )
    return merged


def _check_together(parts: Sequence[PartFile]) -> None:
    first = parts[0]
    for part in parts[1:]:
        differing = _differing(first.metadata.arguments, part.metadata.arguments)
        differing |= _differing(first.shared(), part.shared())
        if differing:
            raise UserError(
                f"{part.path} and {first.path} do not belong together: "
                f"{printable(', '.join(sorted(differing)))} differ; extract all parts with the "
                "same arguments."
            )
    for one, other in pairwise(parts):
        if one.part.index == other.part.index:
            raise UserError(
                f"{one.path} and {other.path} are both part {one.part.index} of {one.part.of}; "
                "name every part once."
            )
    if len(parts) < first.part.of:
        present = {part.part.index for part in parts}
        missing = (str(i) for i in range(1, first.part.of + 1) if i not in present)
        named = ", ".join(islice(missing, MISSING_NAMED))
        more = first.part.of - len(parts) - MISSING_NAMED
        raise UserError(
            f"Not all {first.part.of} parts are there; name part {named}"
            f"{f' and {more} more' if more > 0 else ''} as well."
        )
    _check_text(parts)
    for split in schema.SPLITS:
        _check_split(parts, split)


def _check_text(parts: Sequence[PartFile]) -> None:
    first, *others = parts
    templates = first.metadata.templates or []
    if not first.has_dataset("text/features") or first.strings("text/templates") != templates:
        raise first._broken("it lacks the text features that part 1 has")
    for part in others:
        if part.has_dataset("text/features") or part.has_dataset("projection/weights"):
            raise part._broken("it has text features or a projection, which only part 1 has")


def _check_split(parts: Sequence[PartFile], split: str) -> None:
    """Whether the ranges of rows meet, and all parts that have images have the same of them."""
    if {split in part.part.rows for part in parts} == {False}:
        return
    ranges = [part.part.rows.get(split, (0, 0, 0)) for part in parts]
    joints = [0, *(stop for _, stop, _ in ranges)]
    totals = {total for _, _, total in ranges}
    if [start for start, _, _ in ranges] != joints[:-1] or totals != {joints[-1]}:
        raise UserError(
            f"The parts do not meet in the {split} split; extract all of them with the same "
            "--batch-size."
        )
    here = [part for part in parts if split in part.splits]
    kinds = [_kinds(part, split) for part in here]
    for part, kind in zip(here, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{part.path} and {here[0].path} hold {split} images of different kinds; extract "
                "all parts with the same arguments."
            )
    for letter, names in ALL_OR_NONE.items():
        some = [part for part in here if part.lengths.get(f"{letter} {split}")]
        for name in names:
            if len({part.has_dataset(f"images/{split}/{name}") for part in some}) > 1:
                raise here[0]._broken(f"{name} of {split} are in some parts only")


def _kinds(part: PartFile, split: str) -> list[Any]:
    """Views, types and widths of the arrays of a split."""
    paths = [f"images/{split}/{name}" for name in ("features", "pre_projection")]
    there = [path for path in paths if part.has_dataset(path)]
    widths = [(path, part.dtype_of(path), part.shape_of(path)[2]) for path in there]
    return [part.lengths[f"V {split}"], *widths]


def _differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Names of which not both have the same."""
    nothing = object()
    names = one.keys() | other.keys()
    return {name for name in names if one.get(name, nothing) != other.get(name, nothing)}


def _copy_text(part: PartFile, writer: CacheWriter) -> list[str]:
    """Copies the text features and returns the class names."""
    everything = slice(None)
    features = _as_stored(part, "text/features", (everything,))
    names = part.strings("text/class_names")
    prompts = tokens = None
    if part.has_dataset("text/prompts"):
        prompts = part.string_table("text/prompts")
    if part.has_dataset("text/tokens"):
        tokens = part.rows_of("text/tokens", everything)
    writer.append_text(features, names, prompts, tokens)
    return names


def _as_stored(part: PartFile, path: str, index: tuple[slice, ...]) -> np.ndarray:
    """Features, checked, in the type that the part has them in."""
    return part.features_of(path, index).astype(part.dtype_of(path))


def _projection(part: PartFile) -> tuple[np.ndarray, np.ndarray | None] | None:
    if not part.has_dataset("projection/weights"):
        return None
    everything = slice(None)
    bias = None
    if part.has_dataset("projection/bias"):
        bias = part.rows_of("projection/bias", everything)
    return part.rows_of("projection/weights", everything), bias


def _copy_images(part: PartFile, split: str, classes: int, writer: CacheWriter) -> None:
    """A bounded number of images at a time; a part too small for a split has none of it."""
    room = f"images/{split}"

    def rows(name: str, chosen: slice) -> np.ndarray | None:
        path = f"{room}/{name}"
        return part.rows_of(path, chosen) if part.has_dataset(path) else None

    labels = part.labels_of(f"{room}/labels", classes)
    everything = slice(None)
    skipped = part.strings(f"{room}/skipped") if part.has_dataset(f"{room}/skipped") else []
    skipped_labels = None
    if part.has_dataset(f"{room}/skipped_labels"):
        skipped_labels = part.labels_of(f"{room}/skipped_labels", classes)
    skipped_stamps = rows("skipped_stamps", everything)
    for start in range(0, max(1, len(labels)), ROWS_AT_A_TIME):
        chosen = slice(start, start + ROWS_AT_A_TIME)
        views = (everything, chosen)
        pre_projection = None
        if part.has_dataset(f"{room}/pre_projection"):
            pre_projection = _as_stored(part, f"{room}/pre_projection", views).transpose(1, 0, 2)
        writer.append_images(
            split,
            _as_stored(part, f"{room}/features", views).transpose(1, 0, 2),
            labels[chosen],
            part.strings(f"{room}/ids", chosen),
            skipped,
            rows("digests", chosen),
            () if skipped_labels is None else skipped_labels,
            pre_projection,
            rows("stamps", chosen),
            rows("contents", chosen),
            skipped_stamps,
        )
        skipped, skipped_labels, skipped_stamps = [], None, None
