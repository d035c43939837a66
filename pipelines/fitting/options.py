"""`fit`'s options: those of FitConfig, and those of the methods that the line names; and the
commands that a plan amounts to."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from clip_adapter.adapters.hyper import Hyper, Value
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.registry import METHODS
from clip_adapter.errors import UserError
from clip_adapter.pipelines.console.argument_types import READERS, number_or
from clip_adapter.pipelines.console.parser import Parser, config_from, parser_for
from clip_adapter.pipelines.fitting.config import CHOICES, FitConfig, Shots
from clip_adapter.pipelines.fitting.plan import TASKS, Plan, named
from clip_adapter.words import dashed

Flags = dict[str, tuple[str, list[Method]]]
"""Flag → (hyper-parameter, the methods that it is meant for)."""
# As many values as this are shown one by one in the help.
VALUES_SHOWN = 8


def parse(arguments: Sequence[str] | None = None, program: str = "fit") -> FitConfig:
    """The configuration that a command line asks for.

    program: whose --help a sentence names.
    Raises UserError, in a sentence, where it does not parse, and SystemExit after --help.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    methods = _named(words)
    flags = flags_of(methods)
    _check_flags(words, methods, flags)
    parser = parser_for(FitConfig, program)
    _add(parser, flags)
    given = parser.parse(words)
    hyper = {
        (name if len(owners) > 1 or "." not in flag else f"{owners[0].name}.{name}"): tuple(values)
        for flag, (name, owners) in flags.items()
        if (values := getattr(given, _destination(flag), None)) is not None
    }
    config = config_from(FitConfig, given)
    stated = frozenset(f.name for f in fields(config) if hasattr(given, f.name))
    return replace(config, hyper=hyper, stated=stated)


def flags_of(methods: Sequence[Method]) -> Flags:
    """`--alpha` where one method has that or it means the same to all, and `--tip-adapter.alpha`
    for each."""
    owners: dict[str, list[Method]] = {}
    for method in methods:
        for name in method.hyper:
            owners.setdefault(name, []).append(method)
    flags: Flags = {}
    for name, those in owners.items():
        flag = dashed(those[0].flag(name))
        if all(_means_the_same(m.hyper[name], those[0].hyper[name]) for m in those):
            flags[flag] = name, those
        for method in those:
            flags[f"{method.name}.{flag}"] = name, [method]
    return flags


def _named(words: Sequence[str]) -> list[Method]:
    """The methods that --method names, which decide what the other options are."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--method", nargs="*", default=list(FitConfig.method))
    try:
        names = first.parse_known_args(words)[0].method
    except argparse.ArgumentError:
        names = list(FitConfig.method)
    if "all" in names:
        return list(METHODS.values())
    return [named(name) for name in names]


def _check_flags(words: Sequence[str], methods: Sequence[Method], flags: Flags) -> None:
    """Say what to write instead of an option that means several things, or another method's."""
    for word in words:
        flag = word.removeprefix("--").partition("=")[0]
        if not word.startswith("--") or flag in flags:
            continue
        exact = [f"--{m.name}.{flag}" for m in methods if f"{m.name}.{flag}" in flags]
        if exact:
            raise UserError(
                f"--{flag} means something else to each method; say {' or '.join(exact)}."
            )
        owners = [
            method.name
            for method in METHODS.values()
            if any(flag == dashed(method.flag(name)) for name in method.hyper)
        ]
        if owners:
            names = " and ".join(method.name for method in methods)
            raise UserError(f"{names} has no --{flag}; it belongs to {', '.join(owners)}.")


def _add(parser: Parser, flags: Flags) -> None:
    for flag, (name, owners) in flags.items():
        alone = len(owners) == 1
        again = "." in flag and flags.get(flag.partition(".")[2], ("", []))[1] == owners
        group = _group(parser, owners[0].name if alone else "methods that are trained")
        hyper = owners[0].hyper[name]
        group.add_argument(
            f"--{flag}",
            dest=_destination(flag),
            nargs="*",  # several of what holds for all settings are for --ablate
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS if again else _help(name, owners).replace("%", "%%"),
            **_reader(hyper),
        )


def _group(parser: Parser, title: str) -> Any:
    for group in parser._action_groups:
        if group.title == title:
            return group
    return parser.add_argument_group(title)


