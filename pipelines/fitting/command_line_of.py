"""The commands that a plan amounts to."""

from __future__ import annotations

import shlex
from dataclasses import replace

from clip_adapter.adapters.hyper import Value
from clip_adapter.pipelines.fitting.config import FitConfig, Shots
from clip_adapter.pipelines.fitting.flags import flags_of
from clip_adapter.pipelines.fitting.plan import Plan


def command_line(plan: Plan) -> str:
    """`fit …`, which makes this plan again from the same cache; options at their defaults are left
    out, and so is where the cache lies."""
    words = ["fit", "--method", *(planned.name for planned in plan.fitted)]
    baselines = tuple(planned.name for planned in plan.methods if planned.baseline)
    usual = tuple(n for n in FitConfig.baselines if n not in {p.name for p in plan.fitted})
    if baselines != usual:
        words += ["--baselines", *baselines]
    for name in ("shots", "seeds"):
        words += [f"--{name}", *map(str, getattr(plan, name))]
    for name in ("select", "score", "preset", "train_classes", "search", "placement"):
        if getattr(plan, name) != getattr(FitConfig, name):
            words += [f"--{name.replace('_', '-')}", getattr(plan, name)]
    words += [f"--{name}" for name in ("repeat", "augment", "refit") if getattr(plan, name)]
    if plan.ablate:
        words += ["--ablate", *plan.ablate]
    for flag, values in _hyper(plan).items():
        words += [f"--{flag}", *map(_written, values)]
    return shlex.join(words)


def command_that_keeps(plan: Plan, method: str, shots: Shots, seed: int) -> str:
    """`fit …`, which fits one of the plan's methods as the plan does, on one of its tasks, and so
    keeps its adapter."""
    methods = tuple(
        replace(planned, baseline=planned.method.name != method, ablation={})
        for planned in plan.methods
        if planned.baseline or planned.method.name == method
    )
    alone = replace(plan, methods=methods, compared=(), ablate=(), shots=(shots,), seeds=(seed,))
    return shlex.join([*shlex.split(command_line(alone)), "--cache", plan.cache])


def _hyper(plan: Plan) -> dict[str, tuple[Value, ...]]:
    """Flag → values, of the hyper-parameters that are not at what would be tried anyway."""
    flags = flags_of([planned.method for planned in plan.fitted])
    given: dict[str, tuple[Value, ...]] = {}
    for planned in plan.fitted:
        method = planned.method
        usual = method.values({}, plan.preset, one=plan.select == "none")
        for name, values in planned.values.items():
            values = plan.given(planned, name, values)
            if tuple(values) != usual[name]:
                own = [f for f, (n, owners) in flags.items() if n == name and owners == [method]]
                given[own[0]] = tuple(values)
    return given


def _written(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
