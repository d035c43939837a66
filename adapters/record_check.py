"""Whether the record of a method that somebody else wrote can be worked with, as it is taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields

from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Method

LONGEST = 80
NEEDS = {"text", "tower", "projection"}
# What says something else than a method on the command line, and the columns and options of a run
# that are not a hyper-parameter's.
WORDS = {"all", "method", "none"}
TAKEN = {
    *("method", "shots", "seed", "seeds", "epochs_run", "best_epoch", "val_accuracy", "val_nll"),
    *("status", "seconds", "images", "cache", "out", "baselines", "select", "score", "preset"),
    "repeat",
    *("augment", "train_classes", "search", "ablate", "refit", "placement", "resume", "help"),
    *("version", "hyper", "stated", "caches", "runs", "verbose"),
    *("text_features", "classes", "logit_scale", "logit_bias", "random_state"),
}
OF_TRAINING = ("epochs", "batch_size", "epoch", "evaluate_every", "drop_last")
CALLABLE = ("logits", "fit")
CALLABLE_OR_NONE = (
    *("loss", "optimizer", "finish", "solver", "propose", "for_classes", "adapt"),
    *("describe", "note"),
)


def check_record(method: Method) -> None:
    """Raises ValueError, in a clause, for the first thing that cannot be."""
    name = method.name
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w+.-]*", name) or len(name) > LONGEST:
        raise ValueError(
            f"its name is {name!r:.80}; take letters, digits and + . - _, a letter or digit first"
        )
    if name.lower() in WORDS:
        raise ValueError(f"its name is {name!r}, which is a word of the command line")
    for function in CALLABLE + CALLABLE_OR_NONE:
        value = getattr(method, function)
        if not callable(value) and (function in CALLABLE or value is not None):
            raise ValueError(f"its {function} is {value!r:.40} and no function")
    for field in fields(method):
        if isinstance(field.default, str | bool):
            value = getattr(method, field.name)
            if type(value) is not type(field.default):
                raise ValueError(f"its {field.name} is {value!r:.40}")
    if not isinstance(method.reference, str):
        raise ValueError(f"its reference is {method.reference!r:.40} and no text")
    _check_hyper(method)
    _check_shapes(method)
    _check_names(method)


def _check_hyper(method: Method) -> None:
    if not _is_table(method.hyper, Hyper):
        raise ValueError("its hyper is no table of Hyper by name")
    earlier: set[str] = set()
    for name, hyper in method.hyper.items():
        flag = hyper.flag or name
        if not (name.isidentifier() and name.strip("_") == name) or name in TAKEN:
            raise ValueError(f"it cannot have a hyper-parameter of the name {name!r:.80}")
        if not re.fullmatch(r"[A-Za-z][\w-]*", flag) or flag.replace("-", "_") in TAKEN:
            raise ValueError(f"{name} cannot have the flag {flag!r:.80}")
        if not isinstance(hyper.help, str):
            raise ValueError(f"the help of {name} is no text")
        if not isinstance(hyper.when, Mapping) or not hyper.when.keys() <= earlier:
            raise ValueError(f"{name} depends on something that does not stand above it")
        if not isinstance(hyper.default, bool | int | float | str):
            raise ValueError(f"{name} is {hyper.default!r:.40}, not a number or a word")
        for value in (hyper.default, *hyper.tried, *hyper.ablated):
            hyper.checked(name, value)
        earlier.add(name)
    for preset, values in method.presets.items():
        for name, value in values.items():
            if name not in method.hyper:
                raise ValueError(f"its preset {preset!r:.40} has {name!r:.40}, which it has not")
            method.hyper[name].checked(name, value)


def _check_shapes(method: Method) -> None:
    if not _is_table(method.shapes, str):
        raise ValueError("its shapes are no table of letters by name")
    for name, letters in method.shapes.items():
        if any(not re.fullmatch(r"[A-Z]|1", letter) for letter in letters.split()):
            raise ValueError(
                f"the shape of {name!r:.40} is {letters!r:.40}, not letters like 'S D'"
            )


def _check_names(method: Method) -> None:
    for field in ("trained", "after_training", "needs"):
        value = getattr(method, field)
        if not isinstance(value, tuple | list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"its {field} is {value!r:.40}, not a tuple of names")
    if unknown := set(method.needs) - NEEDS:
        raise ValueError(f"it needs {', '.join(sorted(unknown))}; there are {sorted(NEEDS)}")
    if method.network and not re.fullmatch(r"[\w.]+:\w+", method.network):
        raise ValueError(f"its network is {method.network!r:.80}, not MODULE:CLASS")
    lacking = [name for name in OF_TRAINING if method.is_trained and name not in method.hyper]
    for name in method.after_training:
        lacking += [n for n in (name, f"{name}_init") if n not in method.hyper]
    if lacking:
        raise ValueError(f"it lacks the hyper-parameter {', '.join(lacking)}")


def _is_table(value: object, kind: type) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(one, kind) for name, one in value.items()
    )
