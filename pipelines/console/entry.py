"""The commands by name. Each is loaded when it is called, and Ctrl-C is heeded while it loads."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from clip_adapter.pipelines.console.interruption import EXIT_INTERRUPTED, handle, leave_at_once

COMMANDS = {
    "extract": ("extract", "encode a data set once with a frozen CLIP"),
    "merge": ("merge", "join the parts that extract --shard wrote"),
    "fit": ("fit", "fit an adapter on cached features"),
    "predict": ("predict", "classify image files with a fitted adapter"),
    "evaluate": ("evaluate", "score a fitted adapter on labelled images"),
    "suggest": ("suggest", "say which images without labels to label next"),
    "audit": ("audit", "look through labels, twins and classes of a cache"),
    "report": ("report", "print the results of several runs side by side"),
    "study": ("study", "fit on many caches and compare methods over all of them"),
    "reproduce": ("reproduce", "run the paper's study from raw data, beside its numbers"),
    "export": ("export", "write a classifier or a cache for other programs"),
    "import": ("import_file", "make a cache of features that were made elsewhere"),
    "inspect": ("inspect_file", "say what is in a cache or an adapter"),
}
ROOM = "clip_adapter.pipelines.commands"


def extract() -> NoReturn:
    """The console script `extract`."""
    _call("extract", "extract", sys.argv[1:])


def fit() -> NoReturn:
    """The console script `fit`."""
    _call("fit", "fit", sys.argv[1:])


def main() -> NoReturn:
    """The console script `clip-adapter`: `clip-adapter COMMAND …`, one name for all commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        _call(name, f"clip-adapter {name}", sys.argv[2:])
    begin()
    from clip_adapter.pipelines.console.running import run

    run("clip-adapter", lambda: _about(name))


def begin() -> None:
    """Ctrl-C ends the process until the command itself begins, and the standard streams are open.

    cron and services close them; the next file that is opened would become one of them, and be
    written to by whatever prints.
    """
    handle(leave_at_once)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: this one
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: PTH123, SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115


def _call(name: str, program: str, arguments: Sequence[str]) -> NoReturn:
    begin()
    module = import_module(f"{ROOM}.{COMMANDS[name][0]}")
    try:
        module.main(arguments)
    except SystemExit as ended:
        if ended.code != EXIT_INTERRUPTED:
            raise
        # All is said, and files are closed. Threads in compiled code cannot be stopped, and tearing
        # down what XLA was compiling ends in a crash: so nothing is waited for, or torn down.
        os._exit(EXIT_INTERRUPTED)
    raise AssertionError(f"{program} returned")


def _about(name: str) -> None:
    from clip_adapter.errors import UserError
    from clip_adapter.words import quoted

    if name == "--version":
        from clip_adapter.pipelines.console.parser import version

        print(version())
        return
    lines = [f"  {command:10} {text}" for command, (_, text) in COMMANDS.items()]
    if name in ("-h", "--help"):
        print("\n".join(["usage: clip-adapter COMMAND …", *lines, "COMMAND --help says more."]))
        return
    raise UserError(f"There is no command {quoted(name)}; the commands are {', '.join(COMMANDS)}.")
