"""One `extract` from the opened data set to the finished file."""

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clip_adapter.cache.duplicates import in_several_splits
from clip_adapter.cache.tally import Tally, tally
from clip_adapter.cache.workplace import Workplace
from clip_adapter.cache.writer import SKIPPED, CacheWriter, Part
from clip_adapter.console.progress import progress
from clip_adapter.console.wording import counted, warn
from clip_adapter.extract.backbone import load_backbone
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.decode import Plan
from clip_adapter.extract.device import find_device, find_precision
from clip_adapter.extract.encode import EncodedBatch, Encoder, encode_images
from clip_adapter.extract.in_order import InOrder
from clip_adapter.extract.outcome import (
    describe,
    describe_skipped,
    refuse_skipped,
    warn_of_duplicates,
    warn_of_lost_classes,
)
from clip_adapter.extract.prompts import (
    descriptions_in_order,
    read_descriptions,
    resolve_templates,
)
from clip_adapter.extract.shards import Shard
from clip_adapter.extract.stopwatch import Stopwatch
from clip_adapter.extract.text import TextPlan, encode_classes

if TYPE_CHECKING:
    from clip_adapter.extract.command import ExtractConfig


def run_job(config: "ExtractConfig", shard: Shard, place: Workplace, quiet: bool = False) -> str:
    """Encode what is not staged yet, write the file (a part of a cache where there are several
    shards) and return what to say about it.

    place: where to write. quiet: show no progress, because another process does.
    """
    identity = config.identity()
    dataset = open_dataset(config.dataset, config.source_options())
    if not quiet:
        for remark in dataset.remarks:
            warn(remark)
    text = _text_plan(config, dataset)
    device = find_device(config.device)
    precision = find_precision(config.precision, device)
    backbone = load_backbone(config.backbone, config.pretrained, precision)
    if backbone.assumption and not quiet:
        warn(backbone.assumption)
    # What a resumed run must agree on beyond its arguments: the weights and the rows themselves,
    # which may change under an unchanged path.
    identity["precision"] = precision
    identity["weights_sha256"] = backbone.identity["weights_sha256"]
    identity["rows_sha256"] = _rows_sha256(dataset)
    restart = config.force
    with (
        warnings.catch_warnings(),
        CacheWriter(place, identity, views=1 + config.views, restart=restart) as writer,
    ):
        # Pillow remarks on oddities of files that decode all the same; the others get a sentence.
        warnings.filterwarnings("ignore", module="PIL")
        encoder = Encoder(backbone, device, config.batch_size if config.compile else None)
        job = _Job(config, shard, dataset, encoder, writer, quiet)
        job.check_what_is_there()
        if shard.index == 1:
            job.encode_text(text)
        for name in dataset.splits:
            job.encode_split(name)
        record: dict[str, Any] = {
            **dataset.provenance,
            "splits": {name: split.origin for name, split in dataset.splits.items()},
            "device": str(device),
            "torch_version": torch.__version__,
        }
        part = None
        tallies = tally(writer)
        if shard.of > 1:
            part = Part(shard.index, shard.of, {name: job.bounds(name) for name in dataset.splits})
        else:
            if several := in_several_splits(writer):
                record["in_several_splits"] = several
            warn_of_duplicates(several)
            warn_of_lost_classes(tallies, dataset.class_names)
        with job.watch("write"):
            writer.finish(
                templates=text.stored_templates,
                backbone=backbone.identity,
                preprocess=backbone.preprocess_config,
                dataset=record,
                logit_scale=backbone.logit_scale,
                logit_bias=backbone.logit_bias,
                part=part,
            )
    return job.summary(tallies)


def _text_plan(config: "ExtractConfig", dataset: ImageDataset) -> TextPlan:
    templates = resolve_templates(config.templates)
    if config.descriptions is None:
        return TextPlan(dataset.class_names, templates or dataset.templates)
    stored = read_descriptions(config.descriptions)
    own = descriptions_in_order(stored, dataset.class_names)
    return TextPlan(dataset.class_names, templates, own)


