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

from clip_adapter.extract import known
from clip_adapter.extract.datasets.source import Split
from clip_adapter.extract.encoding.images import BadImage, naming, read_rgb
from clip_adapter.extract.encoding.preprocess import Preprocess
from clip_adapter.extract.encoding.unreadable import BrokenImage, Skipped

BATCHES_AHEAD = 2
TASKS_PER_WORKER = 2  # per batch: few, as each costs some 50 µs, but enough to share the work well


@dataclass(frozen=True)
class Plan:
    """Which images of a split are decoded, and how.

    rows: (M,) in ascending order, cut into batches from the first one on.
    views: per image; view 0 and views − 1 augmented ones, drawn with `seed`.
    skip: leave out what cannot be decoded rather than fail.
    pinned: put the pixels into page-locked memory, from which a GPU copies asynchronously.
    """

    rows: npt.NDArray[np.int64]
    batch_size: int
    workers: int
    views: int = 1
    seed: int = 0
    skip: bool = False
    pinned: bool = False


@dataclass(frozen=True)
class PixelBatch:
    """Decoded images of consecutive planned rows, without those that were skipped.

    pixels: (V, B, height, width, 3) uint8. rows: (B,) their rows in the split.
    digests: (B,) uint64, of the pixels of view 0; equal ones mean equal images.
    contents: (B,) uint64, see `known.content`; UNKNOWN for images without own files.
    """

    pixels: torch.Tensor
    rows: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    contents: npt.NDArray[np.uint64]
    skipped: tuple[Skipped, ...]


def decode(split: Split, preprocess: Preprocess, plan: Plan) -> Iterator[PixelBatch]:
    """The planned rows batch by batch, in order, up to two batches ahead of the caller.

    Threads suffice, since Pillow releases the interpreter lock while it decodes and resizes.

    Raises UserError for a file that cannot be read, and, unless `plan.skip`, BrokenImage for the
    first image that cannot be decoded.
    """
    starts = range(0, len(plan.rows), plan.batch_size)
    batches = (plan.rows[start : start + plan.batch_size] for start in starts)
    pool = ThreadPoolExecutor(plan.workers, thread_name_prefix="decode")
    try:
        ahead: deque[_Pending] = deque()
        while True:
            while len(ahead) <= BATCHES_AHEAD and (rows := next(batches, None)) is not None:
                ahead.append(_Pending(pool, split, preprocess, plan, rows))
            if not ahead:
                return
            batch = ahead.popleft().result()
            if batch.skipped and not plan.skip:
                raise BrokenImage(batch.skipped[0])
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


class _Pending:
    """A batch that is being decoded."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        split: Split,
        preprocess: Preprocess,
        plan: Plan,
        rows: npt.NDArray[np.int64],
    ) -> None:
        self._rows = rows
        shape = (plan.views, len(rows), preprocess.height, preprocess.width, 3)
        self._pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=plan.pinned)
        self._hashes = np.zeros((2, len(rows)), np.uint64)
        pixels = self._pixels.numpy()
        step = max(1, len(rows) // (plan.workers * TASKS_PER_WORKER))
        self._tasks: list[Future[list[Skipped | None]]] = [
            pool.submit(
                _decode_rows,
                split,
                preprocess,
                plan,
                rows[first : first + step].tolist(),
                pixels[:, first : first + step],
                self._hashes[:, first : first + step],
            )
            for first in range(0, len(rows), step)
        ]

    def result(self) -> PixelBatch:
        outcomes = [outcome for task in self._tasks for outcome in task.result()]
        skipped = tuple(outcome for outcome in outcomes if outcome is not None)
        pixels, hashes, rows = self._pixels, self._hashes, self._rows
        if skipped:
            kept = np.array([outcome is None for outcome in outcomes])
            pixels, hashes, rows = pixels[:, torch.from_numpy(kept)], hashes[:, kept], rows[kept]
        return PixelBatch(pixels, rows, hashes[0], hashes[1], skipped)


def _decode_rows(
    split: Split,
    preprocess: Preprocess,
    plan: Plan,
    rows: list[int],
    pixels: npt.NDArray[np.uint8],
    hashes: npt.NDArray[np.uint64],
) -> list[Skipped | None]:
    """Fill `pixels`, (V, rows, height, width, 3), and `hashes`, (2, rows), of pixels and content;
    per row None or why not."""
    outcomes: list[Skipped | None] = []
    for position, row in enumerate(rows):
        name = split.ids[row]
        try:
            with naming(name):
                image = read_rgb(partial(split.read, row), preprocess.drafted)
                for view in range(plan.views):
                    pixels[view, position] = preprocess.view(image, name, view, plan.seed)
        except BadImage as error:
            outcomes.append(Skipped(row, name, str(error)))
            continue
        digest = hashlib.blake2b(pixels[0, position], digest_size=8).digest()
        hashes[0, position] = int.from_bytes(digest, "little")
        if split.file is not None:
            with naming(name):
                hashes[1, position] = known.content(split.file(row))
        outcomes.append(None)
    return outcomes
