"""Every command and every Python example of README.md and docs/, run in order in one folder."""

import re
import shlex
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[1]
# The README comes first: the others go on with what its commands leave.
PAGES = ("README.md", "docs/practitioner.md", "docs/researcher.md", "docs/extract.md")
PAGES += ("docs/cluster.md",)
BLOCK = re.compile(
    r"^```(console network|console long|console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL
)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


NETWORK = [
    line[2:]
    for page in PAGES
    for kind, text in blocks(page)
    if kind == "console network"
    for line in text.splitlines()
    if line.startswith("$ ")
]


def test_commands_and_examples_run_and_print_what_is_shown(tmp_path: Path) -> None:
    for page in PAGES:
        for kind, text in blocks(page):
            if kind == "python":
                run(["python", "-c", text], tmp_path)
            elif kind == "console long":
                for command, _ in transcripts(text):
                    run(shlex.split(shortened(command)), tmp_path)
            elif kind == "console":
                for command, shown in transcripts(text):
                    printed = run(shlex.split(command), tmp_path)
                    assert words(shown) in ("", words(printed)), f"{page}: {command}"


@pytest.mark.parametrize("command", NETWORK)
def test_commands_that_need_a_network_parse(command: str) -> None:
    command = re.sub(r"^job=\$\((.*)\)$", r"\1", command)
    program, *arguments = shlex.split(command)
    if program == "sbatch":
        program, *arguments = shlex.split(arguments[arguments.index("--wrap") + 1])
    if program == "torchrun":
        program, *arguments = arguments[arguments.index("--no-python") + 1 :]
    if program == "clip-adapter":
        program, *arguments = arguments
    assert PARSERS[program](arguments) is not None


def _extract(arguments: list[str]) -> object:
    from clip_adapter.extract.config import ExtractConfig
    from clip_adapter.pipelines.console.parser import parse

    return parse(ExtractConfig, "extract", arguments)


def _fit(arguments: list[str]) -> object:
    from clip_adapter.pipelines.fitting.options import parse

    return parse(arguments)


def _predict(arguments: list[str]) -> object:
    from clip_adapter.pipelines.commands.predict import PredictConfig
    from clip_adapter.pipelines.console.parser import parse

    return parse(PredictConfig, "clip-adapter predict", arguments)


def _reproduce(arguments: list[str]) -> object:
    from clip_adapter.pipelines.commands.reproduce import ReproduceConfig
    from clip_adapter.pipelines.console.parser import parse

    return parse(ReproduceConfig, "clip-adapter reproduce", arguments)


def _import(arguments: list[str]) -> object:
    from clip_adapter.pipelines.commands.import_file import ImportConfig
    from clip_adapter.pipelines.console.parser import parse

    return parse(ImportConfig, "clip-adapter import", arguments)


def _merge(arguments: list[str]) -> object:
    from clip_adapter.pipelines.commands.merge import MergeConfig
    from clip_adapter.pipelines.console.parser import parse

    return parse(MergeConfig, "clip-adapter merge", arguments)


def _study(arguments: list[str]) -> object:
    from clip_adapter.pipelines.commands.study import parse

    return parse(arguments)


PARSERS = {
    "extract": _extract,
    "fit": _fit,
    "import": _import,
    "merge": _merge,
    "predict": _predict,
    "reproduce": _reproduce,
    "study": _study,
}


def run(command: list[str], folder: Path) -> str:
    done = processes.run(command, folder)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def shortened(command: str) -> str:
    """The command for one shot and one seed, in place of those that take minutes; folds need more
    shots, as many as an earlier command has, whose compiled programs are kept."""
    if "--select cv" in command:
        return f"{command} --shots 8"
    for option in ("shots", "seeds"):
        command = re.sub(rf"--{option} [0-9 ]+", f"--{option} 1 ", command)
    return command


def transcripts(text: str) -> list[tuple[str, str]]:
    """The commands of a block, each with the output shown below it."""
    pieces = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def words(text: str) -> str:
    """Text without layout and numbers, whose last digits may differ between machines."""
    return " ".join(re.sub(r"[-+]?[0-9][0-9.e-]*", "#", text).replace("─", "").split())