class _Job:
    """What encoding a split needs, and what it is told on the way."""

    def __init__(
        self,
        config: "ExtractConfig",
        shard: Shard,
        dataset: ImageDataset,
        encoder: Encoder,
        writer: CacheWriter,
        quiet: bool,
    ) -> None:
        self._config = config
        self._shard = shard
        self._dataset = dataset
        self._encoder = encoder
        self._writer = writer
        self._quiet = quiet
        self._reason: str | None = None  # why the first image was skipped
        self._images = 0
        self._seconds = 0.0
        self.watch = Stopwatch()

    def check_what_is_there(self) -> None:
        """Say where it goes on.

        Raises UserError where images were skipped that should not be.
        """
        if self._config.on_error == "fail":
            names = self._dataset.splits
            skipped = sum(1 for name in names for _ in self._writer.listed(name, SKIPPED))
            refuse_skipped(self._config.out, skipped)
        bounds = {name: self.bounds(name) for name in self._dataset.splits}
        total = sum(stop - start for start, stop, _ in bounds.values())
        done = sum(self._writer.consumed(name) for name in bounds)
        if done and not self._quiet:
            print(
                f"extract: goes on from image {done:,} of {total:,}, where an earlier run stopped",
                file=sys.stderr,
            )

    def encode_text(self, plan: TextPlan) -> None:
        batches = encode_classes(
            self._encoder,
            plan,
            start=self._writer.text_rows(),
            batch_size=self._config.batch_size,
        )
        too_long: list[str] = []
        for batch in batches:
            self._writer.append_text(batch.features, batch.names, batch.prompts)
            too_long += batch.too_long
        if too_long:
            warn(
                f"the text tower reads only the beginning of {counted(len(too_long), 'prompt')}, "
                f"the first of them {too_long[0]!r}; shorten what is to count."
            )

    def bounds(self, name: str) -> tuple[int, int, int]:
        """The first row of a split that this shard has, the one behind its last, and N."""
        total = len(self._dataset.splits[name].labels)
        rows = self._shard.rows(total, self._config.batch_size)
        return rows.start, rows.stop, total

    def encode_split(self, name: str) -> None:
        split = self._dataset.splits[name]
        start, stop, _ = self.bounds(name)
        done = self._writer.consumed(name)
        plan = Plan(
            start=start + done,
            stop=stop,
            batch_size=self._config.batch_size,
            workers=self._config.workers,
            views=1 + self._config.views if name == "train" else 1,
            seed=self._config.augment_seed,
            skip=self._config.on_error == "skip",
            pinned=self._encoder.device.type == "cuda",
        )
        shown = (
            nullcontext(_no_advance)
            if self._quiet
            else progress(f"encode {name}", stop - start, done)
        )
        clock = Stopwatch()
        count = 0
        with shown as advance, InOrder() as writing:
            for batch in encode_images(self._encoder, split, plan, self.watch):
                with self.watch("write"):
                    writing.submit(self._append, name, batch)
                handled = len(batch.rows) + len(batch.skipped)
                count += handled
                self._images += len(batch.rows)
                if batch.skipped and self._reason is None:
                    self._reason = batch.skipped[0].reason
                advance(handled, self._note(count, plan.stop - plan.start - count, clock.elapsed))
        self._seconds += clock.elapsed

    def _append(self, name: str, batch: EncodedBatch) -> None:
        split = self._dataset.splits[name]
        self._writer.append_images(
            name,
            batch.features,
            split.labels[batch.rows],
            [split.ids[row] for row in batch.rows],
            [image.name for image in batch.skipped],
            batch.digests,
            split.labels[[image.row for image in batch.skipped]],
        )

    def _note(self, count: int, remaining: int, seconds: float) -> str:
        rate = count / seconds
        minutes, rest = divmod(round(remaining / rate), 60)
        return f"{rate:,.0f} images/s, {minutes}:{rest:02} left; {self.watch.shares()}"

    def summary(self, tallies: Mapping[str, Tally]) -> str:
        shard = self._shard
        part = f" (part {shard.index} of {shard.of})" if shard.of > 1 else ""
        lines = [describe(self._config.out, tallies, len(self._dataset.class_names), part)]
        if skipped := describe_skipped(tallies, self._reason):
            lines.append(skipped)
        if self._images:
            rate = self._images / self._seconds
            compiled = self._encoder.compile_seconds
            compiling = f"; {compiled:.0f} s to compile" if compiled else ""
            encoded = counted(self._images, "image")
            lines.append(
                f"{encoded} in {self._seconds:.1f} s ({rate:,.0f} images/s): "
                f"{self.watch.shares()}{compiling}"
            )
        return "\n".join(lines)


def _no_advance(count: int, note: str) -> None:
    """Progress that nobody sees."""


def _rows_sha256(dataset: ImageDataset) -> str:
    """SHA-256 over the ids and labels of every split, in order."""
    digest = hashlib.sha256()
    for name, split in dataset.splits.items():
        digest.update(json.dumps([name, *split.ids]).encode())
        digest.update(np.ascontiguousarray(split.labels, np.int32).tobytes())
    return digest.hexdigest()
