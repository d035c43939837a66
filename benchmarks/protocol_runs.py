"""What protocol.py compares: each part makes the rows of a table for one data set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from protocol_grid import (
    ALPHAS,
    LADDER,
    RULES,
    SETTINGS,
    YESTERDAY,
    Run,
    choose,
    grid,
    yesterday,
)
from protocol_sets import DataSet
from protocol_tables import Row, TaskKey, Values

from clip_adapter.adapters.registry import METHODS
from clip_adapter.cache.reader import FeatureCache
from clip_adapter.pipelines.commands.fit import fit
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.data import available
from clip_adapter.pipelines.fitting.results import TaskResult

Results = Mapping[TaskKey, TaskResult]
STARTS, RATIO_RATES = (0.2, 0.8), (0.01, 0.05, 0.1, 0.2)
SEARCHED, SEARCHED_SEEDS = (4, 16), 2
SEARCHED_GRID = {
    "alpha": ALPHAS,
    "learning_rate": (1e-4, 3e-4, 1e-3, 3e-3),
    "weight_decay": (0.0, 1e-2, 1.0),
}


@dataclass
class Study:
    """A data set at some numbers of shots and seeds. What was fitted once is not fitted again.

    methods: those of the part `methods`, by default all. epochs: of whatever is trained, by default
    its own.
    """

    data: DataSet
    shots: Sequence[int]
    seeds: Sequence[int]
    methods: Sequence[str] | None = None
    epochs: int | None = None
    _found: dict[str, Results] = field(default_factory=dict)

    def results(self, method: str = "clip-adapter", **asked: Any) -> Results:
        """What `fit` finds. asked: fields of FitConfig that differ from the study's."""
        usual = {"shots": self.shots, "seeds": self.seeds, "select": self.data.select}
        asked = {**usual, **asked}
        if self.epochs and "epochs" in METHODS[method].hyper:
            asked["hyper"] = {"epochs": self.epochs, **asked.get("hyper", {})}
        key = f"{method} {sorted(asked.items())}"
        if key not in self._found:
            with TemporaryDirectory() as folder:
                place = {"cache": self.data.path, "out": Path(folder) / "run"}
                config = FitConfig(**place, method=(method,), baselines=(), **asked)
                rows = fit(config).results
            self._found[key] = {(int(row.shots), row.seed): row for row in rows}
        return self._found[key]

    def tests(self, method: str = "clip-adapter", **asked: Any) -> Values:
        """Test accuracy of the same."""
        return percent(self.results(method, **asked))

    @property
    def zero_shot(self) -> Row:
        return Row("zero-shot", self.tests("zero-shot", select="none"))

    def compared(self, name: str, values: Values) -> Row:
        """The difference from zero-shot."""
        return Row(name, values, self.zero_shot.values)

    @cached_property
    def grid(self) -> Mapping[TaskKey, list[Run]]:
        return grid(self.data, self.shots, self.seeds, self.epochs)

    def setting(self, recipe: str, alpha: float) -> Row:
        """A setting of the grid against zero-shot."""
        index = SETTINGS.index((recipe, alpha))
        values = {task: runs[index].test for task, runs in self.grid.items()}
        return self.compared(f"{recipe}, α {alpha:g}", values)


def percent(results: Results, name: str = "test_accuracy") -> Values:
    found = {task: getattr(result, name) for task, result in results.items()}
    return {task: np.nan if value is None else 100 * value for task, value in found.items()}


def default_rows(study: Study) -> list[Row]:
    """CLIP-Adapter: as `fit` takes it, the authors' recipe, yesterday's default."""
    authors = study.tests(select="none", preset="paper")
    runs = grid(study.data, study.shots, study.seeds, study.epochs, YESTERDAY)
    before = {task: yesterday(own).test for task, own in runs.items()}
    today = study.tests()
    others = {
        "zero-shot": study.zero_shot.values,
        "authors'": authors,
        "yesterday's": before,
        "better of the two": better_mean(authors, before),
    }
    return [
        study.zero_shot,
        Row("authors' recipe", authors),
        Row("yesterday's default (AdamW 0.001, α chosen)", before),
        Row("today's default", today),
        *(Row(f"today's − {name}", today, values) for name, values in others.items()),
    ]


def better_mean(one: Values, other: Values) -> Values:
    """At each number of shots the one with the higher mean: task by task would be hindsight."""

    def mean(values: Values, shots: int) -> float:
        return float(np.mean([value for task, value in values.items() if task[0] == shots]))

    return {
        task: (one if mean(one, task[0]) >= mean(other, task[0]) else other)[task] for task in one
    }


