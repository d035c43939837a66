"""From what was asked for to the plan of a run, and whether that can be done."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from clip_adapter.adapters.hyper import Hyper, Value
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.registry import METHODS
from clip_adapter.errors import UserError
from clip_adapter.pipelines.fitting.config import DEFAULT_CACHE, FitConfig, own_values
from clip_adapter.pipelines.fitting.data import PROVIDED_BY, Data, available
from clip_adapter.pipelines.fitting.plan import (
    METHOD,
    VERSION,
    Plan,
    PlannedMethod,
    check_protocol,
    named,
)
from clip_adapter.pipelines.fitting.tasks import RULES, TaskRows, base_classes
from clip_adapter.words import dashed, shortened

Values = Mapping[str, Sequence[Value]]


def make_plan(
    config: FitConfig, cache_sha256: str, available: Iterable[str] = (), unlabelled: str = ""
) -> Plan:
    """Resolve what was asked for.

    available: what the cache has of the things that methods may need; `--method all` takes the
        methods that it can serve. unlabelled: as in the plan.
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
    planned = [_with_values(config, n, m, there, True) for n, m in zip(beside, others, strict=True)]
    planned += [_with_values(config, n, m, there) for n, m in zip(names, fitted, strict=True)]
    ablate = tuple(map(_of_flag, config.ablate))
    compared: Sequence[PlannedMethod] = ()
    if METHOD in ablate:
        compared = planned[len(beside) :] if len(names) > 1 else _servable(config, planned, there)
    alike = {f.name: getattr(config, f.name) for f in fields(Plan) if hasattr(config, f.name)}
    resolved: dict[str, Any] = {
        "clip_adapter": VERSION,
        "cache": str(config.cache or DEFAULT_CACHE),
        "cache_sha256": cache_sha256,
        "methods": tuple(planned),
        "compared": tuple(compared),
        "select": config.select or "few-shot-val",
        "tasks": "",
        "ablate": ablate,
        "unlabelled": unlabelled,
        "unlabelled_cache": str(config.unlabelled or ""),
        "from_run": str(config.from_run or ""),
    }
    plan = Plan(**alike | resolved)
    check_protocol(plan)
    _check_refined(plan)
    _check_weighed(plan)
    return plan


def _check_refined(plan: Plan) -> None:
    """Images without labels refine what is chosen, of all classes, on a task."""
    beside = {"--ablate": plan.ablate, "--refit": plan.refit}
    beside["--train-classes base"] = plan.train_classes == "base"
    for flag in [flag for flag, is_given in beside.items() if is_given and plan.unlabelled]:
        raise UserError(
            f"--unlabelled takes no {flag} beside it: what is refined is the chosen classifier of "
            "a task, judged by labelled images that took no part, and tells the classes of the "
            "task alone."
        )


def _check_weighed(plan: Plan) -> None:
    """A loss is weighed of methods that have one."""
    if plan.class_weight == "none":
        return
    if others := [p.method.name for p in plan.fitted if not p.method.is_trained]:
        raise UserError(
            f"--class-weight {plan.class_weight} weighs the loss of methods that are trained step "
            f"by step, and {', '.join(others)} {'is' if len(others) == 1 else 'are'} not; leave it "
            "out, or fit such methods in a run of their own."
        )


def _servable(
    config: FitConfig, planned: Sequence[PlannedMethod], there: set[str]
) -> list[PlannedMethod]:
    """Every method that the cache can serve, and those that were planned as they are."""
    known = {p.name: p for p in planned}
    others = {n: m for n, m in METHODS.items() if n not in known and set(m.needs) <= there}
    return [*planned, *(_with_values(config, n, m, there, True) for n, m in others.items())]


def _with_values(
    config: FitConfig, name: str, method: Method, there: Collection[str], baseline: bool = False
) -> PlannedMethod:
    given = {} if baseline else own_values(config, method)
    for key in [*given, *(() if baseline else map(_of_flag, config.ablate))]:
        need = method.hyper[key].needs if key in method.hyper else ""
        if need and need not in there:
            raise UserError(
                f"--{dashed(method.flag(key))} of {name} needs what this cache lacks; extract it "
                f"with {PROVIDED_BY[need]}."
            )
    for key, some in given.items():
        if not some:
            raise UserError(f"--{dashed(method.flag(key))} needs at least one value.")
    ablation = {}
    for factor in () if baseline else map(_of_flag, config.ablate):
        if factor in method.hyper:
            ablation[factor] = _shown_values(method, factor, given.get(factor, ()))
            alone = method.hyper[factor].single or config.select == "none"
            if alone and len(given.get(factor, ())) > 1:
                del given[factor]  # nothing is to choose between what is only shown
    try:
        values = method.values(given, config.preset, one=config.select == "none", there=there)
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None
    if config.select == "none" and len(method.settings(values)) > 1:
        raise UserError(
            f"--select none cannot choose between several settings of {name}; give one of each."
        )
    for factor in ablation:
        _check_effect(method, factor, values)
    return PlannedMethod(name, values, baseline, ablation)


def _check_owners(config: FitConfig, methods: Sequence[Method]) -> None:
    """Every value that was given belongs to one of the methods."""
    for key in config.hyper:
        owner, _, name = key.rpartition(".")
        if not any(name in m.hyper and owner in ("", m.name) for m in methods):
            others = [n for n, m in METHODS.items() if name in m.hyper]
            whose = f"it belongs to {', '.join(others)}" if others else "no method has that"
            raise UserError(f"{', '.join(config.method)} has no {shortened(name)}; {whose}.")


