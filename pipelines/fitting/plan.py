"""What a run will do, resolved once: every method with the values to try of each hyper-parameter.

The plan is what run.json holds, in full and with the version that made it, so that an interrupted
run goes on with the very numbers it began with, whatever a later version's defaults are.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.methods import METHODS, find_method
from clip_adapter.cache.errors import UserError
from clip_adapter.cache.words import shortened
from clip_adapter.pipelines.fitting.config import (
    DEFAULT_CACHE,
    FitConfig,
    Selection,
    Shots,
    own_values,
)
from clip_adapter.pipelines.fitting.factors import check_effect, of_flag, shown_values

if TYPE_CHECKING:
    from clip_adapter.adapters.engine import Placement

LARGEST_SEED = 2**31 - 1  # JAX takes an int32
OWN_SHA256 = "sha256"
Json = dict[str, Any]


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
    """All that decides a run's numbers; the fields that FitConfig has too mean the same here."""

    clip_adapter: str
    cache: str
    cache_sha256: str
    methods: tuple[PlannedMethod, ...]
    shots: tuple[Shots, ...]
    seeds: tuple[int, ...]
    select: Selection
    preset: str
    repeat: bool
    augment: bool
    train_classes: str
    search: str
    ablate: tuple[str, ...]
    refit: bool
    placement: Placement

    @property
    def fitted(self) -> list[PlannedMethod]:
        """The methods that were asked for, without the baselines."""
        return [planned for planned in self.methods if not planned.baseline]

    def document(self) -> Json:
        """As JSON, with a SHA-256 over the rest."""
        document = json.loads(json.dumps(asdict(self)))
        return document | {OWN_SHA256: _sha256(document)}

    @classmethod
    def of_document(cls, document: Any) -> Plan:
        """The plan that `document` made this of.

        Raises ValueError, in a sentence, for anything else.
        """
        if not isinstance(document, dict) or "clip_adapter" not in document:
            raise ValueError("it holds no plan of this program")
        if (found := document["clip_adapter"]) != version("clip-adapter"):
            raise ValueError(f"it was made by clip-adapter {shortened(str(found), 40)}")
        content = {name: value for name, value in document.items() if name != OWN_SHA256}
        if document.get(OWN_SHA256) != _sha256(content):
            raise ValueError("it was changed (its SHA-256 does not match)")
        try:
            methods = tuple(_planned(entry) for entry in content["methods"])
            several = {name: tuple(content[name]) for name in ("shots", "seeds", "ablate")}
            plan = cls(**content | several | {"methods": methods})
            _check_protocol(plan)
        except (KeyError, TypeError, AttributeError, UserError) as error:
            raise ValueError(f"its plan is damaged ({shortened(str(error), 200)})") from error
        return plan

    def completed(self, config: FitConfig) -> FitConfig:
        """What was given in `config`, and what this plan says of all else; of hyper-parameters too,
        unless `config` states all that are to count."""
        mine: Json = {
            "method": tuple(planned.name for planned in self.fitted),
            "baselines": tuple(planned.name for planned in self.methods if planned.baseline),
        }
        mine |= {f.name: getattr(self, f.name) for f in fields(self) if hasattr(config, f.name)}
        methods = config.method if "method" in config.given else mine["method"]
        missing = {name: value for name, value in mine.items() if name not in config.given}
        hyper = {
            f"{planned.method.name}.{name}": self._given(planned, name, values)
            for planned in self.fitted
            for name, values in planned.values.items()
            if planned.name in methods and name not in config.hyper and "hyper" not in config.stated
        }
        return replace(config, **missing, hyper=hyper | dict(config.hyper))

    def _given(self, planned: PlannedMethod, name: str, values: Sequence[Value]) -> Sequence[Value]:
        """What was given to get these values, and the ablation's where only that takes several."""
        alone = self.select == "none" or planned.method.hyper[name].single
        return planned.ablation.get(name, values) if alone else values

    def differing(self, other: Plan) -> list[str]:
        """In what the two differ; the content of the cache counts, not where it lies."""
        one, two = self.document(), other.document()
        unlike = [name for name in one if one[name] != two[name]]
        names = [name for name in unlike if name not in ("cache", OWN_SHA256)]
        if "methods" in names:
            mine = {planned.name: planned.values for planned in self.methods}
            others = {planned.name: planned.values for planned in other.methods}
            if [*mine] == [*others] and mine != others:
                names.remove("methods")
                names += sorted(
                    {n for m in mine for n in mine[m] if mine[m][n] != others[m].get(n)}
                )
        return names


