"""The encoding of one `extract`: what is known already, and what is not, split by split."""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager

from clip_adapter.cache.content import Content, Tally
from clip_adapter.cache.metadata import Part
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.rows import StoredRows
from clip_adapter.cache.staging import Batch, StagingFolder
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.encoding.encoder import FEATURES, FEATURES2, EncodedBatch, Stopwatch
from clip_adapter.extract.encoding.unreadable import BrokenImage, name_all
from clip_adapter.extract.known import IMAGES, Known, KnownRows, stamps
from clip_adapter.extract.local_encoding import Encoding
from clip_adapter.extract.outcome import describe, describe_skipped, refuse_skipped
from clip_adapter.extract.shards import Shard
from clip_adapter.extract.stage import SKIPPED, TEXT, StagedText, stage_images
from clip_adapter.extract.text.encode_text import TextPlan
from clip_adapter.listener import Listener
from clip_adapter.words import counted, quoted


class EncodeJob:
    """What encoding a split needs, and what it is told on the way."""

    def __init__(
        self,
        config: ExtractConfig,
        shard: Shard,
        dataset: ImageDataset,
        encoding: Encoding,
        place: StagingFolder,
        listener: Listener,
    ) -> None:
        self._config = config
        self._shard = shard
        self._dataset = dataset
        self._encoding = encoding
        self._place = place
        self._listener = listener
        self._reason: str | None = None  # why the first image was skipped
        self._stamps = {n: stamps(s, dataset.provenance) for n, s in dataset.splits.items()}
        self.known = self._nothing_known(FEATURES, IMAGES)
        self._second: Known | None = None
        if stated := encoding.about.second:  # by which its batches are known
            kind = f"{IMAGES} {json.dumps(stated, sort_keys=True)}"
            self._second = self._nothing_known(FEATURES2, kind)
        self._text: dict[str, Batch] = {}  # by the id of the first of its classes
        self._kept = 0
        self._images = 0
        self._seconds = 0.0
        self.watch = Stopwatch()

    def _nothing_known(self, encoder: str, kind: str) -> Known:
        rows = {
            name: KnownRows(
                split,
                self._stamps[name],
                self._encoding.rows(encoder, self._views(name)),
                self._shard.rows(len(split.labels), self._config.batch_size),
            )
            for name, split in self._dataset.splits.items()
        }
        return Known(rows, kind)

    def content(self) -> Content:
        """What the cache has of the images."""
        content = {**self.known.content()}
        if self._second:
            own = self._second.content()
            content |= {path: own[path] for path in own if path.endswith(f"/{FEATURES2}")}
        return content

    def _views(self, split: str) -> int:
        return 1 + self._config.views if split == "train" else 1

    def look_around(self, earlier: FeatureCache | None) -> None:
        """Find what is encoded already, by an interrupted run or in an earlier cache, and say so.

        Raises UserError where images were skipped that should not be.
        """
        known, second, workers = self.known, self._second, self._config.workers
        for batch, ids in self._place.batches():
            if batch.kind == IMAGES:
                known.look_in(batch, ids)
            elif batch.kind == SKIPPED:
                known.skip(ids, batch.read("stamps", 0, batch.count))
            elif second and batch.kind == second.kind:
                second.look_in(batch, ids)
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
            stated = json.loads(json.dumps(self._encoding.about.second))
            if second and earlier.backbone2 == stated:
                for split in earlier.all_splits:
                    second.look_in(StoredRows(earlier, split), earlier.ids(split))
        if second:
            second.settle(workers)
            known.without_skipped_of(second)

    def text(self, plan: TextPlan, earlier: FeatureCache | None) -> Content:
        """What the cache has of the classes."""
        staged = StagedText(
            self._encoding, plan, self._place, with_tokens=self._config.with_text_tower
        )
        content = staged.content(self._text, earlier)
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
        """By each of the encoders, what is not known by it."""
        self._encode(name, FEATURES, self.known)
        if self._second and (stated := self._encoding.about.second):
            self.known.without_skipped_of(self._second)
            self._encode(name, FEATURES2, self._second, f" by {stated['name']}")
            self.known.without_skipped_of(self._second)

    def _encode(self, name: str, encoder: str, every: Known, note: str = "") -> None:
        known = every.splits[name]
        missing, total = known.missing, len(known.bounds)
        shown = self._listener.progress(f"encode {name}{note}", total, total - len(missing))
        clock = Stopwatch()
        count = 0
        with shown as advance, self._naming_all(name):
            while len(known.missing):  # again, where something was lost on the way
                before = count
                with closing(self._staged(name, encoder, every)) as batches:
                    for batch in batches:
                        handled = len(batch.rows) + len(batch.skipped)
                        count += handled
                        self._images += len(batch.rows) if every is self.known else 0
                        if batch.skipped and self._reason is None:
                            self._reason = batch.skipped[0].reason
                        advance(handled, self._note(count, len(missing) - count, clock.elapsed))
                if count == before:
                    raise RuntimeError(f"nothing came back of {len(known.missing)} images")
        self._seconds += clock.elapsed

    def _staged(self, name: str, encoder: str, every: Known) -> Generator[EncodedBatch, None, None]:
        """What is missing of a split, kept as it comes."""
        known = every.splits[name]
        plan = Plan(
            rows=known.missing,
            batch_size=self._config.batch_size,
            workers=self._config.workers,
            views=self._views(name),
            seed=self._config.augment_seed,
            skip=self._config.on_error == "skip",
        )
        batches = self._encoding.images(encoder, name, plan, self.watch)
        return stage_images(batches, known, every, self._place, self.watch)

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
            compiled = self._encoding.compile_seconds
            compiling = f"; {compiled:.0f} s to compile" if compiled else ""
            encoded = counted(self._images, "image")
            lines.append(
                f"{encoded} in {self._seconds:.1f} s ({rate:,.0f} images/s): "
                f"{self.watch.shares()}{compiling}"
            )
        return "\n".join(lines)
