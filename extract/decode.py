"""Decode a split into batches of pixels, in threads, ahead of the model."""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from clip_adapter.cache.errors import UserError
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.images import BadImage, naming, read_rgb
from clip_adapter.extract.preprocess import Preprocess

BATCHES_AHEAD = 2
TASKS_PER_WORKER = 2  # per batch: few, as each costs some 50 µs, but enough to share the work well


@dataclass(frozen=True)
class Plan:
    """Which images of a split are decoded, and how.

    start, stop: rows. Batches end at multiples of `batch_size` counted from row 0, so that a run
        that starts where another one stopped makes the same batches.
    views: per image; view 0 and views − 1 augmented ones, drawn with `seed`.
    skip: leave out what cannot be decoded rather than fail.
    pinned: put the pixels into page-locked memory, from which a GPU copies asynchronously.
    """

    start: int
    stop: int
    batch_size: int
    workers: int
    views: int = 1
    seed: int = 0
    skip: bool = False
    pinned: bool = False


@dataclass(frozen=True)
class Skipped:
    """An image left out: its row, its id and why."""

    row: int
    name: str
    reason: str


@dataclass(frozen=True)
class PixelBatch:
    """Decoded images of consecutive rows, without those that were skipped.

    pixels: (V, B, height, width, 3) uint8. rows: (B,) their rows in the split.
    digests: (B,) uint64, of the pixels of view 0; equal ones mean equal images.
    """

    pixels: torch.Tensor
    rows: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    skipped: tuple[Skipped, ...]


def decode(split: Split, preprocess: Preprocess, plan: Plan) -> Iterator[PixelBatch]:
    """The planned rows batch by batch, in order, up to two batches ahead of the caller.

    Threads suffice, since Pillow releases the interpreter lock while it decodes and resizes.

    Raises UserError naming the first image that cannot be read, or, unless `plan.skip`, decoded.
    """
    bounds = iter(_batches(plan))
    pool = ThreadPoolExecutor(plan.workers, thread_name_prefix="decode")
    try:
        ahead: deque[_Pending] = deque()
        while True:
            while len(ahead) <= BATCHES_AHEAD and (bound := next(bounds, None)):
                ahead.append(_Pending(pool, split, preprocess, plan, *bound))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(plan: Plan) -> Iterator[tuple[int, int]]:
    start = plan.start
    while start < plan.stop:
        stop = min(plan.stop, (start // plan.batch_size + 1) * plan.batch_size)
        yield start, stop
        start = stop


class _Pending:
    """A batch that is being decoded."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        split: Split,
        preprocess: Preprocess,
        plan: Plan,
        start: int,
        stop: int,
    ) -> None:
        self._start = start
        shape = (plan.views, stop - start, preprocess.height, preprocess.width, 3)
        self._pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=plan.pinned)
        self._digests = np.zeros(stop - start, np.uint64)
        pixels = self._pixels.numpy()
        step = max(1, (stop - start) // (plan.workers * TASKS_PER_WORKER))
        self._tasks: list[Future[list[Skipped | None]]] = [
            pool.submit(
                _decode_rows,
                split,
                preprocess,
                plan,
                range(first, min(first + step, stop)),
                pixels[:, first - start : first - start + step],
                self._digests[first - start : first - start + step],
            )
            for first in range(start, stop, step)
        ]

    def result(self) -> PixelBatch:
        outcomes = [outcome for task in self._tasks for outcome in task.result()]
        skipped = tuple(outcome for outcome in outcomes if outcome is not None)
        pixels, digests = self._pixels, self._digests
        rows = np.arange(self._start, self._start + len(outcomes))
        if skipped:
            kept = np.array([outcome is None for outcome in outcomes])
            pixels, digests, rows = pixels[:, torch.from_numpy(kept)], digests[kept], rows[kept]
        return PixelBatch(pixels, rows, digests, skipped)


def _decode_rows(
    split: Split,
    preprocess: Preprocess,
    plan: Plan,
    rows: range,
    pixels: npt.NDArray[np.uint8],
    digests: npt.NDArray[np.uint64],
) -> list[Skipped | None]:
    """Fill `pixels`, (V, rows, height, width, 3), and `digests`; per row None or why not."""
    outcomes: list[Skipped | None] = []
    for position, row in enumerate(rows):
        name = split.ids[row]
        try:
            with naming(name):
                image = read_rgb(partial(split.read, row))
                for view in range(plan.views):
                    pixels[view, position] = preprocess.view(image, name, view, plan.seed)
        except BadImage as error:
            if not plan.skip:
                raise UserError(f"{error}; repair or remove it, or use --on-error skip.") from error
            outcomes.append(Skipped(row, name, str(error)))
            continue
        digest = hashlib.blake2b(pixels[0, position], digest_size=8).digest()
        digests[position] = int.from_bytes(digest, "little")
        outcomes.append(None)
    return outcomes
