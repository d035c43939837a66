"""Few-shot subsets, drawn item for item as the literature draws them (CoOp, arXiv 2109.01134)."""

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clip_adapter.errors import UserError
from clip_adapter.words import counted

Rows = npt.NDArray[np.int64]

VALIDATION_SHOTS = 4


@dataclass(frozen=True)
class FewShotTask:
    """The rows of one draw, in drawing order.

    support: (S,) int64, rows of the train split.
    validation: (M,) int64, rows of the val split; empty where the cache has none.
    small_classes: labels with fewer than `shots` training images, but some.
    small_validation_classes: the same for the validation images.
    absent_classes: labels without any training image.
    """

    support: Rows
    validation: Rows
    small_classes: tuple[int, ...]
    small_validation_classes: tuple[int, ...]
    absent_classes: tuple[int, ...]


def draw_few_shot(
    train_labels: npt.ArrayLike,
    val_labels: npt.ArrayLike,
    *,
    shots: int,
    seed: int,
    repeat: bool = False,
    classes: int = 0,
    groups: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
) -> FewShotTask:
    """Draw the support set and the few-shot validation set of one (shots, seed).

    The published protocol: one `random.Random(seed)`; group the training rows by label in order
    of first appearance; `sample` `shots` per label; then, with the same generator, the same on the
    validation rows with min(shots, 4) per label. The result depends on the order of the rows, which
    is why a cache keeps its source's order.

    Of a label with fewer rows each is taken once, in order and without asking the generator: so
    draws Dassl with `repeat=False`, and with it CoOp, TaskRes and CLAP. `repeat` draws them with
    `choices`, as Tip-Adapter's and LP++'s code does. Both are equal where no
    label has too few rows.

    Groups change nothing about which training images are drawn: k shots are k images, of however
    many groups. A validation image whose group has one in the support set is not drawn.

    train_labels, val_labels: (N,) and (M,) integers. classes: how many there are, where the last of
    them may have no image. groups: (N,) and (M,) integers, which images belong together.
    Raises UserError where no class has as many as `shots` training images.
    """
    rng = random.Random(seed)
    train_groups = _rows_by_label(train_labels)
    largest = max((len(rows) for rows in train_groups.values()), default=0)
    if shots < 1 or shots > largest:
        most = f"choose between 1 and {largest}" if largest > 1 else "take 1"
        raise UserError(
            f"--shots {shots} cannot be drawn: the largest class has "
            f"{counted(largest, 'training image')}; {most}, or `--shots all`."
        )
    support = _draw(rng, train_groups, shots, repeat)
    val_groups, val_shots = _rows_by_label(val_labels), min(shots, VALIDATION_SHOTS)
    if groups is not None:
        taken = np.isin(groups[1], np.asarray(groups[0])[support])
        free = ((label, own[~taken[own]]) for label, own in val_groups.items())
        val_groups = {label: own for label, own in free if len(own)}
    validation = _draw(rng, val_groups, val_shots, repeat)
    every = range(max(classes, 1 + max([*train_groups, *val_groups])))
    return FewShotTask(
        support,
        validation,
        _labels_with_fewer(train_groups, shots),
        _labels_with_fewer(val_groups, val_shots),
        tuple(label for label in every if label not in train_groups),
    )


def _rows_by_label(labels: npt.ArrayLike) -> dict[int, Rows]:
    """The rows of each label, in order; labels as they first appear."""
    given = np.asarray(labels)
    # Row by row, the 1,281,167 of ImageNet took a second for every draw.
    order = np.argsort(given, kind="stable")
    own, starts = np.unique(given[order], return_index=True)
    groups = np.split(order, starts[1:])[: len(own)]
    pairs = zip(own.tolist(), groups, strict=True)
    return dict(sorted(pairs, key=lambda pair: int(pair[1][0])))


def _labels_with_fewer(groups: dict[int, Rows], count: int) -> tuple[int, ...]:
    return tuple(sorted(label for label, rows in groups.items() if len(rows) < count))


def _draw(rng: random.Random, groups: dict[int, Rows], count: int, repeat: bool) -> Rows:
    """What `rng.sample(rows, count)` and `rng.choices(rows, k=count)` draw: both by place alone."""
    drawn = [np.zeros(0, np.int64)]
    for rows in groups.values():
        places = range(len(rows))
        if len(rows) >= count:
            drawn.append(rows[rng.sample(places, count)])
        else:
            drawn.append(rows[rng.choices(places, k=count)] if repeat else rows)
    return np.concatenate(drawn)
