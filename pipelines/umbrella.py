"""`clip-adapter COMMAND …`: one name for all commands."""

import sys
from importlib import import_module

COMMANDS = {
    "extract": ("clip_adapter.extract.command", "encode a data set once with a frozen CLIP"),
    "merge": ("clip_adapter.pipelines.merge", "join the parts that extract --shard wrote"),
    "fit": ("clip_adapter.pipelines.fit", "fit an adapter on cached features"),
    "predict": ("clip_adapter.pipelines.predict", "classify image files with a fitted adapter"),
    "report": ("clip_adapter.pipelines.report", "print the results of several runs side by side"),
    "inspect": ("clip_adapter.pipelines.inspect", "say what is in a cache or an adapter"),
}


def main() -> None:
    """The console script `clip-adapter`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        import_module(COMMANDS[name][0]).main(sys.argv[2:])
    lines = [f"  {command:10} {text}" for command, (_, text) in COMMANDS.items()]
    usage = "\n".join(["usage: clip-adapter COMMAND …", *lines, "COMMAND --help says more."])
    if name in ("-h", "--help"):
        print(usage)
        sys.exit(0)
    print(f"clip-adapter: unknown command {name!r}\n{usage}", file=sys.stderr)
    sys.exit(2)
