"""What `predict` says of images, one after another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.decisions import probabilities
from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.stata import FEWEST, classes_found, refine, temperature_of
from clip_adapter.errors import UserError
from clip_adapter.extract.shards import Shard
from clip_adapter.frames import frame_of_rows, html_table
from clip_adapter.pipelines.deciding.answers import Answers
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter
from clip_adapter.pipelines.scoring.cached import Block, Source
from clip_adapter.pipelines.scoring.prediction_formats import ROWS_AT_ONCE, Prediction, columns_of
from clip_adapter.words import counted

if TYPE_CHECKING:
    import pandas

Logits = npt.NDArray[np.float32]


class PredictedImages:
    """Iterable over one Prediction per image, in their order.

    They are computed batch by batch, anew for each iteration: memory does not grow with their
    number. answers: makes what is answered beside the most probable classes; None where nothing is
    promised. tell: for transductive ones, all of which are encoded before the first is there; it is
    told how many classes they show. identity: what decides what is said, as JSON.
    """

    def __init__(
        self,
        adapter: SavedAdapter,
        sources: Sequence[Source],
        top: int,
        answers: Answers | None = None,
        tell: Callable[[str], None] | None = None,
        identity: Mapping[str, Any] | None = None,
    ):
        self.identity = dict(identity or {})
        self.class_names = adapter.info.class_names
        self._adapter = adapter
        self._sources = sources
        self._top = min(top, len(self.class_names))
        self._answers = answers
        self._tell = tell

    def __len__(self) -> int:
        return sum(len(source.rows) for source in self._sources)

    def names(self) -> Iterator[Path | str]:
        """Those of the images."""
        for source in self._sources:
            for start in range(0, len(source.rows), ROWS_AT_ONCE):
                yield from source.names(np.array(source.rows[start : start + ROWS_AT_ONCE]))

    def columns(self) -> dict[str, type]:
        """Those of a table, with the types of their values."""
        answers = self._answers
        promised = {} if answers is None else answers.columns()
        top: dict[str, type] = {}
        for rank in range(1, self._top + 1):
            top |= {f"class_{rank}": str, f"probability_{rank}": float}
        return {"image": str, **promised, **top}

    def shard(self, shard: Shard) -> "PredictedImages":
        """Those of a part of the images, which are a run of whole blocks, so that all parts
        together say what an undivided run does."""
        blocks = [-(-len(source.rows) // source.step) for source in self._sources]
        wanted, before = shard.rows(sum(blocks), 1), accumulate(blocks, initial=0)
        cut = [
            source.cut(range(wanted.start - first, wanted.stop - first))
            for source, first in zip(self._sources, before, strict=False)
        ]
        return self._of([source for source in cut if source.rows])

    def pieces(self, length: int) -> Iterator[tuple[range, "PredictedImages"]]:
        """Those of about so many images each, with their places among all images."""
        for source in self._sources:
            blocks = max(1, length // source.step)
            for first in range(0, -(-len(source.rows) // source.step), blocks):
                part = source.cut(range(first, first + blocks))
                start = part.first + part.rows.start
                yield range(start, start + len(part.rows)), self._of([part])

    def _of(self, sources: Sequence[Source]) -> "PredictedImages":
        part = copy(self)
        part._sources = sources
        return part

    def __iter__(self) -> Iterator[Prediction]:
        together = self._together(self._tell) if self._tell else self._one_by_one()
        for source, block, logits in together:
            shares = self._shares(logits)
            answers = (
                self._answers.of(shares, block.encoded) if self._answers else [None] * len(shares)
            )
            found = dict(
                zip(block.rows.tolist(), zip(self._tops(shares), answers, strict=True), strict=True)
            )
            rows = sorted([*found, *block.unreadable])
            for row, path in zip(rows, source.names(np.array(rows, np.int64)), strict=True):
                if row in found:
                    yield Prediction(path, *found[row])
                else:  # decoding names the image as well
                    reason = block.unreadable[row].removeprefix(f"{path} cannot be decoded: ")
                    yield Prediction(path, unreadable=reason)

    def to_frame(self) -> "pandas.DataFrame":
        """A row per image with the columns of a CSV file, as a frame of pandas; of one that cannot
        be read `unreadable` says why. Raises UserError without pandas."""
        return frame_of_rows(
            columns_of(p) | ({"unreadable": p.unreadable} if p.unreadable else {}) for p in self
        )

    def _repr_html_(self) -> str:
        """The first ones, those of files with a picture."""
        return html_table(
            ({"": _picture(p.path)} | columns_of(p) for p in self), counted(len(self), "image")
        )

    def _blocks(self) -> Iterator[tuple[Source, Block]]:
        return ((source, block) for source in self._sources for block in source.blocks(source.rows))

    def _one_by_one(self) -> Iterator[tuple[Source, Block, Logits]]:
        return ((s, block, self._adapter.logits(block.features)) for s, block in self._blocks())

    def _together(self, tell: Callable[[str], None]) -> Iterator[tuple[Source, Block, Logits]]:
        """Raises UserError where there are too few images."""
        # What was refined before is refined anew, by these images alone.
        plain, refinement = replace(self._adapter, refinement=None), self._adapter.refinement
        sources, blocks = zip(*self._blocks(), strict=True)
        encoded = np.concatenate([block.encoded for block in blocks])
        if len(encoded) < FEWEST:
            raise UserError(f"--transductive takes {FEWEST} images or more that can be read.")
        logits = np.concatenate([plain.logits(block.features) for block in blocks])
        if refinement:
            temperature = float(refinement.temperature)
        else:
            temperature = temperature_of(logits, cosine_logits(np, encoded, plain.head))
        shares, _ = refine(encoded, logits, plain.weights, temperature)
        count = len(classes_found(shares))
        tell(
            f"{counted(len(encoded), 'image')} were classified together (transductive) and show "
            f"{count} of {counted(len(self.class_names), 'class', 'classes')}: what is said of one "
            "depends on the others"
        )
        ends = np.cumsum([len(block.rows) for block in blocks])[:-1]
        floor = np.finfo(np.float32).tiny
        parts = np.split(np.log(np.maximum(shares, floor)), ends)
        return zip(sources, blocks, parts, strict=True)

    def _shares(self, logits: Logits) -> npt.NDArray[np.float64]:
        """Of images that are classified together they are known already."""
        if self._tell:
            return probabilities(logits)
        return self._adapter.probabilities(logits)

    def _tops(self, shares: npt.NDArray[np.float64]) -> list[tuple[tuple[str, float], ...]]:
        classes = np.argsort(-shares, axis=1, kind="stable")[:, : self._top]
        return [
            tuple((self.class_names[c], float(own[c])) for c in best)
            for own, best in zip(shares, classes.tolist(), strict=True)
        ]


def _picture(path: Path | str) -> str | None:
    from clip_adapter.extract.encoding.images import open_image
    from clip_adapter.pipelines.reporting.sections.images import small_jpeg

    with suppress(OSError, ValueError):
        return small_jpeg(open_image(path)) if isinstance(path, Path) else None
    return None
