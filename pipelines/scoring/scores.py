"""How an adapter did on labelled images, and the zero-shot classifier beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_adapter.pipelines.deciding.hidden import Hidden
from clip_adapter.pipelines.deciding.trust import Trust
from clip_adapter.pipelines.scoring.prediction_formats import cell

Indices = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
FEWEST_IN_A_GROUP = 5  # images, of which an accuracy is worth a name


@dataclass(frozen=True)
class ByGroup:
    """How an adapter did on images that belong together.

    count: of groups. mean, std: of their accuracies in [0, 1]; None for a single group. worst: of
    those of five images or more the name, the accuracy, the images; None where there are none.
    """

    count: int
    mean: float
    std: float | None
    worst: tuple[str, float, int] | None


@dataclass(frozen=True)
class Scores:
    """How an adapter did on N images.

    class_names: of the adapter. labels: (N,), what the images show. predicted, zero_shot: (N,),
    what the adapter said, and what it said before it was fitted. candidates: the classes between
    which both chose. skipped: how many images could not be decoded and are not here. seen: how many
    are not here because the adapter was fitted or chosen on them; where none are left, accuracies
    are NaN. groups: (N,) names, equal ones of images that belong together; None where each is one.
    trust: what probabilities and sets are worth on these images. hidden: what becomes of each class
    when the adapter does not know it; None where that was not asked for.
    """

    class_names: Sequence[str]
    labels: Indices
    predicted: Indices
    zero_shot: Indices
    candidates: Indices
    skipped: int = 0
    seen: int = 0
    groups: npt.NDArray[np.object_] | None = None
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
        of what counts for an image, over √N. The difference is a paired one. Where images belong
        together, over the draw of groups: √Σ d² / N, d the sum of a group's deviations from the
        mean (Liang and Zeger, Biometrika 73, 1986)."""
        right, before = self.predicted == self.labels, self.zero_shot == self.labels
        group_of = np.arange(len(right))
        if self.groups is not None:
            group_of = np.unique(self.groups, return_inverse=True)[1]

        def error(values: npt.NDArray[Any]) -> float:
            deviations = np.bincount(group_of, weights=values - values.mean())
            return float(np.sqrt((deviations**2).sum()) / len(values))

        return error(right), error(before), error(right.astype(float) - before)

    def by_group(self) -> ByGroup | None:
        """None where no groups are known, or no image is left."""
        if self.groups is None or not len(self.labels):
            return None
        names, group_of, counts = np.unique(self.groups, return_inverse=True, return_counts=True)
        right = np.bincount(group_of, weights=self.predicted == self.labels) / counts
        order = np.lexsort((-counts, right))
        worst = next((one for one in order if counts[one] >= FEWEST_IN_A_GROUP), None)
        return ByGroup(
            len(names),
            float(right.mean()),
            float(right.std(ddof=1)) if len(names) > 1 else None,
            None if worst is None else (str(names[worst]), float(right[worst]), counts[worst]),
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
