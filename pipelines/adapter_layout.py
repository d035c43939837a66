"""What the setting of a saved adapter may say, and which arrays follow from it (without JAX)."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]

METHOD_NAMES = ("zero-shot", "linear-probe", "clip-adapter")
# The branches by name and the ratio that belongs to each of them.
RATIOS = {"image": "alpha", "text": "beta"}
RATIO_KINDS = ("learned", "hypernet")
HYPER_NETWORK_WIDTH = 32
LARGEST_INTEGER = 2**31 - 1
LARGEST_FLOAT = 3.4e38  # of float32, in which all arithmetic is done


def is_number(value: object, low: float = -LARGEST_FLOAT, high: float = LARGEST_FLOAT) -> bool:
    """Whether `value` is a number (no bool) within [low, high]; NaN is not."""
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]


def branches(setting: Mapping[str, Any]) -> tuple[str, ...]:
    """The branches of a clip-adapter setting that have an adapter."""
    return tuple(RATIOS) if setting["branch"] == "both" else (setting["branch"],)


def check_setting(method: str, setting: Mapping[str, Any]) -> None:
    """Raises ValueError, with the name and the value at fault, for a setting that `method` cannot
    have; names that `method` does not know are let through."""
    if method not in METHOD_NAMES:
        raise ValueError(f"the method {_short(method)} is none of {', '.join(METHOD_NAMES)}")
    if method == "linear-probe":
        _check(setting, "C", "a positive number", _is_positive)
    if method == "clip-adapter":
        _check_clip_adapter(setting)


def array_shapes(method: str, setting: Mapping[str, Any], classes: int, dim: int) -> Shapes:
    """Name and shape of each fitted array.

    setting: one that `check_setting` accepts. classes: C. dim: D.
    """
    if method == "linear-probe":
        return {"kernel": (dim, classes), "bias": (classes,)}
    if method == "zero-shot":
        return {}
    shapes: Shapes = {}
    hidden = max(1, dim // setting["reduction"])
    for branch in branches(setting):
        shapes[f"{branch}/bottleneck/down/kernel"] = (dim, hidden)
        shapes[f"{branch}/bottleneck/up/kernel"] = (hidden, dim)
        match setting[RATIOS[branch]]:
            case "learned":
                shapes[f"{branch}/ratio/logit"] = ()
            case "hypernet":
                shapes[f"{branch}/ratio/hidden/kernel"] = (dim, HYPER_NETWORK_WIDTH)
                shapes[f"{branch}/ratio/direction"] = (HYPER_NETWORK_WIDTH, 1)
                shapes[f"{branch}/ratio/logit"] = ()
            case _:
                shapes[f"{branch}/ratio/value"] = ()
    return shapes


def _check_clip_adapter(setting: Mapping[str, Any]) -> None:
    _check_one_of(setting, "branch", ("image", "text", "both"))
    for branch in branches(setting):
        name = RATIOS[branch]
        _check(setting, name, "a number in [0, 1], `learned` or `hypernet`", _is_ratio)
        if isinstance(setting[name], str):
            _check(setting, f"{name}_init", "a number in [0, 1]", _is_share)
    for name in ("reduction", "epochs", "batch_size", "evaluate_every"):
        _check(setting, name, "a positive integer", _is_count)
    _check(setting, "learning_rate", "a positive number", _is_positive)
    _check(setting, "weight_decay", "a number ≥ 0", lambda value: is_number(value, low=0))
    _check_one_of(setting, "optimizer", ("adamw", "sgd"))
    _check_one_of(setting, "warmup", ("linear", "constant"))
    _check(setting, "drop_last", "true or false", lambda value: type(value) is bool)


def _check(
    setting: Mapping[str, Any], name: str, wanted: str, fits: Callable[[object], bool]
) -> None:
    if name not in setting:
        raise ValueError(f"{name} is missing")
    if not fits(setting[name]):
        raise ValueError(f"{name} is {_short(setting[name])}, not {wanted}")


def _check_one_of(setting: Mapping[str, Any], name: str, values: tuple[str, ...]) -> None:
    _check(setting, name, f"one of {', '.join(values)}", lambda value: value in values)


def _is_share(value: object) -> bool:
    return is_number(value, 0, 1)


def _is_ratio(value: object) -> bool:
    return value in RATIO_KINDS if isinstance(value, str) else _is_share(value)


def _is_positive(value: object) -> bool:
    return is_number(value, low=math.ulp(0))


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_INTEGER


def _short(value: object) -> str:
    """A representation of bounded length."""
    return reprlib.repr(value)
