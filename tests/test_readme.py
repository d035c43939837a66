"""Every command and every Python example of the README, run in its order in one folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clip_adapter.extract.config import ExtractConfig
from clip_adapter.pipelines.command_line import parse
from clip_adapter.pipelines.fit import FitConfig

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(console network|console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(README.read_text(encoding="utf-8"))
NETWORK = [
    line[2:]
    for kind, text in BLOCKS
    if kind == "console network"
    for line in text.splitlines()
    if line.startswith("$ ")
]


def test_commands_and_examples_run_and_print_what_the_readme_shows(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for kind, text in BLOCKS:
        if kind == "python":
            run([sys.executable, "-c", text], tmp_path, environment)
        elif kind == "console":
            for command, shown in transcripts(text):
                printed = run(shlex.split(command), tmp_path, environment)
                assert words(shown) in ("", words(printed)), command


@pytest.mark.parametrize("command", NETWORK)
def test_commands_that_need_a_network_parse(command: str) -> None:
    program, *arguments = shlex.split(command)
    config = {"extract": ExtractConfig, "fit": FitConfig}[program]
    assert isinstance(parse(config, program, arguments), config)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def transcripts(text: str) -> list[tuple[str, str]]:
    """The commands of a block, each with the output shown below it."""
    pieces = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def words(text: str) -> str:
    """Text without layout and numbers, whose last digits may differ between machines."""
    return " ".join(re.sub(r"[-+]?[0-9][0-9.e-]*", "#", text).replace("─", "").split())
