"""One `extract` from the opened data set to the finished file."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch

from clip_adapter.cache.content import (
    Content,
    Tally,
    check_strings,
    in_several_splits,
    tally,
)
from clip_adapter.cache.metadata import Part
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.rows import StoredRows
from clip_adapter.cache.schema import UNLABELLED
from clip_adapter.cache.staging import Batch, StagingFolder
from clip_adapter.cache.text_tower import encode_text_tower, tower_path, write_text_tower
from clip_adapter.cache.writer import write_cache
from clip_adapter.extract.backbones.loading import Backbone, load_backbone
from clip_adapter.extract.backbones.text_arrays import take_text_tower
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.encoding.device import find_device, find_precision
from clip_adapter.extract.encoding.encoder import Encoder, Stopwatch
from clip_adapter.extract.encoding.unreadable import BrokenImage, name_all
from clip_adapter.extract.known import Known, KnownRows, rows_sha256, stamps
from clip_adapter.extract.outcome import (
    describe,
    describe_skipped,
    refuse_skipped,
    warn_of_duplicates,
    warn_of_lost_classes,
    warn_of_shared_groups,
)
from clip_adapter.extract.shards import Shard
from clip_adapter.extract.stage import IMAGES, SKIPPED, TEXT, StagedText, stage_images, text_plan
from clip_adapter.extract.text.encode_text import TextPlan, classes_with_one_text
from clip_adapter.extract.update import UPDATABLE, refuse_other_features, text_of
from clip_adapter.listener import Listener
from clip_adapter.words import counted, quoted, same_text


def run_job(config: ExtractConfig, shard: Shard, place: StagingFolder, listener: Listener) -> str:
    """Encode what is not known yet, write the file (a part of a cache where there are several
    shards) and return what to say about it.

    place: where to write.
    """
    dataset = open_dataset(config.dataset, config.source_options(listener))
    for remark in dataset.remarks:
        listener.warn(remark)
    for split in dataset.splits.values():
        check_strings(split.ids)
    text = text_plan(config, dataset)
    device = find_device(config.device)
    precision = find_precision(config.precision, device)
    backbone = load_backbone(config.backbone, config.pretrained, precision)
    if backbone.assumption:
        listener.warn(backbone.assumption)
    described, preprocess = dict(backbone.identity), backbone.preprocess_config
    weights = backbone.identity["weights_sha256"]
    taken = text_of(config.like, weights, preprocess) if config.like else None
    tower = _tower(config, backbone, precision, dataset) if config.with_text_tower else None
    if tower is not None:
        described["text_tower_sha256"] = hashlib.sha256(tower).hexdigest()
    # What a resumed run must agree on beyond its arguments: the weights, which may change under an
    # unchanged path.
    identity = {
        **config.identity(),
        "precision": precision,
        "weights_sha256": weights,
        "preprocess": preprocess,
    }
    place.begin(identity, restart=config.force, may_differ=UPDATABLE if config.update else ())
    with warnings.catch_warnings(), ExitStack() as stack:
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
            refuse_other_features(earlier, weights, preprocess, precision)
        job = _Job(config, shard, dataset, encoder, place, listener)
        job.look_around(earlier)
        content: dict[str, Any] = {}
        if shard.index == 1:  # which has what belongs to no image
            content |= taken or job.text(text, earlier)
            if not taken and (groups := classes_with_one_text(encoder, text)):
                listener.warn(same_text(groups))
            if encoder.projection is not None:
                content["projection/weights"], bias = encoder.projection.arrays()
                content |= {} if bias is None else {"projection/bias": bias}
        for name in dataset.splits:
            job.encode_split(name)
        content |= job.known.content()
        record: dict[str, Any] = {
            **dataset.provenance,
            "splits": {name: split.origin for name, split in dataset.splits.items()},
            "device": str(device),
            "torch_version": torch.__version__,
        }
        tallies = tally(content)
        if shard.of == 1:
            if several := in_several_splits(content):
                record["in_several_splits"] = several
            warn_of_duplicates(several, listener)
            labelled = {n: one.groups for n, one in dataset.splits.items() if n != UNLABELLED}
            warn_of_shared_groups(labelled, listener)
            warn_of_lost_classes(tallies, dataset.class_names, listener)
        with job.watch("write"):
            if tower is not None and shard.index == 1:
                write_text_tower(tower_path(place.path), tower)
            write_cache(
                place,
                content,
                backbone=described,
                preprocess=preprocess,
                dataset=record,
                logit_scale=backbone.logit_scale,
                logit_bias=backbone.logit_bias,
                arguments={**identity, "rows_sha256": rows_sha256(dataset.splits)},
                part=job.part,
                templates=taken["text/templates"] if taken else text.stored_templates,
            )
    return job.summary(tallies)


def _tower(
    config: ExtractConfig, backbone: Backbone, precision: str, dataset: ImageDataset
) -> bytes:
    if precision != "fp32":  # the tower is stored as it was trained
        backbone = load_backbone(config.backbone, config.pretrained, "fp32")
    return encode_text_tower(take_text_tower(backbone, dataset.class_names))


class _Job:
    """What encoding a split needs, and what it is told on the way."""

    def __init__(
        self,
        config: ExtractConfig,
        shard: Shard,
        dataset: ImageDataset,
        encoder: Encoder,
        place: StagingFolder,
        listener: Listener,
    ) -> None:
        self._config = config
        self._shard = shard
        self._dataset = dataset
        self._encoder = encoder
        self._place = place
        self._listener = listener
        self._reason: str | None = None  # why the first image was skipped
        self.known = Known(
            {
                name: KnownRows(
                    split,
                    stamps(split, dataset.provenance),
                    encoder.rows(self._views(name)),
                    shard.rows(len(split.labels), config.batch_size),
                )
                for name, split in dataset.splits.items()
            }
        )
        self._text: dict[str, Batch] = {}  # by the id of the first of its classes
        self._kept = 0
        self._images = 0
        self._seconds = 0.0
        self.watch = Stopwatch()

    def _views(self, split: str) -> int:
        return 1 + self._config.views if split == "train" else 1

    def look_around(self, earlier: FeatureCache | None) -> None:
        """Find what is encoded already, by an interrupted run or in an earlier cache, and say so.

        Raises UserError where images were skipped that should not be.
        """
        known, workers = self.known, self._config.workers
        for batch, ids in self._place.batches():
            if batch.kind == IMAGES:
                known.look_in(batch, ids)
            elif batch.kind == SKIPPED:
                known.skip(ids, batch.read("stamps", 0, batch.count))
            elif batch.kind == TEXT:
                self._text[ids[0]] = batch
        known.settle(workers)
        if self._config.on_error == "fail":
            refuse_skipped(self._config.out, known.skipped)
        if done := known.count:
            total = sum(len(split.bounds) for split in known.splits.values())
            self._listener.note(
                f"goes on from image {done:,} of {total:,}, where an earlier run stopped"
            )
        if earlier is not None:
            for split in earlier.all_splits:
                known.look_in(StoredRows(earlier, split), earlier.ids(split))
            known.settle(workers)
            self._kept = known.count - done

    def text(self, plan: TextPlan, earlier: FeatureCache | None) -> Content:
        """What the cache has of the classes."""
        staged = StagedText(
            self._encoder, plan, self._place, with_tokens=self._config.with_text_tower
        )
        content = staged.content(self._text, earlier, self._config.batch_size)
        if too_long := staged.too_long:
            self._listener.warn(
                f"the text tower reads only the beginning of {counted(len(too_long), 'prompt')}, "
                f"the first of them {quoted(too_long[0])}; shorten what is to count."
            )
        return content

    @property
    def part(self) -> Part | None:
        if self._shard.of == 1:
            return None
        rows = {
            name: (known.bounds.start, known.bounds.stop, len(known.source))
            for name, known in self.known.splits.items()
        }
        return Part(self._shard.index, self._shard.of, rows)

    def encode_split(self, name: str) -> None:
        known = self.known.splits[name]
        missing, total = known.missing, len(known.bounds)
        plan = Plan(
            rows=missing,
            batch_size=self._config.batch_size,
            workers=self._config.workers,
            views=self._views(name),
            seed=self._config.augment_seed,
            skip=self._config.on_error == "skip",
            pinned=self._encoder.device.type == "cuda",
        )
        shown = self._listener.progress(f"encode {name}", total, total - len(missing))
        clock = Stopwatch()
        count = 0
        batches = stage_images(self._encoder, known, self.known, plan, self._place, self.watch)
        with shown as advance, self._naming_all(name), closing(batches):
            for batch in batches:
                handled = len(batch.rows) + len(batch.skipped)
                count += handled
                self._images += len(batch.rows)
                if batch.skipped and self._reason is None:
                    self._reason = batch.skipped[0].reason
                advance(handled, self._note(count, len(missing) - count, clock.elapsed))
        self._seconds += clock.elapsed

    @contextmanager
    def _naming_all(self, name: str) -> Iterator[None]:
        """Where an image that cannot be decoded ends the run, the others are named with it."""
        try:
            yield
        except BrokenImage as broken:
            every = [(one.split, one.bounds) for one in self.known.splits.values()]
            (split, bounds), *later = every[list(self.known.splits).index(name) :]
            rest = [(split, range(broken.image.row + 1, bounds.stop)), *later]
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
