"""The commands by name. Each is loaded when it is called, and Ctrl-C is heeded while it loads."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from clip_adapter.pipelines.interruption import handle, leave_at_once

COMMANDS = {
    "extract": ("extract_command", "encode a data set once with a frozen CLIP"),
    "merge": ("merge", "join the parts that extract --shard wrote"),
    "fit": ("fit", "fit an adapter on cached features"),
    "predict": ("predict", "classify image files with a fitted adapter"),
    "report": ("report", "print the results of several runs side by side"),
    "inspect": ("inspect_file", "say what is in a cache or an adapter"),
}
ROOM = "clip_adapter.pipelines"


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
    handle(leave_at_once)
    from clip_adapter.pipelines.command import run

    run("clip-adapter", lambda: _about(name))


def _call(name: str, program: str, arguments: Sequence[str]) -> NoReturn:
    handle(leave_at_once)  # until the command itself begins
    import_module(f"{ROOM}.{COMMANDS[name][0]}").main(arguments)
    raise AssertionError(f"{program} returned")


def _about(name: str) -> None:
    from clip_adapter.cache.errors import UserError
    from clip_adapter.cache.words import quoted

    if name == "--version":
        from clip_adapter.pipelines.command_line import version

        print(version())
        return
    lines = [f"  {command:10} {text}" for command, (_, text) in COMMANDS.items()]
    if name in ("-h", "--help"):
        print("\n".join(["usage: clip-adapter COMMAND …", *lines, "COMMAND --help says more."]))
        return
    raise UserError(f"There is no command {quoted(name)}; the commands are {', '.join(COMMANDS)}.")
