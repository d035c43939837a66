"""How an adapter did on labelled images, and the zero-shot classifier beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clip_adapter.pipelines.deciding.hidden import Hidden
from clip_adapter.pipelines.deciding.trust import Trust
from clip_adapter.pipelines.scoring.prediction_formats import cell

Indices = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """How an adapter did on N images.

    class_names: of the adapter. labels: (N,), what the images show. predicted, zero_shot: (N,),
    what the adapter said, and what it said before it was fitted. candidates: the classes between
    which both chose. skipped: how many images could not be decoded and are not here. seen: how many
    are not here because the adapter was fitted or chosen on them; where none are left, accuracies
    are NaN. trust: what probabilities and sets are worth on these images. hidden: what becomes of
    each class when the adapter does not know it; None where that was not asked for.
    """

    class_names: Sequence[str]
    labels: Indices
    predicted: Indices
    zero_shot: Indices
    candidates: Indices
    skipped: int = 0
    seen: int = 0
    trust: Trust | None = None
    hidden: Hidden | None = None

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return float(np.mean(self.predicted == self.labels)) if len(self.labels) else np.nan

    @property
    def zero_shot_accuracy(self) -> float:
        """In [0, 1]."""
        return float(np.mean(self.zero_shot == self.labels)) if len(self.labels) else np.nan

    @property
    def present(self) -> Indices:
        """The classes that have images."""
        return np.unique(self.labels)

    def by_class(self) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
        """For each class that has images: how many, and both accuracies in [0, 1]."""
        counts = self._per_class(np.ones(len(self.labels)))
        right = self._per_class(self.predicted == self.labels)
        before = self._per_class(self.zero_shot == self.labels)
        return counts.astype(np.int64), right / counts, before / counts

    def standard_errors(self) -> tuple[float, float, float]:
        """Of both accuracies and of their difference, over the draw of the images: the deviation
        of what counts for an image, over √N. The difference is a paired one."""
        right, before = self.predicted == self.labels, self.zero_shot == self.labels
        root = np.sqrt(len(self.labels))
        differences = right.astype(float) - before
        return (
            float(right.std() / root),
            float(before.std() / root),
            float(differences.std() / root),
        )

    def confusion(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """For each class that has images: how often each of `candidates` was predicted."""
        order = np.argsort(self.labels, kind="stable")
        present, starts = np.unique(self.labels[order], return_index=True)
        places = np.searchsorted(self.candidates, self.predicted[order])
        for label, own in zip(present.tolist(), np.split(places, starts[1:]), strict=True):
            yield label, np.bincount(own, minlength=len(self.candidates))

    def confusion_csv(self) -> str:
        """A row for each class that has images, a column for each class to choose from."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = [cell(name) for name in self.class_names]
        writer.writerow(["class", *(names[label] for label in self.candidates.tolist())])
        for label, counts in self.confusion():
            writer.writerow([names[label], *counts.tolist()])
        return out.getvalue()

    def _per_class(self, values: npt.NDArray[np.generic]) -> Floats:
        sums = np.bincount(self.labels, weights=values, minlength=len(self.class_names))
        return sums[self.present].astype(np.float64)
