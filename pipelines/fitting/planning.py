"""From what was asked for to the plan of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from clip_adapter.adapters.method import Method
from clip_adapter.adapters.registry import METHODS
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import DEFAULT_CACHE, FitConfig, own_values
from clip_adapter.pipelines.fitting.factors import check_effect, of_flag, shown_values
from clip_adapter.pipelines.fitting.plan import (
    METHOD,
    VERSION,
    Plan,
    PlannedMethod,
    check_protocol,
    named,
)
from clip_adapter.words import dashed, shortened


def make_plan(config: FitConfig, cache_sha256: str, available: Iterable[str] = ()) -> Plan:
    """Resolve what was asked for.

    available: what the cache has of the things that methods may need; `--method all` takes the
        methods that it can serve.
    Raises UserError, in a sentence, for what cannot be meant.
    """
    names, there = [*config.method], set(available)
    if "all" in names:
        if len(names) > 1:
            raise UserError("--method all takes every method; name no other beside it.")
        names = [name for name, method in METHODS.items() if set(method.needs) <= there]
    fitted = [named(name) for name in names]
    others = [named(name) for name in config.baselines if name not in names]
    _check_owners(config, fitted)
    beside = [name for name in config.baselines if name not in names]
    planned = [_with_values(config, n, m, True) for n, m in zip(beside, others, strict=True)]
    planned += [_with_values(config, n, m, False) for n, m in zip(names, fitted, strict=True)]
    ablate = tuple(map(of_flag, config.ablate))
    compared: Sequence[PlannedMethod] = ()
    if METHOD in ablate:
        compared = planned[len(beside) :] if len(names) > 1 else _servable(config, planned, there)
    plan = Plan(
        clip_adapter=VERSION,
        cache=str(config.cache or DEFAULT_CACHE),
        cache_sha256=cache_sha256,
        methods=tuple(planned),
        compared=tuple(compared),
        shots=config.shots,
        seeds=config.seeds,
        select=config.select or "few-shot-val",
        score=config.score,
        preset=config.preset,
        repeat=config.repeat,
        augment=config.augment,
        train_classes=config.train_classes,
        search=config.search,
        ablate=ablate,
        refit=config.refit,
        placement=config.placement,
    )
    check_protocol(plan)
    return plan


def _servable(
    config: FitConfig, planned: Sequence[PlannedMethod], there: set[str]
) -> list[PlannedMethod]:
    """Every method that the cache can serve, and those that were planned as they are."""
    known = {p.name: p for p in planned}
    others = {n: m for n, m in METHODS.items() if n not in known and set(m.needs) <= there}
    return [*planned, *(_with_values(config, n, m, True) for n, m in others.items())]


def _with_values(config: FitConfig, name: str, method: Method, baseline: bool) -> PlannedMethod:
    given = {} if baseline else own_values(config, method)
    for key, some in given.items():
        if not some:
            raise UserError(f"--{dashed(method.flag(key))} needs at least one value.")
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
