"""The factors of an ablation: which hyper-parameters, and the values that it shows of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.registry import METHODS
from clip_adapter.errors import UserError
from clip_adapter.words import dashed

Values = Mapping[str, Sequence[Value]]


def of_flag(flag: str) -> str:
    """The hyper-parameter of a flag, such as learning_rate of `lr`."""
    for method in METHODS.values():
        for name, hyper in method.hyper.items():
            if flag in (name, hyper.flag, dashed(name)):
                return name
    return flag


def shown_values(method: Method, factor: str, given: Sequence[Value]) -> tuple[Value, ...]:
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


def check_effect(method: Method, factor: str, values: Values) -> None:
    """Raises UserError where a factor is in no setting that these values make."""
    hyper = method.hyper[factor]
    if not any(factor in setting for setting in method.settings(values)):
        reasons = " or ".join(
            f"--{dashed(other)} {' or '.join(map(str, some))}" for other, some in hyper.when.items()
        )
        raise UserError(f"--ablate {factor} has no effect without {reasons}.")


def in_grid(values: Values, ablation: Values, row: Mapping[str, str]) -> bool:
    """Whether a row of results.csv belongs to the choice: that of a value which only an ablation
    shows does not."""
    return all(
        not row.get(factor) or row[factor] in map(str, values[factor]) for factor in ablation
    )
