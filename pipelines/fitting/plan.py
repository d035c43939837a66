"""What a run will do, resolved once: every method with the values to try of each hyper-parameter.

The plan is what run.json holds, in full and with the version that made it, so that an interrupted
run goes on with the very numbers it began with, whatever a later version's defaults are.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.registry import find_method
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import (
    CHOICES,
    Selection,
    Shots,
    words_of,
)
from clip_adapter.pipelines.fitting.results import Held, TaskKey
from clip_adapter.words import dashed, shortened

if TYPE_CHECKING:
    from clip_adapter.adapters.engine.runner import Placement

VERSION = version("clip-adapter")
LARGEST_SEED = 2**31 - 1  # JAX takes an int32
OWN_SHA256 = "sha256"
TASKS = "tasks.json"
# Stated where they are given: plans without them are what they were.
WHERE_GIVEN = (
    *("tasks", "unlabelled", "unlabelled_cache", "groups"),
    *("from_run", "from_sha256", "class_weight"),
)
ELSEWHERE = ("cache", "unlabelled_cache", "from_run", OWN_SHA256)  # may be, and change no number
METHOD = "method"  # a factor of an ablation that is no hyper-parameter
Json = dict[str, Any]


class MethodElsewhere(UserError):
    """A sound plan, whose method stands in a module that only the user may have imported."""


@dataclass(frozen=True)
class PlannedMethod:
    """A method and the values to try of each of its hyper-parameters.

    name: as `find_method` takes it. baseline: whether it only runs for comparison. ablation: the
    values to show of each hyper-parameter that is ablated.
    """

    name: str
    values: Mapping[str, Sequence[Value]]
    baseline: bool = False
    ablation: Mapping[str, Sequence[Value]] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        return find_method(self.name)


@dataclass(frozen=True)
class Plan:
    """All that decides a run's numbers; the fields that FitConfig has too mean the same here.

    tasks: the SHA-256 of those that were stated, "" where they are drawn.
    compared: the methods that `--ablate method` shows, some of which may be among the others.
    unlabelled: which images without labels refine what is chosen, "" for none; unlabelled_cache:
    where they lie.
    groups: which images belong together, "" where each is its own.
    from_run: where the adapter lies whose setting was taken, "" for none; from_sha256: of that.
    """

    clip_adapter: str
    cache: str
    cache_sha256: str
    methods: tuple[PlannedMethod, ...]
    compared: tuple[PlannedMethod, ...]
    shots: tuple[Shots, ...]
    seeds: tuple[int, ...]
    select: Selection
    score: str
    preset: str
    repeat: bool
    augment: bool
    train_classes: str
    search: str
    ablate: tuple[str, ...]
    refit: bool
    placement: Placement
    validation: str = "keep"
    tasks: str = ""
    unlabelled: str = ""
    unlabelled_cache: str = ""
    groups: str = ""
    from_run: str = ""
    from_sha256: str = ""
    class_weight: str = "none"

    @property
    def fitted(self) -> list[PlannedMethod]:
        """The methods that were asked for, without the baselines."""
        return [planned for planned in self.methods if not planned.baseline]

    @property
    def all_methods(self) -> list[PlannedMethod]:
        """Each method of which something is fitted, once."""
        return list({planned.name: planned for planned in (*self.compared, *self.methods)}.values())

    @property
    def parts(self) -> list[tuple[Held, PlannedMethod]]:
        """What is fitted on each task: every method, then every method with the factor of an
        ablation held at a value."""
        held = [
            ({factor: value}, replace(planned, values={**planned.values, factor: (value,)}))
            for factor in self.ablate
            for planned in self.fitted
            if factor in planned.method.hyper
            for value in planned.ablation[factor]
        ]
        compared = [({METHOD: planned.method.name}, planned) for planned in self.compared]
        return [*(({}, planned) for planned in self.methods), *held, *compared]

    @property
    def identities(self) -> set[tuple[TaskKey, str]]:
        """Those of the rows that the run ends with."""
        return {
            ((planned.method.name, shots, seed), str(dict(held)))
            for held, planned in self.parts
            for shots in self.shots
            for seed in self.seeds
        }

    def document(self) -> Json:
        """As JSON, with a SHA-256 over the rest."""
        document = json.loads(json.dumps(asdict(self)))
        for name in WHERE_GIVEN:
            if document[name] == getattr(Plan, name):
                del document[name]
        return document | {OWN_SHA256: _sha256(document)}

    @classmethod
    def of_document(cls, document: Any) -> Plan:
        """The plan that `document` made this of.

        Raises ValueError, in a sentence, for anything else, and MethodElsewhere for the plan of a
        method whose module nobody has named.
        """
        if not isinstance(document, dict) or "clip_adapter" not in document:
            raise ValueError("it holds no plan of this program")
        if (made_by := document["clip_adapter"]) != VERSION:
            raise ValueError(f"it was made by clip-adapter {shortened(str(made_by), 40)}")
        content = {name: value for name, value in document.items() if name != OWN_SHA256}
        if document.get(OWN_SHA256) != _sha256(content):
            raise ValueError("it was changed (its SHA-256 does not match)")
        try:
            several = {name: tuple(content[name]) for name in ("shots", "seeds", "ablate")}
            several |= {n: tuple(map(_planned, content[n])) for n in ("methods", "compared")}
            plan = cls(**content | several)
            check_protocol(plan)
            _ = plan.parts  # every factor has its values
        except MethodElsewhere:
            raise
        except (KeyError, TypeError, AttributeError, UserError) as error:
            raise ValueError(f"its plan is damaged ({shortened(str(error), 200)})") from error
        return plan

    def given(self, planned: PlannedMethod, name: str, values: Sequence[Value]) -> Sequence[Value]:
        """What was given to get these values, and the ablation's where only that takes several."""
        alone = self.select == "none" or planned.method.hyper[name].single
        return planned.ablation.get(name, values) if alone else values

    def differing(self, other: Plan) -> list[str]:
        """In what the two differ; the content of the cache counts, not where it lies."""
        one, two = self.document(), other.document()
        unlike = [name for name in one | two if one.get(name) != two.get(name)]
        names = [n for n in unlike if n not in ELSEWHERE]
        if "methods" in names:
            mine = {planned.name: planned.values for planned in self.methods}
            others = {planned.name: planned.values for planned in other.methods}
            if [*mine] == [*others] and mine != others:
                names.remove("methods")
                names += sorted(
                    {n for m in mine for n in mine[m] if mine[m][n] != others[m].get(n)}
                )
        return names