def method_rows(study: Study) -> list[Row]:
    """Every method: its default, and where nothing chooses, and its official recipe."""
    rows = [study.zero_shot]
    with FeatureCache(study.data.path) as cache:
        there = available(cache)
    for name, method in METHODS.items():
        if name == "zero-shot" or name not in (study.methods or METHODS):
            continue
        if missing := set(method.needs) - there:
            print(f"Left out: {name}, which needs what is not there ({', '.join(missing)}).\n")
            continue
        default, none = study.tests(name), study.tests(name, select="none")
        rows += [study.compared(name, default), study.compared(f"{name}, none", none)]
        if "paper" in method.presets:
            official = study.tests(name, preset="paper")
            unchosen = study.tests(name, preset="paper", select="none")
            rows += [study.compared(f"{name}, paper", official)]
            rows += [Row(f"{name} − paper", default, official)]
            rows += [Row(f"{name}, none − paper, none", none, unchosen)]
    return rows


def recipe_rows(study: Study) -> list[Row]:
    """Optimiser × rate × decay × epochs, at one α."""
    recipes = dict.fromkeys(recipe for recipe, _ in SETTINGS)
    return [study.zero_shot, *(study.setting(recipe, ALPHAS[0]) for recipe in recipes)]


def alpha_rows(study: Study) -> list[Row]:
    return [study.zero_shot, *(study.setting(name, a) for name in LADDER for a in ALPHAS)]


def rule_rows(study: Study) -> list[Row]:
    """What chooses, and between what; the last of each has hindsight of test, and is no rule."""
    grids = {
        f"4 α at {LADDER[-1]}": (LADDER[-1:], ALPHAS),
        **{f"4 rates at α {alpha:g}": (LADDER, (alpha,)) for alpha in ALPHAS[:2]},
        "4 rates × 4 α": (LADDER, ALPHAS),
    }
    rows = [study.zero_shot]
    for grid_name, (recipes, alphas) in grids.items():
        among = {
            task: [run for run in runs if run.recipe in recipes and run.alpha in alphas]
            for task, runs in study.grid.items()
        }
        for name, rule in RULES.items():
            values = {task: choose(rule, runs).test for task, runs in among.items()}
            rows.append(study.compared(f"{grid_name}, {name}", values))
        values = {task: max(run.test for run in runs) for task, runs in among.items()}
        rows.append(study.compared(f"{grid_name}, hindsight", values))
    return rows


def selection_rows(study: Study) -> list[Row]:
    """`--select`, everything else as by default."""
    rules = ("few-shot-val", "full-val", "cv", "none")
    usable = rules if study.data.select == "few-shot-val" else rules[2:]
    return [
        study.zero_shot,
        *(study.compared(rule, study.tests(select=rule)) for rule in usable),
    ]


def epoch_rows(study: Study) -> list[Row]:
    """The best epoch on validation against the last, everything else as by default."""
    last, best = (study.results(hyper={"epoch": epoch}) for epoch in ("last", "best"))
    rows = [
        study.compared("last epoch", percent(last)),
        Row("best − last", percent(best), percent(last)),
    ]
    for name, found in (("last", last), ("best", best)):
        # Where nothing could choose there is no validation accuracy.
        judged = {task: one for task, one in found.items() if one.val_accuracy is not None}
        val = percent(judged, "val_accuracy")
        rows.append(Row(f"validation − test, {name} epoch", val, percent(judged)))
    return rows


def learned_rows(study: Study) -> list[Row]:
    """A learned α from two starts against the fixed one, where nothing is chosen."""
    rows, fixed = [], study.tests(select="none")
    for rate in RATIO_RATES:
        for start in STARTS:
            hyper = {"alpha": "learned", "alpha_init": start, "ratio_learning_rate": rate}
            found = study.results(select="none", hyper=hyper)
            ends = {task: r.learned["alpha"].mean for task, r in found.items() if r.learned}
            rows.append(Row(f"rate {rate:g} from {start:g}: α ends at", ends))
            rows.append(Row(f"rate {rate:g} from {start:g} − fixed α", percent(found), fixed))
    return rows


def halving_rows(study: Study) -> list[Row]:
    """A grid of 48 in full and by halving."""
    shots = tuple(count for count in study.shots if count in SEARCHED)
    asked = {"hyper": SEARCHED_GRID, "shots": shots, "seeds": study.seeds[:SEARCHED_SEEDS]}
    if not shots:
        return []
    full, halved = (study.results(search=search, **asked) for search in ("full", "halving"))
    same = {task: 100.0 * (full[task].setting == halved[task].setting) for task in full}
    return [
        Row("the same setting (% of tasks)", same),
        *(
            Row(f"{what}, halving − full", percent(halved, name), percent(full, name))
            for what, name in (("validation", "val_accuracy"), ("test", "test_accuracy"))
        ),
    ]


PARTS: Mapping[str, Callable[[Study], list[Row]]] = {
    "default": default_rows,
    "methods": method_rows,
    "recipe": recipe_rows,
    "alpha": alpha_rows,
    "rule": rule_rows,
    "selection": selection_rows,
    "epoch": epoch_rows,
    "learned": learned_rows,
    "halving": halving_rows,
}
