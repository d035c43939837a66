"""The methods by name: those of this house, and those of installed packages and of the user.

A package offers its own through the entry-point group `clip_adapter.methods`; a user names one as
`MODULE:NAME`.
"""

import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

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
from clip_adapter.adapters.methods.rla import RLA
from clip_adapter.adapters.methods.task_res import TASK_RES
from clip_adapter.adapters.methods.tip_adapter import TIP_ADAPTER, TIP_ADAPTER_F
from clip_adapter.adapters.methods.zero_shot import ZERO_SHOT
from clip_adapter.adapters.record_check import check_record

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
    )
}


def find_method(name: str) -> Method:
    """The method of a name, or of `MODULE:NAME`, which imports MODULE (also from the folder one
    stands in). It is then known by its own name as well.

    Raises LookupError, in a sentence, where there is none.
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
