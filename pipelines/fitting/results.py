"""What a run found, as rows: one for each method and task, and one for each method and shots."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any

from clip_adapter.adapters.hyper import Value
from clip_adapter.pipelines.fitting.config import Shots

TaskKey = tuple[str, Shots, int]
"""(method, shots, seed)."""
Held = Mapping[str, Value]
"""Factor of an ablation → the value it is held at; empty for a result that counts."""
MEASURES = (
    *("val_accuracy", "test_accuracy", "balanced_accuracy", "new_accuracy", "harmonic_mean"),
)
FEWEST_FOR_A_TENTH = 10  # seeds: of fewer the worst tenth would be the worst one


@dataclass(frozen=True)
class Spread:
    """A mean, and the standard deviation (n − 1) of one or more numbers; None of a single one."""

    mean: float
    std: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are no values."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation)

    @classmethod
    def of_worst_tenth(cls, values: Sequence[float]) -> Spread | None:
        """The mean of the ⌈n / 10⌉ lowest of n values; None where there are fewer than ten."""
        if len(values) < FEWEST_FOR_A_TENTH:
            return None
        return cls(statistics.fmean(sorted(values)[: math.ceil(len(values) / 10)]))


@dataclass(frozen=True)
class TaskResult:
    """A method on one task: what was chosen, by what, and how it did on the test set.

    Accuracies lie in [0, 1]. setting: None where every setting diverged.
    held: the factor of an ablation and its value; everything else was selected as usual.
    select: what the choice rests on, as FitConfig's `select`. epoch: the chosen setting's, None
    where nothing is trained or nothing chose. val_accuracy, val_nll: the chosen setting's; None
    where there was no choice. tried, diverged: how many settings. compared: those trained as long
    as the chosen one. indistinguishable: those of them whose validation accuracy differs from the
    chosen one's by no more than chance explains (McNemar's exact test, p ≥ 0.05).
    outdoes_zero_shot: whether validation shows the chosen one to be better than zero-shot; None
    where nothing judged.
    learned: mean and deviation of what the method describes, such as a predicted ratio.
    test_images: how many there are. uneven: see Predictions.
    balanced_accuracy: the mean, over the classes that have test images, of the share that is right.
    new_accuracy, harmonic_mean: under base-to-new, else None.
    note: what a reader has to know about the choice, or "".
    """

    method: str
    shots: Shots
    seed: int
    select: str
    setting: Mapping[str, Value] | None = None
    epoch: int | None = None
    val_accuracy: float | None = None
    val_nll: float | None = None
    tried: int = 1
    diverged: int = 0
    compared: int = 1
    indistinguishable: int = 1
    outdoes_zero_shot: bool | None = None
    learned: Mapping[str, Spread] = field(default_factory=dict)
    test_accuracy: float | None = None
    balanced_accuracy: float | None = None
    test_images: int = 0
    uneven: bool = False
    new_accuracy: float | None = None
    harmonic_mean: float | None = None
    note: str = ""
    held: Held = field(default_factory=dict)

    @property
    def key(self) -> TaskKey:
        return self.method, self.shots, self.seed

    @property
    def identity(self) -> tuple[TaskKey, str]:
        """What no two rows of a run have in common."""
        return self.key, str(dict(self.held))

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> TaskResult:
        """The row that `dataclasses.asdict` made this of.

        Raises ValueError or TypeError for anything else.
        """
        values = {f.name: document[f.name] for f in fields(cls) if f.name in document}
        if values.keys() != document.keys() or not {"method", "shots", "seed"} <= values.keys():
            raise ValueError("not the row of a run")
        learned = {name: Spread(**spread) for name, spread in document["learned"].items()}
        row = cls(**values | {"learned": learned})
        row._check()
        return row

    def _check(self) -> None:
        """Raises ValueError unless everything is of its type, and accuracies are some."""
        for name in MEASURES:
            accuracy = getattr(self, name)
            if accuracy is not None and not (type(accuracy) is float and 0 <= accuracy <= 1):
                raise ValueError(f"{name} is no accuracy")
        counts = (self.seed, self.tried, self.diverged, self.compared, self.indistinguishable)
        words = (self.method, self.select, self.note)
        spreads = self.learned.values()
        sound = (
            (type(self.shots) is int or self.shots == "all")
            and all(type(count) is int for count in (*counts, self.test_images))
            and type(self.uneven) is bool
            and all(isinstance(text, str) for text in words)
            and type(self.epoch) in (int, NoneType)
            and type(self.outdoes_zero_shot) in (bool, NoneType)
            and type(self.val_nll) in (float, NoneType)
            and (self.setting is None or _is_setting(self.setting))
            and _is_setting(self.held)
            and all(isinstance(s.mean, float) and isinstance(s.std, float | None) for s in spreads)
        )
        if not sound:
            raise ValueError("not the row of a run")


def _is_setting(document: Any) -> bool:
    return isinstance(document, dict) and all(
        isinstance(value, float | int | str) for value in document.values()
    )


@dataclass(frozen=True)
class MethodSummary:
    """A method at one number of shots, over seeds.

    seeds: how many tasks there are. diverged: those at which every setting diverged; they have no
    accuracy and do not count in the means. worst_tenth: the mean of the lowest tenth of the test
    accuracies, from ten seeds on.
    """

    method: str
    shots: Shots
    seeds: int
    diverged: int
    val_accuracy: Spread | None
    test_accuracy: Spread | None
    balanced_accuracy: Spread | None
    new_accuracy: Spread | None
    harmonic_mean: Spread | None
    worst_tenth: Spread | None
    test_images: int
    uneven: bool


def summarise(results: Iterable[TaskResult]) -> list[MethodSummary]:
    """A row for each method and number of shots, in the order of their first results."""
    groups: dict[tuple[str, Shots], list[TaskResult]] = defaultdict(list)
    for result in results:
        groups[result.method, result.shots].append(result)
    return [_summary(rows) for rows in groups.values()]


def _summary(rows: Sequence[TaskResult]) -> MethodSummary:
    def known(name: str) -> list[float]:
        return [value for row in rows if (value := getattr(row, name)) is not None]

    return MethodSummary(
        method=rows[0].method,
        shots=rows[0].shots,
        seeds=len(rows),
        diverged=sum(row.setting is None for row in rows),
        worst_tenth=Spread.of_worst_tenth(known("test_accuracy")),
        test_images=rows[0].test_images,
        uneven=any(row.uneven for row in rows),
        **{name: Spread.of(known(name)) for name in MEASURES},
    )


def harmonic_mean(base: float | None, new: float | None) -> float | None:
    """2 b n / (b + n), of base and new accuracy; None where one is not known."""
    if base is None or new is None:
        return None
    return 2 * base * new / (base + new) if base + new else 0.0
