"""Join the parts of a cache that several processes wrote."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from clip_adapter.cache import layout
from clip_adapter.cache.duplicates import in_several_splits
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.writer import DIGESTS, CacheWriter, Part

# What has to be the same in all parts, and what of the data set's record does not.
SHARED = ("arguments", "backbone", "preprocess", "templates", "logit_scale", "logit_bias")
OF_THE_MACHINE = ("device", "torch_version")
ROWS_AT_A_TIME = 1024


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


def part_of(path: Path) -> tuple[dict[str, Any], Part]:
    """What the `extract` that wrote a part was asked for, and which part it is.

    Raises UserError for a file that is no part.
    """
    with ExitStack() as stack:
        opened = _open(path, stack)
        return opened.attribute("arguments"), opened.part


def merge_parts(paths: Sequence[Path], out: Path) -> dict[str, Any] | None:
    """Copy the parts into one cache, equal dataset for dataset to that of an undivided run.

    paths: all parts of one cache, in any order. What an interrupted run left for `out` goes.
    Returns what `in_several_splits` found.

    Raises UserError for files that are no parts or damaged, parts that do not belong together,
    and parts that are missing.
    """
    with ExitStack() as stack:
        parts = [_open(path, stack) for path in paths]
        parts.sort(key=lambda part: part.part.index)
        _check_together(parts)
        first = parts[0]
        views = max(map(_views, parts))
        with CacheWriter(out, first.attribute("arguments"), views=views, restart=True) as writer:
            _copy_text(first, writer)
            for split in first.part.rows:
                for part in parts:
                    _copy_images(part, split, writer)
            dataset = first.attribute("dataset")
            if several := in_several_splits(writer):
                dataset["in_several_splits"] = several
            writer.finish(
                templates=first.attribute("templates"),
                backbone=first.attribute("backbone"),
                preprocess=first.attribute("preprocess"),
                dataset=dataset,
                logit_scale=first.attribute("logit_scale"),
                logit_bias=first.attribute("logit_bias"),
            )
    return several


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
        for name in (*SHARED, "dataset"):
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
        differing = [name for name in SHARED if part.attribute(name) != first.attribute(name)]
        if part.dataset != first.dataset:
            differing.append("dataset")
        if part.part.of != first.part.of:
            differing.append("number of parts")
        if differing:
            raise UserError(
                f"{part.path} and {first.path} do not belong together: {', '.join(differing)} "
                "differ; extract all parts with the same arguments."
            )
    present = [part.part.index for part in parts]
    wanted = list(range(1, first.part.of + 1))
    if present != wanted:
        missing = ", ".join(str(i) for i in wanted if i not in present)
        problem = f"part {missing} of {len(wanted)} is missing" if missing else "a part comes twice"
        raise UserError(f"These are not all parts of one cache: {problem}.")
    for split in first.part.rows:
        ranges = [part.part.rows[split] for part in parts]
        joints = [0, *(stop for _, stop, _ in ranges)]
        if [start for start, _, _ in ranges] != joints[:-1] or joints[-1] != ranges[0][2]:
            raise UserError(
                f"The parts do not meet in the {split} split; extract all of them with the same "
                "--batch-size."
            )


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
        skipped = group["skipped"].asstr()[...].tolist() if "skipped" in group else []
    for start in range(0, max(1, rows), ROWS_AT_A_TIME):
        chosen = slice(start, start + ROWS_AT_A_TIME)
        with _reading(part.path):
            features = group["features"][:, chosen].transpose(1, 0, 2)
            labels, ids = group["labels"][chosen], group["ids"].asstr()[chosen].tolist()
            digests = group[DIGESTS][chosen] if DIGESTS in group else None
        writer.append_images(split, features, labels, ids, skipped, digests)
        skipped = []
