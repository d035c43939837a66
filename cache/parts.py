"""Join the parts of a cache that several processes wrote."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clip_adapter.cache import schema
from clip_adapter.cache.content import Content, Tally, in_several_splits, tally
from clip_adapter.cache.rows import Places, Rows, StoredRows, picked
from clip_adapter.cache.schema import ELEMENTS, of_images, split_of
from clip_adapter.cache.stored_file import StoredFile
from clip_adapter.cache.writer import write_cache
from clip_adapter.errors import UserError
from clip_adapter.words import printable

# What has to be the same in all parts beside the arguments, and what of the data set's record not.
SHARED = ("backbone", "preprocess", "templates", "logit_scale", "logit_bias", "backbone2")
OF_THE_MACHINE = ("device", "torch_version")
THREADS = "threads"  # in that record, of a forward pass on a CPU: they change the last bits
MISSING_NAMED = 20


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
        for split in self.all_splits:
            if split not in self.part.rows:
                raise self._broken(f"it has {split} images and states none")
        for split, (start, stop, _) in self.part.rows.items():
            count = sum(self.lengths.get(f"{letter} {split}", 0) for letter in "NS")
            if count != stop - start:
                raise UserError(
                    f"{self.path} accounts for {count} of its {stop - start} {split} images; "
                    "extract it again."
                )

    def shared(self) -> dict[str, Any]:
        """What every part of one cache has to say the same of beside the arguments."""
        dataset = {
            key: value for key, value in self.metadata.dataset.items() if key not in OF_THE_MACHINE
        }
        threads = dataset.pop(THREADS, 1)
        stated = {name: getattr(self.metadata, name) for name in SHARED}
        stated |= {"threads of a forward pass (up to four cores it is one)": threads}
        return stated | {"dataset": dataset, "number of parts": self.part.of}


def merge_parts(paths: Sequence[Path], out: Path) -> tuple[list[str], dict[str, Tally], Any]:
    """Join the parts into one cache, equal byte for byte but for the time to that of an undivided
    run.

    paths: all parts of one cache, in any order. What an interrupted run left for `out` goes.
    Returns the class names, what became of the images, and `in_several_splits`.

    Raises UserError for files that are no parts or damaged, parts that do not belong together,
    and parts that are missing.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(PartFile(path)) for path in paths]
        parts.sort(key=lambda part: part.part.index)
        _check_together(parts)
        content = _joined(parts)
        metadata = parts[0].metadata
        several = in_several_splits(content)
        write_cache(
            out,
            content,
            backbone=metadata.backbone,
            preprocess=metadata.preprocess,
            dataset=metadata.dataset | ({"in_several_splits": several} if several else {}),
            logit_scale=metadata.logit_scale,
            logit_bias=metadata.logit_bias,
            arguments=metadata.arguments,
            backbone2=metadata.backbone2,
        )
        return content["text/class_names"].tolist(), tally(content), several


def _joined(parts: Sequence[PartFile]) -> Content:
    """The rows of all parts one behind another; what belongs to no image is part 1's."""
    content: dict[str, Any] = {}
    classes = parts[0].lengths["C"]
    for path, element in ELEMENTS.items():
        having = [part for part in parts if part.has_dataset(path)]
        if having and "N" not in element.axes:
            content[path] = np.concatenate([part.values_of(path) for part in having])
        if path.endswith("labels"):
            for part in having:
                part.labels_of(path, classes)
    for split in schema.ALL_SPLITS:
        content |= _joined_rows([part for part in parts if split in part.all_splits], split)
    return content


def _joined_rows(parts: Sequence[PartFile], split: str) -> Content:
    """What each image of a split has, where the parts have it."""
    if not parts:
        return {}
    sources = [StoredRows(part, split) for part in parts]
    counts = [part.lengths[f"N {split}"] for part in parts]
    source = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
    places = Places(sources, source, np.concatenate([np.arange(count) for count in counts]))
    rows = max((source.rows for source in sources), key=len)  # without images it has fewer
    return {of_images(split, name): values for name, values in picked(places, rows).items()}


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
    for split in schema.ALL_SPLITS:
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
    here = [part for part in parts if split in part.all_splits]
    kinds = [_kinds(part, split) for part in here]
    for part, kind in zip(here, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{part.path} and {here[0].path} hold {split} images of different kinds; extract "
                "all parts with the same arguments."
            )
    for path, element in ELEMENTS.items():
        some = [part for part in here if part.lengths.get(f"{element.axes} {split}")]
        if split_of(path) == split and len({part.has_dataset(path) for part in some}) > 1:
            raise here[0]._broken(f"{element.name} of {split} are in some parts only")


def _kinds(part: PartFile, split: str) -> Rows:
    """Views, types and widths of the features of a split."""
    rows = StoredRows(part, split).rows
    return {name: row for name, row in rows.items() if ELEMENTS[of_images(split, name)].by_row}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Names of which not both have the same."""
    nothing = object()
    names = one.keys() | other.keys()
    return {name for name in names if one.get(name, nothing) != other.get(name, nothing)}
