"""Progress: lines away from a terminal, a bar on one."""

import os
import pty
import subprocess
import sys

import pytest

from clip_adapter.pipelines.console import terminal as module
from clip_adapter.pipelines.console.terminal import progress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with progress("encode", 10) as advance:
        for _ in range(10):
            clock.now += 0.9
            advance(1, "note")
    assert capsys.readouterr() == ("", "")


def test_long_work_prints_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with progress("encode train", 100, done=40) as advance:
        for _ in range(6):
            clock.now += 4
            advance(5, "")
        clock.now += 10
        advance(30, "12 images/s")
    assert capsys.readouterr() == (
        "",
        "encode train: 55/100\nencode train: 70/100\nencode train: 100/100 12 images/s\n",
    )


def test_a_terminal_gets_a_bar() -> None:
    program = (
        "from clip_adapter.pipelines.console.terminal import progress\n"
        "with progress('encode [red] [/]', 7, done=2) as advance:\n"
        "    advance(3, 'a note [/b] :cat: [x]')\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    finished = subprocess.run(
        [sys.executable, "-c", program], stderr=theirs, stdout=subprocess.PIPE, env=environment
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert finished.returncode == 0
    assert finished.stdout == b""
    for part in ("encode [red] [/]", "5/7", "a note [/b] :cat: [x]"):
        assert part in shown
