"""Encode what is not known yet, and keep it batch by batch in the staging folder."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from clip_adapter.cache.content import Content, check_features
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.cache.staging import Batch, StagingFolder
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.encoding.encoder import EncodedBatch, Stopwatch
from clip_adapter.extract.known import Known, KnownRows
from clip_adapter.extract.local_encoding import Encoding
from clip_adapter.extract.text.encode_text import TextPlan
from clip_adapter.extract.text.prompts import (
    descriptions_in_order,
    random_templates,
    read_descriptions,
    resolve_templates,
)

SKIPPED, TEXT = "skipped", "text"  # kinds of batches, beside known.IMAGES
BATCHES_BEHIND = 4


def stage_images(
    batches: Iterable[EncodedBatch],
    split: KnownRows,
    known: Known,
    place: StagingFolder,
    watch: Stopwatch,
) -> Generator[EncodedBatch, None, None]:
    """Keep batches of a split as they are encoded, and give them out.

    They are written in a second thread, at most four behind, so that memory stays bounded; all are
    on the disk at the end, whatever ends it. Raises UserError as what encodes does, and where the
    disk is full.
    """
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        for batch in batches:
            with watch("write"):
                while pending and (pending[0].done() or len(pending) >= BATCHES_BEHIND):
                    pending.popleft().result()
                pending.append(pool.submit(_keep, place, split, known, batch))
            yield batch
        for written in pending:
            written.result()


def _keep(place: StagingFolder, split: KnownRows, known: Known, batch: EncodedBatch) -> None:
    if len(batch.rows):
        arrays = batch.of_each_image() | {"stamps": split.stamps[batch.rows]}
        ids = [split.split.ids[row] for row in batch.rows.tolist()]
        split.put(batch.rows, known.add(place.add(known.kind, ids, arrays)))
    if batch.skipped:
        rows = np.array([image.row for image in batch.skipped])
        ids = [image.name for image in batch.skipped]
        place.add(SKIPPED, ids, {"stamps": split.stamps[rows]})
        split.skip(rows)


def text_plan(config: ExtractConfig, dataset: ImageDataset) -> TextPlan:
    """The prompts of each class: those asked for, or the data set's own."""
    if config.prompt_control is not None:
        drawn = random_templates(config.prompt_control, dataset.class_names)
        return TextPlan(dataset.class_names, drawn)
    templates = resolve_templates(config.templates)
    if config.descriptions is None:
        return TextPlan(dataset.class_names, templates or dataset.templates)
    stored = read_descriptions(config.descriptions)
    own = descriptions_in_order(stored, dataset.class_names)
    return TextPlan(dataset.class_names, templates, own)


class StagedText:
    """The classes' text features, and their tokens if asked for.

    too_long: those of the newly encoded prompts of which the text tower reads only the beginning.
    """

    def __init__(
        self, encoding: Encoding, plan: TextPlan, place: StagingFolder, *, with_tokens: bool
    ) -> None:
        self._encoding, self._plan, self._place = encoding, plan, place
        self._with_tokens = with_tokens
        # Known by all prompts and by their place: text of other batches has other last bits.
        self._ids = [f"{plan.sha256()} {label}" for label in range(len(plan.class_names))]
        self.too_long: list[str] = []

    def content(self, staged: Mapping[str, Batch], earlier: FeatureCache | None) -> Content:
        """What the cache has of the classes: of an earlier one, where it has all of it.

        staged: what an interrupted run kept, by the id of each batch's first class.
        """
        plan, names = self._plan, ("features", "tokens")[: 1 + self._with_tokens]
        tokens_there = earlier and (earlier.has("tokens") or not self._with_tokens)
        if earlier and tokens_there and plan.is_in(earlier):
            arrays = {name: earlier.values_of(f"text/{name}") for name in names}
        else:
            batches = list(self._batches(staged))
            arrays = {
                name: np.concatenate([batch.read(name, 0, batch.count) for batch in batches])
                for name in names
            }
        content: dict[str, Any] = {f"text/{name}": values for name, values in arrays.items()}
        content["text/class_names"] = plan.class_names
        content["text/templates"] = plan.stored_templates
        if plan.descriptions:
            labels = range(len(plan.class_names))
            content["text/prompts"] = [plan.filled(label) for label in labels]
        return content

    def _batches(self, staged: Mapping[str, Batch]) -> Iterator[Batch]:
        start, count = 0, len(self._ids)
        while start < count and (batch := staged.get(self._ids[start])):
            if self._with_tokens and "tokens" not in batch.rows:
                break
            yield batch
            start += batch.count
        for encoded in self._encoding.text(self._plan, range(start, count)):
            stop = start + len(encoded.features)
            check_features(encoded.features, self._plan.class_names[start:stop])
            arrays: dict[str, np.ndarray] = {"features": encoded.features}
            if self._with_tokens:
                arrays["tokens"] = encoded.tokens
            yield self._place.add(TEXT, self._ids[start:stop], arrays)
            self.too_long += encoded.too_long
            start = stop
