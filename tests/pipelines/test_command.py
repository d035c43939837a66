"""A command ends with an exit code and at most one sentence, never a traceback."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from clip_adapter.errors import UserError
from clip_adapter.pipelines.console.running import run_command


@dataclass(frozen=True)
class Config:
    """Do something.

    Attributes:
        count: How often.
        quick: In a hurry.
        names: Whom.
    """

    count: int = 1
    quick: bool = False
    names: tuple[str, ...] = ()


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
    ("entry", "arguments", "package"),
    [
        ("extract", [], "clip_adapter.pipelines.commands.extract"),
        ("extract", [], "argparse"),
        ("extract", [], "torch"),
        ("fit", [], "clip_adapter.pipelines.commands.fit"),
        ("fit", [], "argparse"),
        ("main", ["extract"], "argparse"),
        ("main", ["inspect", "x"], "h5py"),
        ("main", ["predict", "x"], "numpy"),
        ("main", ["nothing"], "clip_adapter.words"),
    ],
)
def test_ctrl_c_while_packages_are_imported(
    tmp_path: Path, entry: str, arguments: list[str], package: str
) -> None:
    program = (
        "import signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name != {package!r}: return\n"
        "        try: signal.raise_signal(signal.SIGINT)\n"
        "        except KeyboardInterrupt as error:\n"
        "            if name == 'torch': raise ImportError('as extensions do') from error\n"
        "            raise\n"
        "sys.meta_path.insert(0, Interrupting)\n"
        f"from clip_adapter.pipelines.console.entry import {entry}; {entry}()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 130
    assert re.fullmatch(r"[\w -]+: interrupted\n", finished.stderr)
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback() -> None:
    def fail(config: Config) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(Config, fail, "something", [])


def test_ctrl_c_in_a_real_process() -> None:
    program = (
        "import time\n"
        "from dataclasses import dataclass\n"
        "from clip_adapter.pipelines.console.running import run_command\n"
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


@pytest.mark.parametrize("arguments", [["--count", "many"], ["--cuont", "3"]])
def test_arguments_that_do_not_parse_are_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert exit_code(lambda config: pytest.fail("must not run"), *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"something: .*--count.*; see something --help\.\n", printed.err)


def test_lack_of_memory_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda config: np.empty((10**9, 10**9))) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"something: There is not enough memory for this \(.*EiB.*\)\.\n", said)


def test_what_the_system_refuses_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(lambda config: (tmp_path / ("x" * 300)).stat()) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"something: .*x+…x+: File name too long\.\n", said)
    assert exit_code(lambda config: (tmp_path / "a" / "b").write_text("")) == 2
    assert capsys.readouterr().err.endswith("/a/b: No such file or directory.\n")


def test_no_folder_for_temporary_files_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch asks for one as it is imported."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    assert exit_code(lambda config: tempfile.gettempdir()) == 2
    said = capsys.readouterr().err
    assert said.startswith("something: No usable temporary directory found in ['/nowhere']; let TM")
    assert said.count("\n") == 1


def test_an_os_error_of_nobody_knows_what_keeps_its_traceback() -> None:
    def fail(config: Config) -> None:
        raise OSError("a library's own")

    with pytest.raises(OSError, match="a library's own"):
        run_command(Config, fail, "something", [])


def test_a_sentence_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Config) -> None:
        raise UserError("no \x1b[2J\nname.")

    assert exit_code(fail) == 2
    assert capsys.readouterr().err == "something: no \\x1b[2J\\nname.\n"


Finished = subprocess.CompletedProcess[str]

STRANGE = r"""
from dataclasses import dataclass
from clip_adapter.pipelines.console.running import run_command
@dataclass
class Nothing:
    "Print."
def show(config):
    print("97.1 \u00b1 0.2 \u00d7 \u5b57 " + chr(0xDCFF))
    print(*range({count}))
run_command(Nothing, show, "show", [])
"""


def shown(
    count: int, redirection: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, STRANGE.format(count=count)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": ""}])
def test_what_the_terminal_cannot_show_is_escaped(environment: dict[str, str]) -> None:
    finished = shown(1, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", **environment)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith(r"97.1 \xb1 0.2 \xd7 \u5b57 \udcff")


@pytest.mark.parametrize("count", [1, 100_000])
def test_a_full_device_is_one_line_and_code_2(count: int) -> None:
    finished = shown(count, "> /dev/full")
    assert (finished.returncode, finished.stderr) == (2, "show: No space left on device.\n")
    both = shown(count, "> /dev/full 2> /dev/full")
    assert (both.returncode, both.stderr) == (2, "")
    assert shown(count, "2> /dev/full").returncode == 0


def test_a_reader_that_leaves_early_is_no_error() -> None:
    finished = shown(100_000, "| head -c 3")
    assert (finished.stdout, finished.stderr) == ("97.", "")


def test_a_closed_standard_output() -> None:
    finished = shown(1, ">&-")
    assert (finished.returncode, finished.stderr) == (0, "")


def test_no_file_becomes_a_standard_stream_that_was_closed(tmp_path: Path) -> None:
    """As cron and services start programs."""
    program = (
        "import sys\n"
        "from clip_adapter.pipelines.console.entry import begin\n"
        "begin()\n"
        "print('a result')\n"
        "print('a note', sys.stderr.isatty(), sys.stdin.read(), file=sys.stderr)\n"
        "with open('found', 'w') as file: file.write(str(file.fileno()))\n"
    )
    closed = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program]
    assert subprocess.run(closed, cwd=tmp_path).returncode == 0
    assert int((tmp_path / "found").read_text()) > 2


@pytest.mark.parametrize(
    "command",
    [
        ["extract", "--help"],
        ["extract", "--version"],
        ["fit", "--help"],
        ["fit", "--version"],
        ["clip-adapter"],
        ["clip-adapter", "--version"],
        ["clip-adapter", "merge", "--version"],
        ["clip-adapter", "predict", "--help"],
        ["clip-adapter", "report", "--version"],
        ["clip-adapter", "inspect", "--version"],
    ],
)
def test_help_and_version_of_the_console_scripts(command: list[str]) -> None:
    script = str(Path(sys.executable).parent / command[0])
    good = subprocess.run([script, *command[1:]], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    wanted = "clip-adapter " if "--version" in command else "usage: "
    assert good.stdout.startswith(wanted)
    with Path("/dev/full").open("w") as full:
        bad = subprocess.run([script, *command[1:]], stdout=full, stderr=subprocess.PIPE, text=True)
    assert bad.returncode == 2
    assert bad.stderr.endswith(": No space left on device.\n")
    assert bad.stderr.count("\n") == 1


def test_an_unknown_command_is_one_line_and_code_2() -> None:
    script = Path(sys.executable).parent / "clip-adapter"
    finished = subprocess.run([script, "extrakt"], capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith("clip-adapter: There is no command 'extrakt'; ")
    assert finished.stderr.count("\n") == 1
