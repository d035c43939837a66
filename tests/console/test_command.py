"""A command ends with an exit code and at most one sentence, never a traceback."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from clip_adapter.cache.errors import UserError
from clip_adapter.console.command import run_command


@dataclass(frozen=True)
class Config:
    """Do something."""

    count: int = 1
    """How often."""
    quick: bool = False
    """In a hurry."""
    names: tuple[str, ...] = ()
    """Whom."""
    mode: Literal["a", "b"] = "a"
    """Which way."""


def exit_code(command: Callable[[Config], object], *arguments: str) -> object:
    with pytest.raises(SystemExit) as exited:
        run_command(Config, command, "something", arguments)
    return exited.value.code


def test_arguments_become_the_config() -> None:
    seen: list[Config] = []
    assert exit_code(seen.append, "--count", "3", "--quick", "--names", "a", "b") == 0
    assert seen == [Config(3, True, ("a", "b"))]


def test_no_arguments_mean_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Config] = []
    assert exit_code(seen.append) == 0
    assert seen == [Config()]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1), ("text", 0), (Path(), 0)])
def test_only_an_integer_result_is_the_exit_code(result: object, code: int) -> None:
    assert exit_code(lambda config: result) == code


def test_a_user_error_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Config) -> None:
        raise UserError("There is no such thing; name another.")

    assert exit_code(fail) == 2
    assert capsys.readouterr() == ("", "something: There is no such thing; name another.\n")


def test_interrupted_is_one_line_and_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(config: Config) -> None:
        raise KeyboardInterrupt

    assert exit_code(interrupt) == 130
    assert capsys.readouterr() == ("", "something: interrupted\n")


def test_an_interruption_may_say_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(config: Config) -> None:
        raise KeyboardInterrupt("go on like this")

    assert exit_code(interrupt) == 130
    assert capsys.readouterr().err == "something: interrupted; go on like this\n"


@pytest.mark.parametrize(
    ("main", "arguments", "package"),
    [
        ("extract.command", [], "tyro"),
        ("extract.command", [], "torch"),
        ("pipelines.fit", [], "tyro"),
        ("pipelines.umbrella", ["extract"], "tyro"),
    ],
)
def test_ctrl_c_while_packages_are_imported(
    tmp_path: Path, main: str, arguments: list[str], package: str
) -> None:
    program = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == {package!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting)\n"
        f"from clip_adapter.{main} import main; main()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 130
    assert re.fullmatch(r"\w+: interrupted\n", finished.stderr)
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback() -> None:
    def fail(config: Config) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(Config, fail, "something", [])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "many"], "Error parsing --count: invalid literal for int.* 'many'"),
        (["--count"], "Missing value for argument '--count'; expected 1 values"),
        (["--cuont", "3"], "Unrecognized options: --cuont, 3; perhaps you meant --count"),
        (["--quik", "--nams"], "Unrecognized options: .*; perhaps you meant .*--names.*"),
        (["stray", "more " * 30], f"Unrecognized options: stray, {'more ' * 30}".rstrip()),
        (["--mode", "none"], r"invalid choice 'none' .*; expected one of \('a', 'b'\)"),
    ],
)
def test_arguments_that_do_not_parse_are_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], words: str, encoding: str,
) -> None:  # fmt: skip
    # tyro draws with other characters where standard output cannot take its lines.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert exit_code(lambda config: pytest.fail("must not run"), *arguments) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"something: {words}; see something --help.\n", said), said
    assert sys.stdout.buffer.tell() == 0


def test_help_shows_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda config: pytest.fail("must not run"), "--help") == 0
    shown = capsys.readouterr().out
    for text in ("usage: something", "Do something.", "--count", "How often.", "--quick"):
        assert text in shown
    assert "--no-quick" not in shown


def test_ctrl_c_in_a_real_process() -> None:
    program = (
        "import time\n"
        "from dataclasses import dataclass\n"
        "from clip_adapter.console.command import run_command\n"
        "@dataclass\n"
        "class Nothing:\n    '''Wait.'''\n"
        "def wait(config):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "run_command(Nothing, wait, 'wait', [])\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        assert child.stderr
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.05)
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(timeout=20) == 130
        assert child.stderr.read() == "wait: interrupted\n"
