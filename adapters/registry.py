"""The methods by name: those of this house, and those of installed packages and of the user.

A package offers its own through the entry-point group `clip_adapter.methods`; a user names one as
`MODULE:NAME`. The record of a method that somebody else wrote is checked as it is taken.
"""

import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.methods.clap import CLAP, ZS_LP
from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER
from clip_adapter.adapters.methods.coop import COOP
from clip_adapter.adapters.methods.cross_modal import CROSS_MODAL
from clip_adapter.adapters.methods.gda import GDA
from clip_adapter.adapters.methods.linear_probe import LINEAR_PROBE
from clip_adapter.adapters.methods.lp_plus_plus import LP_PLUS_PLUS
from clip_adapter.adapters.methods.pro_lip import PRO_LIP
from clip_adapter.adapters.methods.proker import PROKER
from clip_adapter.adapters.methods.ridge import RIDGE
from clip_adapter.adapters.methods.rla import RLA
from clip_adapter.adapters.methods.task_res import TASK_RES
from clip_adapter.adapters.methods.timo import TIMO, TIMO_S
from clip_adapter.adapters.methods.tip_adapter import TIP_ADAPTER, TIP_ADAPTER_F
from clip_adapter.adapters.methods.zero_shot import ZERO_SHOT

GROUP = "clip_adapter.methods"
REFERENCE = ZERO_SHOT
"""What adapting has to outdo."""
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        ZERO_SHOT,
        LINEAR_PROBE,
        CLIP_ADAPTER,
        TIP_ADAPTER,
        TIP_ADAPTER_F,
        TASK_RES,
        LP_PLUS_PLUS,
        CLAP,
        ZS_LP,
        RLA,
        CROSS_MODAL,
        COOP,
        PRO_LIP,
        GDA,
        PROKER,
        RIDGE,
        TIMO,
        TIMO_S,
    )
}


LONGEST = 80
NEEDS = {"text", "tower", "projection"}
MAY_NEED = {"", "second"}  # of a hyper-parameter
# What says something else than a method on the command line, and the columns and options of a run
# that are not a hyper-parameter's.
WORDS = {"all", "method", "none"}
TAKEN = {
    *("method", "shots", "seed", "seeds", "epochs_run", "best_epoch", "val_accuracy", "val_nll"),
    *("status", "seconds", "images", "cache", "out", "baselines", "select", "score", "preset"),
    *("repeat", "tasks", "unlabelled", "from", "from_run", "class_weight"),
    *(
        "augment",
        "validation",
        "train_classes",
        "search",
        "ablate",
        "refit",
        "placement",
        "resume",
        "help",
    ),
    *("version", "hyper", "stated", "caches", "runs", "verbose"),
    *("text_features", "classes", "logit_scale", "logit_bias", "random_state"),
}
OF_TRAINING = ("epochs", "batch_size", "epoch", "evaluate_every", "drop_last")
CALLABLE = ("logits", "fit")
CALLABLE_OR_NONE = (
    *("loss", "optimizer", "finish", "solver", "propose", "for_classes", "adapt"),
    *("left_out", "describe", "note", "prepare"),
)


def find_method(name: str) -> Method:
    """The method of a name, or of `MODULE:NAME`, which imports MODULE (also from the folder one
    stands in). It is then known by its own name as well.

    Raises LookupError, in a sentence, where there is none.

    Examples:
        >>> from clip_adapter import find_method
        >>> find_method("tip-adapter").needs
        ()
    """
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        return _imported(name)
    for entry in entry_points(group=GROUP, name=name):
        return _known(_loaded(entry.load, name), name)
    known = sorted({*METHODS, *(entry.name for entry in entry_points(group=GROUP))})
    raise LookupError(
        f"there is no method {name!r:.80}; the methods are {', '.join(known)}, and MODULE:NAME of "
        "your own"
    )


def _imported(name: str) -> Method:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return _known(_loaded(lambda: getattr(import_module(module), attribute), name), name)
    finally:
        if added:
            sys.path.remove(here)


def _loaded(load: Callable[[], object], name: str) -> object:
    """Whatever a module of somebody else's raises becomes a LookupError, with a note that is the
    traceback of their code."""
    try:
        return load()
    except (Exception, SystemExit) as error:
        known = isinstance(error, ImportError | AttributeError | TypeError | ValueError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        raised = LookupError(f"the method {name!r:.80} cannot be imported ({reason})")
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
        if own or isinstance(error, SyntaxError):
            lines = [
                *traceback.StackSummary.from_list(own).format(),
                *traceback.format_exception_only(error),
            ]
            raised.add_note("".join(lines).rstrip())
        raise raised from error


def _known(method: object, name: str) -> Method:
    if not isinstance(method, Method):
        raise LookupError(f"{name!r:.80} is no Method")
    try:
        check_record(method)
    except (ValueError, TypeError, AttributeError) as error:
        raise LookupError(f"{name!r:.80} is no method that can be used: {error}") from error
    if METHODS.setdefault(method.name, method) is not method:
        raise LookupError(f"{name!r:.80} is called {method.name}, like another method")
    return method


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
    if not isinstance(method.source, str):
        raise ValueError(f"its source is {method.source!r:.40} and no text")
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
        if hyper.needs not in MAY_NEED:
            raise ValueError(f"{name} needs {hyper.needs!r:.40}; there is {sorted(MAY_NEED)[1:]}")
        if not isinstance(hyper.default, bool | int | float | str):
            raise ValueError(f"{name} is {hyper.default!r:.40}, not a number or a word")
        younger = () if hyper.absent is None else (hyper.absent,)
        for value in (hyper.default, *hyper.tried, *hyper.ablated, *younger):
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
    if "tower" in method.needs and method.prepare is None:
        raise ValueError("it needs the tower and has no `prepare`")
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