def _reader(hyper: Hyper) -> dict[str, Any]:
    """The keywords of `add_argument` for values of a hyper-parameter."""
    if hyper.kind is bool:
        return {"type": _truth, "metavar": "true|false"}
    if not hyper.is_numeric:
        return {"choices": list(hyper.words)}
    number, metavar = READERS[hyper.kind]
    if hyper.words:
        words = hyper.words
        return {"type": number_or(*words, number=number), "metavar": "|".join([metavar, *words])}
    return {"type": number, "metavar": metavar}


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is neither true nor false")
    return text == "true"


def _help(name: str, owners: Sequence[Method]) -> str:
    """What it is, and in square brackets what is taken where nothing is given."""
    shown = [(method, _taken(method, name)) for method in owners]
    if len({words for _, words in shown}) == 1:
        return f"{owners[0].hyper[name].help} [{shown[0][1]}]"
    each = ", ".join(f"{method.name}: {words}" for method, words in shown)
    return f"{owners[0].hyper[name].help} [{each}]"


def _taken(method: Method, name: str) -> str:
    hyper = method.hyper[name]
    tried = hyper.tried or (hyper.default,)
    if len(tried) > VALUES_SHOWN:
        words = f"{len(tried)} values from {_short(tried[0])} to {_short(tried[-1])}"
    else:
        words = " ".join(map(_short, tried))
    if hyper.tried:
        words += f"; --select none: {_short(hyper.default)}"
    for preset, values in method.presets.items():
        if name in values:
            words += f"; {preset}: {_short(values[name])}"
    return words


def _short(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _means_the_same(one: Hyper, other: Hyper) -> bool:
    """Whether one value can mean the same to both."""
    return (one.help, one.kind, one.words, one.low, one.high, one.above) == (
        *(other.help, other.kind, other.words, other.low, other.high, other.above),
    )


def _destination(flag: str) -> str:
    return f"hyper {flag}"


def command_line(plan: Plan, run: Path) -> str:
    """`fit …`, which makes this plan again from the same cache; options at their defaults are left
    out, and so is where the cache lies.

    run: the folder where it was carried out, in which stated tasks lie."""
    named = [planned.name for planned in plan.fitted]
    words = ["fit", "--method", *named]
    if plan.from_run:
        words = ["fit", "--from", plan.from_run]
        words += ["--method", *named] if ":" in named[0] else []
    baselines = tuple(planned.name for planned in plan.methods if planned.baseline)
    usual = tuple(n for n in FitConfig.baselines if n not in {p.name for p in plan.fitted})
    if baselines != usual:
        words += ["--baselines", *baselines]
    if plan.tasks:
        words += ["--tasks", str(run / TASKS)]
    for name in () if plan.tasks else ("shots", "seeds"):
        words += [f"--{name}", *map(str, getattr(plan, name))]
    for name in CHOICES:
        if name == "select" and plan.from_run:
            continue
        if getattr(plan, name) != getattr(FitConfig, name):
            words += [f"--{dashed(name)}", getattr(plan, name)]
    words += [f"--{f.name}" for f in fields(plan) if getattr(plan, f.name) is True]
    if plan.ablate:
        words += ["--ablate", *plan.ablate]
    if plan.unlabelled:
        words += ["--unlabelled", plan.unlabelled_cache]
    for flag, values in {} if plan.from_run else _hyper(plan).items():
        words += [f"--{flag}", *map(_written, values)]
    return shlex.join(words)


def command_that_keeps(plan: Plan, run: Path, method: str, shots: Shots, seed: int) -> str:
    """`fit …`, which fits one of the plan's methods as the plan does, on one of its tasks (on all
    where they were stated), and so keeps its adapter."""
    methods = tuple(
        replace(planned, baseline=planned.method.name != method, ablation={})
        for planned in plan.methods
        if planned.baseline or planned.method.name == method
    )
    alone = replace(plan, methods=methods, compared=(), ablate=(), shots=(shots,), seeds=(seed,))
    return shlex.join([*shlex.split(command_line(alone, run)), "--cache", plan.cache])


def _hyper(plan: Plan) -> dict[str, tuple[Value, ...]]:
    """Flag → values, of the hyper-parameters that are not at what would be tried anyway."""
    flags = flags_of([planned.method for planned in plan.fitted])
    values_by_flag: dict[str, tuple[Value, ...]] = {}
    for planned in plan.fitted:
        method = planned.method
        there = {method.hyper[name].needs for name in planned.values}
        usual = method.values({}, plan.preset, one=plan.select == "none", there=there)
        for name, values in planned.values.items():
            values = plan.given(planned, name, values)
            if tuple(values) != usual[name]:
                own = [f for f, (n, owners) in flags.items() if n == name and owners == [method]]
                values_by_flag[own[0]] = tuple(values)
    return values_by_flag


def _written(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