def _of_flag(flag: str) -> str:
    """The hyper-parameter of a flag, such as learning_rate of `lr`."""
    for method in METHODS.values():
        for name, hyper in method.hyper.items():
            if flag in (name, hyper.flag, dashed(name)):
                return name
    return flag


def _shown_values(method: Method, factor: str, given: Sequence[Value]) -> tuple[Value, ...]:
    """The values of a factor that an ablation shows: those given, else those of the table.

    Raises UserError, in a sentence, where there are not two, and for values out of range.
    """
    hyper = method.hyper[factor]
    values = given if len(given) > 1 else hyper.ablated or hyper.tried
    if len(values) < 2:
        flag = dashed(method.flag(factor))
        raise UserError(f"--ablate {factor} needs several values; name them with --{flag}.")
    try:
        checked = tuple(hyper.checked(factor, value) for value in values)
    except ValueError as error:
        raise UserError(f"{method.name}: {error}.") from None
    if len(set(checked)) < len(checked):
        raise UserError(f"{method.name}: {factor} names a value twice.")
    return checked


def _check_effect(method: Method, factor: str, values: Values) -> None:
    """Raises UserError where a factor is in no setting that these values make."""
    hyper = method.hyper[factor]
    if not any(factor in setting for setting in method.settings(values)):
        raise UserError(f"--ablate {factor} has no effect without {_reasons(hyper)}.")


def _reasons(hyper: Hyper) -> str:
    """What has to be said for it to have an effect."""
    return " or ".join(
        f"--{dashed(other)} {' or '.join(map(str, some))}" for other, some in hyper.when.items()
    )


def without_effect(config: FitConfig, plan: Plan) -> list[str]:
    """A sentence for each option that was given and changes nothing."""
    sentences = []
    for planned in plan.fitted:
        method = planned.method
        for name in own_values(config, method):
            if not method.hyper[name].when:
                continue
            if all(name not in setting for setting in method.settings(planned.values)):
                hyper = method.hyper[name]
                flag = dashed(method.flag(name))
                sentences.append(f"--{flag} has no effect without {_reasons(hyper)}.")
    trained = any(planned.method.is_trained for planned in plan.methods)
    if plan.search == "halving" and (plan.select == "none" or not trained):
        why = "with --select none" if trained else "where no method is trained step by step"
        sentences.append(f"--search halving has no effect {why}.")
    if plan.score != "accuracy" and plan.select == "none":
        sentences.append(f"--score {plan.score} has no effect with --select none.")
    given = [own_values(config, planned.method).get("epoch") for planned in plan.fitted]
    if plan.select == "none" and ("best",) in given and not plan.from_run:
        sentences.append("--epoch best has no effect with --select none, where nothing is judged.")
    if plan.augment and not any(planned.method.uses_views for planned in plan.methods):
        sentences.append("--augment has no effect: none of these methods uses views.")
    if plan.preset != "default" and not any(
        plan.preset in planned.method.presets for planned in plan.fitted
    ):
        sentences.append(f"--preset {plan.preset} has no effect on these methods.")
    return list(dict.fromkeys(sentences))


def check_feasible(plan: Plan, data: Data, rows: TaskRows) -> None:
    """Raises UserError, in a sentence, where a method lacks something or shapes do not fit.

    data: of the classes that are fitted. rows: of the first task.
    """
    base_to_new = plan.train_classes == "base"
    if base_to_new:
        _check_halves(plan, data)
    for planned in plan.all_methods:
        method = planned.method
        data.head(method)  # refuses prompts that cancel
        if missing := set(method.needs) - available(data.cache):
            flags = " ".join(sorted(PROVIDED_BY[need] for need in missing))
            raise UserError(f"{method.name} needs what this cache lacks; extract it with {flags}.")
        knows_new = method.unseen_classes or method.for_classes
        if base_to_new and not planned.baseline and not knows_new:
            raise UserError(f"--train-classes base: {method.name} cannot classify new classes.")
        if method.is_trained:
            _check_startable(planned, data, rows)


def _check_startable(planned: PlannedMethod, data: Data, rows: TaskRows) -> None:
    """Try the shapes of every setting, without a number being computed."""
    import jax

    from clip_adapter.adapters.engine.training import Run

    method = planned.method
    task = data.task(method, rows)
    tried: set[str] = set()
    for setting in method.settings(planned.values):
        static, numbers = method.split(setting)
        program = json.dumps([static, sorted(numbers)])
        if program in tried:
            continue
        tried.add(program)
        try:
            jax.eval_shape(lambda task, chosen=setting: Run(method, chosen, task).start(), task)
        except ValueError as error:
            raise UserError(f"{method.name}: {error}.") from None


def _check_halves(plan: Plan, data: Data) -> None:
    """Base-to-new needs images of the first half of the classes, and to test of both."""
    classes = len(data.cache.class_names)
    if classes < 2:
        raise UserError("--train-classes base needs at least two classes.")
    base = base_classes(classes)
    judged = RULES[plan.select].validation != "none"
    for split, halves in (("train", 1), ("val", 1 if judged else 0), ("test", 2)):
        labels = data.labels.get(split)
        if labels is None:
            continue
        there = {"first": (labels < base).any(), "second": (labels >= base).any()}
        for half in list(there)[:halves]:
            if not there[half]:
                raise UserError(
                    f"--train-classes base needs {split} images of the {half} half of the classes."
                )
    if judged and not all(len(rows.validation) for rows in data.tasks):
        raise UserError(
            "No validation image of the first half of the classes is of a group that is not "
            "trained on; use --select cv, which divides the support set, or none."
        )