def named(name: str) -> Method:
    """The method of a name; raises UserError where there is none."""
    try:
        return find_method(name)
    except LookupError as error:
        reason = str(error)
        sentence = f"{reason[:1].upper()}{reason[1:]}."
        raise UserError(sentence).with_notes_of(error) from None


def check_protocol(plan: Plan) -> None:
    """Raises UserError where tasks cannot be drawn as asked for."""
    if not plan.fitted:
        raise UserError("--method needs at least one value.")
    for name in ("shots", "seeds"):
        values = getattr(plan, name)
        if not values:
            raise UserError(f"--{name} needs at least one value.")
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names a value twice.")
    for factor in plan.ablate:
        if factor == METHOD:
            continue
        if not any(factor in planned.method.hyper for planned in plan.fitted):
            raise UserError(f"--ablate {shortened(factor)}: none of these methods has that.")
    names = [planned.method.name for planned in plan.methods]
    if len(set(names)) < len(names):
        raise UserError("--method or --baselines names a method twice.")
    for shots in plan.shots:
        if shots != "all" and not (type(shots) is int and shots >= 1):
            raise UserError(
                f"--shots {shortened(repr(shots), 40)} is no number of images; give 1 or more, or "
                "`all`."
            )
    if not all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in plan.seeds):
        raise UserError(f"--seeds must be whole numbers between 0 and {LARGEST_SEED}.")
    for name in CHOICES:
        if getattr(plan, name) not in (words := words_of(name)):
            raise UserError(f"--{dashed(name)} must be one of {', '.join(words)}.")


def _planned(entry: Mapping[str, Any]) -> PlannedMethod:
    module = entry["name"].rpartition(":")[0]
    if module and module not in sys.modules:  # a file decides on no code that runs
        raise MethodElsewhere(
            f"The run's method {shortened(entry['name'])} is none of this program's own, and a run "
            f"file imports nothing; name it too: --method {shortened(entry['name'])}"
        )
    method = named(entry["name"])
    try:
        values = method.checked_values(entry["values"])
    except ValueError as error:
        raise UserError(str(error)) from None
    ablation = {
        factor: tuple(method.hyper[factor].checked(factor, value) for value in shown)
        for factor, shown in entry["ablation"].items()
    }
    return PlannedMethod(entry["name"], values, bool(entry["baseline"]), ablation)


def _sha256(document: Json) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
