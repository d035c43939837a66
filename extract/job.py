"""One `extract` from the opened data set to the finished file."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clip_adapter.cache.metadata import Part
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.reuse import rows_of_cache, rows_of_staging
from clip_adapter.cache.staging import StagingFolder
from clip_adapter.cache.tally import Tally, in_several_splits, tally
from clip_adapter.cache.text_tower import encode_text_tower, tower_path, write_text_tower
from clip_adapter.cache.writer import CacheWriter
from clip_adapter.extract.backbones.loading import load_backbone
from clip_adapter.extract.backbones.text_arrays import take_text_tower
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.encoding.device import find_device, find_precision
from clip_adapter.extract.encoding.encoder import Encoder, encode_images
from clip_adapter.extract.encoding.in_order import InOrder
from clip_adapter.extract.encoding.stopwatch import Stopwatch
from clip_adapter.extract.encoding.unreadable import BrokenImage, name_all
from clip_adapter.extract.fingerprints import stamps
from clip_adapter.extract.outcome import (
    describe,
    describe_skipped,
    refuse_skipped,
    warn_of_duplicates,
    warn_of_lost_classes,
)
from clip_adapter.extract.reuse import NOWHERE, Earlier, listing_sha256, rows_sha256
from clip_adapter.extract.shards import Shard
from clip_adapter.extract.split_rows import SplitRows
from clip_adapter.extract.text.encode_text import TextPlan, classes_with_one_text, encode_classes
from clip_adapter.extract.text.prompts import (
    descriptions_in_order,
    read_descriptions,
    resolve_templates,
)
from clip_adapter.extract.update import UPDATABLE, refuse_other_features
from clip_adapter.listener import Listener
from clip_adapter.words import counted, quoted, same_text

STAGING = "rows-"  # and the hash of the listing that they are the rows of


def run_job(config: ExtractConfig, shard: Shard, place: StagingFolder, listener: Listener) -> str:
    """Encode what is not staged yet, write the file (a part of a cache where there are several
    shards) and return what to say about it.

    place: where to write.
    """
    identity = config.identity()
    dataset = open_dataset(config.dataset, config.source_options(listener))
    for remark in dataset.remarks:
        listener.warn(remark)
    text = _text_plan(config, dataset)
    device = find_device(config.device)
    precision = find_precision(config.precision, device)
    backbone = load_backbone(config.backbone, config.pretrained, precision)
    if backbone.assumption:
        listener.warn(backbone.assumption)
    described = dict(backbone.identity)
    tower = None
    if config.with_text_tower:
        whole = backbone
        if precision != "fp32":  # the tower is stored as it was trained
            whole = load_backbone(config.backbone, config.pretrained, "fp32")
        tower = encode_text_tower(take_text_tower(whole, dataset.class_names))
        described["text_tower_sha256"] = hashlib.sha256(tower).hexdigest()
    # What a resumed run must agree on beyond its arguments: the weights and the rows themselves,
    # which may change under an unchanged path.
    identity["precision"] = precision
    identity["weights_sha256"] = backbone.identity["weights_sha256"]
    identity["preprocess"] = backbone.preprocess_config
    stated = dict(identity)
    identity["rows_sha256"] = rows_sha256(dataset.splits)
    now = {name: stamps(split, dataset.provenance) for name, split in dataset.splits.items()}
    changeable = {name: identity[name] for name in UPDATABLE} | {"prompts": text.sha256()}
    with (
        warnings.catch_warnings(),
        ExitStack() as stack,
        CacheWriter(
            place,
            identity,
            views=1 + config.views,
            restart=config.force,
            stated=stated,
            may_differ=UPDATABLE if config.update else (),
            staging=f"{STAGING}{listing_sha256(dataset, now, changeable)}",
        ) as writer,
    ):
        # Pillow remarks on oddities of files that decode all the same; the others get a sentence.
        warnings.filterwarnings("ignore", module="PIL")
        encoder = Encoder(
            backbone,
            device,
            config.batch_size,
            compiled=config.compile,
            with_projection=config.with_projection,
        )
        earlier = None
        if config.update and config.out.exists():
            earlier = stack.enter_context(FeatureCache(config.out))
            weights, preprocess = identity["weights_sha256"], backbone.preprocess_config
            refuse_other_features(earlier, weights, preprocess, precision)
        tables = list(rows_of_cache(earlier)) if earlier else []
        for folder in place.folder.glob(f"{STAGING}*"):
            if folder != writer.staging:
                tables += rows_of_staging(folder, stack)
        known = Earlier(tables, encoder.arrays)
        job = _Job(config, shard, dataset, encoder, writer, listener, now, known)
        job.check_what_is_there()
        if shard.index == 1:
            if not (earlier and job.keep_text(text, earlier)):
                job.encode_text(text)
            if groups := classes_with_one_text(encoder, text):
                listener.warn(same_text(groups))
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
            warn_of_duplicates(several, listener)
            warn_of_lost_classes(tallies, dataset.class_names, listener)
        with job.watch("write"):
            projection = None
            if shard.index == 1:  # which has what belongs to no image
                if encoder.projection is not None:
                    projection = encoder.projection.arrays()
                if tower is not None:
                    write_text_tower(tower_path(place.path), tower)
            writer.finish(
                templates=text.stored_templates,
                backbone=described,
                preprocess=backbone.preprocess_config,
                dataset=record,
                logit_scale=backbone.logit_scale,
                logit_bias=backbone.logit_bias,
                projection=projection,
                part=part,
            )
    return job.summary(tallies)


def _text_plan(config: ExtractConfig, dataset: ImageDataset) -> TextPlan:
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
        config: ExtractConfig,
        shard: Shard,
        dataset: ImageDataset,
        encoder: Encoder,
        writer: CacheWriter,
        listener: Listener,
        now: Mapping[str, npt.NDArray[np.uint64]],
        earlier: Earlier,
    ) -> None:
        self._config = config
        self._shard = shard
        self._dataset = dataset
        self._encoder = encoder
        self._writer = writer
        self._listener = listener
        self._reason: str | None = None  # why the first image was skipped
        self._stamps = now
        self._known = {
            name: earlier.find(split, now[name], self._views(name), config.workers)
            for name, split in dataset.splits.items()
        }
        self._kept = 0
        self._images = 0
        self._seconds = 0.0
        self.watch = Stopwatch()

    def check_what_is_there(self) -> None:
        """Say where it goes on.

        Raises UserError where images were skipped that should not be.
        """
        if self._config.on_error == "fail":
            names = self._dataset.splits
            skipped = sum(1 for name in names for _ in self._writer.listed(name, "skipped"))
            refuse_skipped(self._config.out, skipped)
        bounds = {name: self.bounds(name) for name in self._dataset.splits}
        total = sum(stop - start for start, stop, _ in bounds.values())
        done = sum(self._writer.consumed(name) for name in bounds)
        if done:
            self._listener.note(
                f"goes on from image {done:,} of {total:,}, where an earlier run stopped"
            )

    def _views(self, split: str) -> int:
        return 1 + self._config.views if split == "train" else 1

    def keep_text(self, plan: TextPlan, earlier: FeatureCache) -> bool:
        """Take what a cache has of the text, if that is all and of these classes and prompts."""
        with_tokens = self._config.with_text_tower
        if self._writer.text_rows() or (with_tokens and not earlier.has("tokens")):
            return False
        if not plan.is_in(earlier):
            return False
        tokens = earlier.tokens() if with_tokens else None
        features, names = earlier.text_features(), earlier.class_names
        self._writer.append_text(features, names, earlier.prompts(), tokens)
        return True

    def encode_text(self, plan: TextPlan) -> None:
        batches = encode_classes(
            self._encoder,
            plan,
            start=self._writer.text_rows(),
            batch_size=self._config.batch_size,
        )
        too_long: list[str] = []
        for batch in batches:
            tokens = batch.tokens if self._config.with_text_tower else None
            self._writer.append_text(batch.features, batch.names, batch.prompts, tokens)
            too_long += batch.too_long
        if too_long:
            self._listener.warn(
                f"the text tower reads only the beginning of {counted(len(too_long), 'prompt')}, "
                f"the first of them {quoted(too_long[0])}; shorten what is to count."
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
        known = self._known[name]
        left = np.arange(start + done, stop)
        fresh = left[known.table[left] == NOWHERE]
        kept = len(left) - len(fresh)
        self._kept += kept
        plan = Plan(
            rows=fresh,
            batch_size=self._config.batch_size,
            workers=self._config.workers,
            views=self._views(name),
            seed=self._config.augment_seed,
            skip=self._config.on_error == "skip",
            pinned=self._encoder.device.type == "cuda",
        )
        shown = self._listener.progress(f"encode {name}", stop - start, done + kept)
        clock = Stopwatch()
        count = 0
        rows = SplitRows(self._writer, name, split, self._stamps[name], known, plan, start + done)
        with shown as advance, self._naming_all(name), InOrder() as writing:
            for batch in encode_images(self._encoder, split, plan, self.watch):
                with self.watch("write"):
                    writing.submit(rows.append, batch)
                handled = len(batch.rows) + len(batch.skipped)
                count += handled
                self._images += len(batch.rows)
                if batch.skipped and self._reason is None:
                    self._reason = batch.skipped[0].reason
                advance(handled, self._note(count, len(fresh) - count, clock.elapsed))
            writing.submit(rows.append_known, stop)
        self._seconds += clock.elapsed

    @contextmanager
    def _naming_all(self, name: str) -> Iterator[None]:
        """Where an image that cannot be decoded ends the run, the others are named with it."""
        try:
            yield
        except BrokenImage as broken:
            start, stop, _ = self.bounds(name)
            names = list(self._dataset.splits)
            rest = [(self._dataset.splits[name], range(broken.image.row + 1, stop))]
            for later in names[names.index(name) + 1 :]:
                start, stop, _ = self.bounds(later)
                rest.append((self._dataset.splits[later], range(start, stop)))
            raise name_all(broken.image, rest, self._config.workers) from broken

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
        if self._kept:
            lines.append(f"{counted(self._kept, 'image')} kept as encoded before")
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
