"""What encodes: tasks on the nodes of a Ray cluster, each by the models that its worker keeps.

The batches of a task are those that one process would make of its rows, so that features are the
same to the last bit; the staging folder of whoever asks is the only state.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from clip_adapter.cache.rows import Rows
from clip_adapter.cluster import Cluster, this_node
from clip_adapter.cores import available_cores
from clip_adapter.errors import UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.extract.datasets.registry import open_dataset
from clip_adapter.extract.datasets.source import ImageDataset
from clip_adapter.extract.encoding.decode import Plan
from clip_adapter.extract.encoding.encoder import FEATURES, FEATURES2, EncodedBatch, Stopwatch
from clip_adapter.extract.known import rows_sha256
from clip_adapter.extract.local_encoding import (
    About,
    LocalEncoding,
    Projection,
    packages,
)
from clip_adapter.extract.text.encode_text import EncodedClasses, TextPlan
from clip_adapter.words import some

TASK_SECONDS = 1.0
MOST_BATCHES = 32  # of a task, whose features are in memory at once
# What the nodes have to agree on, in words.
ALIKE = {
    "packages": "packages",
    "rows_sha256": "images, classes or splits",
    "backbone": "weights",
    "preprocess": "preprocessing",
    "second": "weights of --also",
    "precision": "precision",
    "device": "kind of device",
    "threads": "threads",
}


class RayEncoding:
    """An Encoding of tasks.

    Raises UserError naming a node that would give other numbers than the first one, or whose images
    or packages are not those of this process.
    """

    compile_seconds = 0.0  # each worker compiles by itself

    def __init__(self, cluster: Cluster, config: ExtractConfig, dataset: ImageDataset) -> None:
        if config.device == "cuda" and not cluster.gpus:
            raise UserError("--device cuda: no node of the Ray cluster has a GPU.")
        self._cluster, self._config = cluster, config
        self._gpu = config.device != "cpu" and cluster.gpus > 0
        self._alike: Mapping[str, Any] = {
            "packages": packages(),
            "rows_sha256": rows_sha256(dataset.splits),
        }
        self._batches = 1  # of a task, until it is known how fast they are
        ((self.about, self._rows, self._projection),) = self._results([(_about,)])
        self._alike = {name: getattr(self.about, name) for name in ALIKE}

    def _results(self, calls: Any) -> Iterator[Any]:
        """Of functions of this module and what they take beside a worker's encoding."""
        folder = os.getcwd()  # noqa: PTH109
        told = ((self._config, self._alike, folder, *call) for call in calls)
        return self._cluster.results(_call, told, gpu=self._gpu)

    def rows(self, encoder: str, views: int) -> Rows:
        of_one = self._rows[encoder]
        return {n: (kind, (views, *row[1:]) if row else ()) for n, (kind, row) in of_one.items()}

    def projection(self) -> Projection | None:
        return self._projection

    def text_tower(self) -> bytes:
        (tower,) = self._results([(LocalEncoding.text_tower,)])
        return tower

    def same_text(self, plan: TextPlan) -> list[list[str]]:
        (groups,) = self._results([(LocalEncoding.same_text, plan)])
        return groups

    def text(self, plan: TextPlan, labels: range) -> Iterator[EncodedClasses]:
        step = plan.classes_of_a_batch(self._config.batch_size)
        bounds = [labels.start, *range((labels.start // step + 1) * step, labels.stop, step)]
        pieces = [range(*ends) for ends in pairwise([*bounds, labels.stop])]
        shared = self._cluster.put(plan)
        for batches in self._results((_text, shared, piece) for piece in pieces if piece):
            yield from batches

    def images(
        self, encoder: str, split: str, plan: Plan, watch: Stopwatch
    ) -> Iterator[EncodedBatch]:
        results = self._results((_images, encoder, split, piece) for piece in self._pieces(plan))
        while True:
            with watch("encode"):
                result = next(results, None)
            if result is None:
                return
            batches, failure, seconds = result
            yield from batches
            if failure is not None:
                raise failure
            per_batch = seconds / len(batches)
            self._batches = max(1, min(MOST_BATCHES, round(TASK_SECONDS / per_batch)))

    def _pieces(self, plan: Plan) -> Iterator[Plan]:
        start = 0
        while start < len(plan.rows):
            stop = start + self._batches * plan.batch_size
            yield replace(plan, rows=plan.rows[start:stop])
            start = stop


def _call(
    config: ExtractConfig, alike: Mapping[str, Any], folder: str, function: Any, *arguments: Any
) -> Any:
    """In a worker: what the function gives for its encoding."""
    import ray

    try:
        encoding = _opened(config, folder, *ray.get_gpu_ids()[:1])
        _refuse_unlike(encoding.about, alike)
    except UserError as error:
        raise UserError(f"Node {this_node()}: {error}").with_notes_of(error) from error
    return function(encoding, *arguments)


@lru_cache(maxsize=1)
def _opened(config: ExtractConfig, folder: str, *gpu: object) -> LocalEncoding:
    """With one thread a pass, as processes on up to four cores have: bits depend on it."""
    with suppress(OSError):  # what has a whole path is there all the same
        os.chdir(folder)
    torch.set_num_threads(1)
    own = replace(config, device="cpu", workers=1)
    if gpu:
        workers = max(1, available_cores() // max(1, torch.cuda.device_count()))
        own = replace(config, device=f"cuda:{gpu[0]}", workers=workers)
    encoding = LocalEncoding(own, open_dataset(own.dataset, own.source_options()))
    encoding.about = replace(encoding.about, device="cuda" if gpu else "cpu")
    return encoding


def _refuse_unlike(about: About, alike: Mapping[str, Any]) -> None:
    other = [name for name, value in alike.items() if getattr(about, name) != value]
    if not other:
        return
    words = [ALIKE[name] for name in other]
    if "packages" in other:
        pairs = about.packages.items() - alike["packages"].items()
        words[other.index("packages")] = f"packages ({some([' '.join(one) for one in pairs])})"
    raise UserError(
        f"it has other {' and '.join(words)} than where the run began, which would mix numbers of "
        "two kinds; make the node like the others, or take it out of the cluster."
    )


def _about(encoding: LocalEncoding) -> tuple[About, dict[str, Rows], Projection | None]:
    names = (FEATURES, FEATURES2) if encoding.about.second else (FEATURES,)
    rows = {name: encoding.rows(name, 1) for name in names}
    return encoding.about, rows, encoding.projection()


def _text(encoding: LocalEncoding, plan: TextPlan, labels: range) -> list[EncodedClasses]:
    return [*encoding.text(plan, labels)]


def _images(
    encoding: LocalEncoding, encoder: str, split: str, plan: Plan
) -> tuple[list[EncodedBatch], UserError | None, float]:
    """Batches, what ended them before the last one, and seconds."""
    batches, watch = [], Stopwatch()
    try:
        for batch in encoding.images(encoder, split, plan, watch):
            batches.append(batch)
    except UserError as error:
        return batches, error, watch.elapsed
    return batches, None, watch.elapsed