def make_plan(config: FitConfig, cache_sha256: str, available: Iterable[str] = ()) -> Plan:
    """Resolve what was asked for.

    available: what the cache has of the things that methods may need; `--method all` takes the
        methods that it can serve.
    Raises UserError, in a sentence, for what cannot be meant.
    """
    names = [*config.method]
    if "all" in names:
        if len(names) > 1:
            raise UserError("--method all takes every method; name no other beside it.")
        names = [n for n, m in METHODS.items() if set(m.needs) <= set(available)]
    fitted = [named(name) for name in names]
    others = [named(name) for name in config.baselines if name not in names]
    _check_owners(config, fitted)
    beside = [name for name in config.baselines if name not in names]
    planned = [_with_values(config, n, m, True) for n, m in zip(beside, others, strict=True)]
    planned += [_with_values(config, n, m, False) for n, m in zip(names, fitted, strict=True)]
    plan = Plan(
        clip_adapter=version("clip-adapter"),
        cache=str(config.cache or DEFAULT_CACHE),
        cache_sha256=cache_sha256,
        methods=tuple(planned),
        shots=config.shots,
        seeds=config.seeds,
        select=config.select,
        preset=config.preset,
        repeat=config.repeat,
        augment=config.augment,
        train_classes=config.train_classes,
        search=config.search,
        ablate=tuple(map(of_flag, config.ablate)),
        refit=config.refit,
        placement=config.placement,
    )
    _check_protocol(plan)
    return plan


def named(name: str) -> Method:
    """The method of a name; raises UserError where there is none."""
    try:
        return find_method(name)
    except LookupError as error:
        reason = str(error)
        raise UserError(f"{reason[:1].upper()}{reason[1:]}.") from None


def _with_values(config: FitConfig, name: str, method: Method, baseline: bool) -> PlannedMethod:
    given = {} if baseline else own_values(config, method)
    for key, some in given.items():
        if not some:
            raise UserError(f"--{_dashed(method.hyper[key].flag or key)} needs at least one value.")
    ablation = {}
    for factor in () if baseline else map(of_flag, config.ablate):
        if factor in method.hyper:
            ablation[factor] = shown_values(method, factor, given.get(factor, ()))
            alone = method.hyper[factor].single or config.select == "none"
            if alone and len(given.get(factor, ())) > 1:
                del given[factor]  # nothing is to choose between what is only shown
    try:
        values = method.values(given, config.preset, one=config.select == "none")
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None
    if config.select == "none" and len(method.settings(values)) > 1:
        raise UserError(
            f"--select none cannot choose between several settings of {name}; give one of each."
        )
    for factor in ablation:
        check_effect(method, factor, values)
    return PlannedMethod(name, values, baseline, ablation)


def _check_owners(config: FitConfig, methods: Sequence[Method]) -> None:
    """Every value that was given belongs to one of the methods."""
    for key in config.hyper:
        owner, _, name = key.rpartition(".")
        if not any(name in m.hyper and owner in ("", m.name) for m in methods):
            others = [n for n, m in METHODS.items() if name in m.hyper]
            whose = f"it belongs to {', '.join(others)}" if others else "no method has that"
            raise UserError(f"{', '.join(config.method)} has no {shortened(name)}; {whose}.")


def _check_protocol(plan: Plan) -> None:
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
    for name, words in _WORDS.items():
        if getattr(plan, name) not in words:
            raise UserError(f"--{_dashed(name)} must be one of {', '.join(words)}.")


_WORDS = {
    "select": ("few-shot-val", "full-val", "cv", "none"),
    "preset": ("default", "paper"),
    "train_classes": ("all", "base"),
    "search": ("full", "halving"),
    "placement": ("auto", "sequential", "vectorised"),
}


def _planned(entry: Mapping[str, Any]) -> PlannedMethod:
    module = entry["name"].rpartition(":")[0]
    if module and module not in sys.modules:  # a file decides on no code that runs
        raise UserError(f"its method lies elsewhere; name it too: --method {entry['name']}")
    method = named(entry["name"])
    try:
        values = method.values({name: tuple(some) for name, some in entry["values"].items()})
    except ValueError as error:
        raise UserError(str(error)) from None
    ablation = {
        factor: tuple(method.hyper[factor].checked(factor, value) for value in shown)
        for factor, shown in entry["ablation"].items()
    }
    return PlannedMethod(entry["name"], values, bool(entry["baseline"]), ablation)


def _sha256(document: Json) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _dashed(name: str) -> str:
    return name.replace("_", "-")
